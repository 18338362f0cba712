"""The heat map of a sharing: whose attention chooses the tokens of which layer, with what weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clsa_compile.ir.plan import Plan
from clsa_compile.ir.routing import Pool

__all__ = ["Cell", "Heads", "Map", "heads_of", "map_of"]

# Pixels: the sides of a cell where there is room and where there is little, what all columns take then.
SIDE, LEAST, EXTENT = 22, 6, 960
LEFT, TOP = 44, 44
# So far from each other labels stand.
LABELS = 24


@dataclass(frozen=True, slots=True)
class Cell:
    """A layer whose choice another one reads: their places, the share of the weight, and what it says.

    anchor: this is the layer after which is chosen.
    """

    x: float
    y: float
    share: float
    says: str
    anchor: bool


@dataclass(frozen=True, slots=True)
class Map:
    """Layers that choose (rows) and that read what was chosen (columns); labels are texts and places."""

    cells: tuple[Cell, ...]
    side: float
    width: float
    height: float
    rows: tuple[tuple[str, float], ...]
    columns: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """The weights of the heads of one layer in one choice, as shares of the largest; says: whose they are."""

    says: str
    shares: tuple[float, ...]


def map_of(plan: Plan) -> Map | None:
    """Returns who chooses for whom; None where no layer reads what another one chose."""
    weights = _weights(plan)
    if not weights:
        return None
    layers = {site.ordinal: site.layer for site in plan.sites}
    sources = sorted({source for source, _, _, _ in weights})
    first, last = min(sources), max(member for _, member, _, _ in weights)
    columns = [site.ordinal for site in plan.sites if first <= site.ordinal <= last]
    side = max(LEAST, min(SIDE, EXTENT // len(columns)))
    x = {ordinal: LEFT + side * i for i, ordinal in enumerate(columns)}
    y = {ordinal: TOP + SIDE * i for i, ordinal in enumerate(sources)}
    cells = tuple(
        Cell(
            x[member],
            y[source],
            share,
            f"layer {layers[member]} reads what layer {layers[anchor]} chose"
            + (f"; {share:.1%} of the weight is on layer {layers[source]}" if share < 1 else ""),
            source == anchor,
        )
        for source, member, anchor, share in weights
    )
    every = -(-LABELS // side)
    return Map(
        cells,
        side,
        LEFT + side * len(columns) + 8,
        TOP + SIDE * len(sources) + 8,
        tuple((str(layers[source]), at + SIDE / 2) for source, at in y.items()),
        tuple((str(layers[o]), at + side / 2) for i, (o, at) in enumerate(x.items()) if i % every == 0),
    )


def _weights(plan: Plan) -> list[tuple[int, int, int, float]]:
    """Returns (source, member, anchor, share of the weight) of what is read from another layer."""
    found = [
        (source, member, pool.anchor, share)
        for pool in plan.pools
        for source, share in _shares(pool).items()
        for member in pool.members
        if share > 0
    ]
    # An index chooses for its anchor too, which says nothing.
    found += [
        (pool.anchor, member, pool.anchor, 1.0)
        for pool in plan.pools
        if pool.index is not None
        for member in pool.members
        if member != pool.anchor
    ]
    # Equal indexers, and those that a model shares by itself, are no choice of ours.
    found += [
        (group.anchor, member, group.anchor, 1.0)
        for group in plan.groups
        if group.kind == "index"
        for member in group.members
        if member in plan.shares
    ]
    return found


def _shares(pool: Pool) -> dict[int, float]:
    """Returns by source the share of a pool's weight that is on its heads."""
    sums = {source: sum(map(sum, rows)) for source, rows in pool.sources.items()}
    whole = sum(sums.values())
    return {source: total / whole for source, total in sums.items()} if whole else {}


def heads_of(plan: Plan) -> tuple[Heads, ...]:
    """Returns the weights of heads, choice by choice; nothing where they are all the same."""
    rows = [
        (pool, source, number, weights)
        for pool in plan.pools
        for source, sets in pool.sources.items()
        for number, weights in enumerate(sets)
    ]
    if all(_is_even(weights) for *_, weights in rows):
        return ()
    layers = {site.ordinal: site.layer for site in plan.sites}
    most = {id(pool): max(w for p, _, _, ws in rows if p is pool for w in ws) for pool, *_ in rows}
    return tuple(
        Heads(
            f"layer {layers[source]}, for what layer {layers[pool.anchor]} chooses"
            + (f", set {number}" if pool.sets > 1 else ""),
            tuple(weight / (most[id(pool)] or 1) for weight in weights),
        )
        for pool, source, number, weights in rows
    )


def _is_even(weights: Sequence[float]) -> bool:
    return max(weights) - min(weights) <= 1e-9 * max(weights, default=0)
