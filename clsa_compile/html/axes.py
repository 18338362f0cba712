"""Axes: logarithmic scales of plots, their ticks, and numbers as people write them."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Axis", "Tick", "decades", "scaled", "tokens_axis", "tokens_words"]

_PREFIXES = (" ", "k", "M", "G", "T", "P", "E")
_SMALL = {-1: "m", -2: "µ", -3: "n"}


@dataclass(frozen=True, slots=True)
class Tick:
    """A value of an axis, where it stands, and what is written there."""

    value: float
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Axis:
    """A logarithmic axis of the values low to high, from `start` to `end` in the plot's units."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[Tick, ...] = ()

    def at(self, value: float) -> float:
        """Returns where a value stands; one outside of the axis stands at its end."""
        clipped = min(max(value, self.low), self.high)
        share = math.log(clipped / self.low) / math.log(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 2)


def decades(low: float, high: float, start: float, end: float, unit: str = "") -> Axis:
    """Returns an axis from and to powers of ten around the values, five labels at most."""
    first = math.floor(math.log10(low) + 1e-9)
    last = max(math.ceil(math.log10(high) - 1e-9), first + 1)
    every = -(-(last - first) // 5)
    axis = Axis(10.0**first, 10.0**last, start, end)
    powers = range(first, last + 1, every)
    ticks = tuple(Tick(10.0**p, axis.at(10.0**p), scaled(10.0**p, unit, 1)) for p in powers)
    return Axis(axis.low, axis.high, start, end, ticks)


def tokens_axis(low: int, high: int, start: float, end: float) -> Axis:
    """Returns an axis of numbers of tokens, with powers of four as labels, or both its ends."""
    axis = Axis(low, high, start, end)
    powers = [2**p for p in range(0, 41, 2) if low <= 2**p <= high]
    shown = powers[:: -(-len(powers) // 6)] if len(powers) > 1 else [low, high]
    ticks = tuple(Tick(tokens, axis.at(tokens), tokens_words(tokens)) for tokens in shown)
    return Axis(low, high, start, end, ticks)


def tokens_words(tokens: int) -> str:
    """Returns a number of tokens: 512, 4K, 1M of 1024s where it is whole ones, 131,073 otherwise."""
    for power, name in ((20, "M"), (10, "K")):
        if tokens >= 2**power and tokens % 2**power == 0:
            return f"{tokens >> power}{name}"
    return f"{tokens:,}"


def scaled(value: float, unit: str = "", digits: int = 3) -> str:
    """Returns a number with a prefix of thousands: `131 GB`, `5.31 ms`; digits: how many count."""
    if value == 0:
        return f"0 {unit}".rstrip()
    # Rounded first: 999.9 is 1 k.
    rounded = float(f"{value:.{digits - 1}e}")
    power = math.floor(math.log10(abs(rounded)) / 3 + 1e-12)
    power = min(max(power, -3 if unit else 0), len(_PREFIXES) - 1)
    prefix = _SMALL.get(power, _PREFIXES[max(power, 0)]).strip()
    figure = rounded / 1000.0**power
    whole = len(str(int(abs(figure))))
    text = f"{figure:.{max(digits - whole, 0)}f}" if abs(figure) >= 1 else f"{figure:.{digits}g}"
    return f"{text} {prefix}{unit}".rstrip()
