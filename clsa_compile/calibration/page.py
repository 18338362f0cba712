"""Pages: a report as one HTML file that needs no network and no script."""

from __future__ import annotations

import importlib.resources
import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import jinja2

from clsa_compile.html.file import write

if TYPE_CHECKING:
    from clsa_compile.calibration.quality import Quality
    from clsa_compile.calibration.task_report import TaskReport

__all__ = ["render", "write"]

# Units of the picture, of which a letter has nine, whatever the number of layers: what the cells take, a
# cell's side at most, room for the labels at the left and above.
EXTENT, SIDE, LEFT, TOP = 360, 24, 34, 34
# Room for the names of the axes, where there are few layers.
LEAST = 100
# So many layers have a label at most: more of them would run into each other.
LABELS = 16
# Viridis, as in the picture that `Quality.heatmap` draws: dark is 0, bright is 1.
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True, slots=True)
class _Cell:
    """One cell of the heat map: its place in the picture's units, its colour, and what it says."""

    x: float
    y: float
    colour: str
    text: str
    planned: bool


@dataclass(frozen=True, slots=True)
class _Map:
    """The heat map: its cells and their side, the layers with a label and where they stand, its extent."""

    cells: tuple[_Cell, ...]
    side: float
    labels: tuple[tuple[int, float], ...]
    extent: float


def render(quality: Quality | None, tasks: TaskReport | None) -> str:
    """Returns the page of what was measured on text, on tasks, or on both; whatever it shows is escaped."""
    from clsa_compile.calibration.task_report import COLUMNS

    stops = tuple((i / (len(COLOURS) - 1), _hex(colour)) for i, colour in enumerate(COLOURS))
    return _template().render(
        quality=quality,
        tasks=tasks,
        columns=COLUMNS,
        map=_map(quality) if quality is not None and quality.serves else None,
        stops=stops,
        left=LEFT,
        top=TOP,
    )


@cache
def _template() -> jinja2.Template:
    source = importlib.resources.files("clsa_compile.calibration") / "report.html.jinja"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source.read_text(encoding="utf-8"))


def _map(quality: Quality) -> _Map:
    size = len(quality.serves)
    side = min(SIDE, round(EXTENT / size, 3))
    planned = {(layer.anchor, i) for i, layer in enumerate(quality.layers)}
    cells = tuple(
        _Cell(
            round(LEFT + side * layer, 2),
            round(TOP + side * anchor, 2),
            _colour(share),
            f"layer {layer} keeps {share:.1%} on what layer {anchor} chooses",
            (anchor, layer) in planned,
        )
        for anchor, row in enumerate(quality.serves)
        for layer, share in enumerate(row)
        if not math.isnan(share)
    )
    every = -(-size // LABELS)
    labels = tuple((layer, round(side * (layer + 0.5), 2)) for layer in range(0, size, every))
    return _Map(cells, side, labels, max(LEAST, side * size))


def _colour(share: float) -> str:
    """Returns the colour of a share, 0 to 1, between the two of `COLOURS` that are next to it."""
    place = min(max(share, 0.0), 1.0) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    part = place - low
    mixed = (round(a + (b - a) * part) for a, b in zip(COLOURS[low], COLOURS[low + 1], strict=True))
    return _hex(tuple(mixed))


def _hex(colour: tuple[int, ...]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)
