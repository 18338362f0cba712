"""Plots: cost over length, and the roofline, as paths and points of one coordinate system each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy

from clsa_compile.html.axes import Axis, decades, scaled, tokens_axis, tokens_words
from clsa_compile.prediction import Cost, Prediction, T

__all__ = ["HEIGHT", "WIDTH", "CostPlot", "Line", "Mark", "Roofline", "cost_plot", "roofline"]

# Units of a plot: the picture, and where its axes end.
WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 394, 30, 254
# A line is drawn through so many points.
STEPS = 96
# Lengths that the plot shows at least, and how much room there is behind the longest that was asked for.
SHORTEST, LONGEST, BEHIND = 256, 2**20, 2
# Numbers stand so far from their points, no nearer to others, and so much higher or lower where they must.
APART = 12
NEAR = (0, -12, 12, -24, 24, -36, 36)


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a side, "before" or "after", what it says, its number, and where that stands."""

    side: str
    x: float
    y: float
    says: str
    number: int = 0
    label: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Line:
    """A curve of a side."""

    side: str
    path: str


@dataclass(frozen=True, slots=True)
class CostPlot:
    """Seconds of a whole call over the tokens in its cache; break_even: where it stands, and the number."""

    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...]
    break_even: tuple[float, str] | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One kind of work in numbers: intensity in flops a byte, speed in flops a second.

    number is 0 for work without arithmetic, which has no place on a roofline.
    """

    number: int
    side: str
    name: str
    ordinals: tuple[int, ...]
    intensity: float
    speed: float
    us: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the device attains at most, and where each kind of work stands, at so many tokens in the cache."""

    tokens: int
    x: Axis
    y: Axis
    roof: str
    marks: tuple[Mark, ...]
    entries: tuple[Entry, ...]


def cost_plot(found: Prediction, lengths: Sequence[int]) -> CostPlot:
    """Returns the plot of a prediction, with marks at `lengths`."""
    shown = found.sensible(lengths)
    low = max(found.queries, min(SHORTEST, *shown, shown[0]))
    high = max(LONGEST, BEHIND * max(shown), BEHIND * low)
    sides = (("before", found.before), ("after", found.after))
    curves = {side: _seconds(cost, _between(low, high)) for side, cost in sides}
    every = [s for points in curves.values() for _, s in points]
    x = tokens_axis(low, high, LEFT, RIGHT)
    y = decades(min(every), max(every), BOTTOM, TOP, "s")
    marks = [
        Mark(side, x.at(tokens), y.at(s), f"{side}, {tokens_words(tokens)} tokens: {scaled(s, 's')}")
        for side, cost in sides
        for tokens, s in _seconds(cost, shown)
    ]
    even = found.break_even
    at = None if even is None or not low <= even <= high else (x.at(even), f"{even:,}")
    lines = tuple(
        Line(side, _path([(x.at(t), y.at(s)) for t, s in points])) for side, points in curves.items()
    )
    return CostPlot(x, y, lines, tuple(marks), at)


def _between(low: int, high: int) -> list[int]:
    """Returns numbers of tokens, evenly apart on a logarithmic axis."""
    return sorted({round(low * (high / low) ** (i / STEPS)) for i in range(STEPS + 1)})


def _seconds(cost: Cost, lengths: Sequence[int]) -> list[tuple[int, float]]:
    """Returns (tokens, seconds) of a cost."""
    time: Any = sympy.lambdify(T, cost.us, "math")
    return [(tokens, float(time(tokens)) / 1e6) for tokens in lengths]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def roofline(found: Prediction, tokens: int) -> Roofline | None:
    """Returns the roofline of a prediction; None where nothing is known of the device."""
    if not found.bandwidth or not found.rate:
        return None
    entries = _entries(found, tokens)
    drawn = [entry for entry in entries if entry.number]
    ridge = found.rate / found.bandwidth
    x = decades(
        min([ridge / 10, *(e.intensity for e in drawn)]),
        max([ridge * 10, *(e.intensity for e in drawn)]),
        LEFT,
        RIGHT,
    )
    most = max([found.rate, *(e.speed for e in drawn)])
    y = decades(min([found.rate / 1e3, *(e.speed for e in drawn)]), most, BOTTOM, TOP)
    # Where memory is the roof at the lowest intensity, or at the lowest speed that is drawn.
    start = max(x.low, y.low / found.bandwidth)
    corners = [(start, start * found.bandwidth), (ridge, found.rate), (x.high, found.rate)]
    roof = _path([(x.at(a), y.at(b)) for a, b in corners])
    return Roofline(tokens, x, y, roof, _numbered(drawn, x, y), tuple(entries))


def _entries(found: Prediction, tokens: int) -> list[Entry]:
    """Returns each kind of work, those with arithmetic numbered from 1."""
    entries: list[Entry] = []
    for side, whole, operations in zip(
        ("before", "after"), (found.before, found.after), found.operations, strict=True
    ):
        works = [(o.name, o.ordinals, o.cost.at(tokens)) for o in operations]
        parts = [[len(ordinals) * part for part in cost] for _, ordinals, cost in works]
        rest = tuple(total - sum(part) for total, *part in zip(whole.at(tokens), *parts, strict=True))
        for name, ordinals, (size, flops, us) in [*works, ("everything else", (), rest)]:
            if us > 0:
                has_place = size > 0 and flops > 0
                number = 1 + sum(entry.number > 0 for entry in entries) if has_place else 0
                intensity = flops / size if has_place else 0.0
                entries.append(Entry(number, side, name, ordinals, intensity, flops / us * 1e6, us))
    return entries


def _numbered(entries: Sequence[Entry], x: Axis, y: Axis) -> tuple[Mark, ...]:
    """Returns points with their numbers beside them, where no other point or number is if that can be."""
    points = [(x.at(entry.intensity), y.at(entry.speed)) for entry in entries]
    taken = list(points)
    marks = []
    for entry, (px, py) in zip(entries, points, strict=True):
        places = [(px + dx, py + dy) for dy in NEAR for dx in (APART, -APART)]
        free = [place for place in places if all(map(partial(_is_apart, place), taken))]
        label = (free or places)[0]
        taken.append(label)
        says = (
            f"{entry.number}: {entry.name}, {entry.side}: {entry.intensity:.3g} flop/byte, "
            f"{scaled(entry.speed, 'flop/s')}"
        )
        marks.append(Mark(entry.side, px, py, says, entry.number, (round(label[0], 2), round(label[1], 2))))
    return tuple(marks)


def _is_apart(place: tuple[float, float], other: tuple[float, float]) -> bool:
    inside = LEFT < place[0] < RIGHT and TOP < place[1] < BOTTOM
    return inside and max(abs(place[0] - other[0]), abs(place[1] - other[1])) >= APART - 1
