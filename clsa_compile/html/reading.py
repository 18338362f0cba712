"""Reading: which keys each layer reads, and who chooses its tokens, before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clsa_compile.ir.plan import Group, Plan
from clsa_compile.layers import Layer
from clsa_compile.report_text import alike

__all__ = ["Reading", "after", "before", "colours", "folded"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What one layer reads. Layers are ordinals.

    chooser: the layer whose choice of tokens it reads, None where it reads all. keys: the layer whose keys
    and values it reads, itself where they are its own. chooses: how it chooses tokens: "index" where an
    indexer of its own runs, "distilled" where one that was trained for it does, "mass" where its attention
    says which tokens mattered, "" where it does not.
    among: the layer whose best tokens its indexer chooses among.
    """

    chooser: int | None
    keys: int
    chooses: str = ""
    among: int | None = None


def after(plan: Plan) -> dict[int, Reading]:
    """Returns what each layer reads as it will run."""
    anchors = {group.anchor: group for group in plan.groups if group.kind != "kv"}
    chooser = {m: group.anchor for group in anchors.values() for m in group.members}
    keys = _keys(plan)
    return {
        site.ordinal: Reading(
            chooser.get(site.ordinal),
            keys[site.ordinal],
            anchors[site.ordinal].kind if site.ordinal in anchors else "",
            anchors[site.ordinal].among if site.ordinal in anchors else None,
        )
        for site in plan.sites
    }


def before(plan: Plan, layers: Sequence[Layer] = ()) -> dict[int, Reading]:
    """Returns what each layer reads in the model; `layers` tell of indexers that no group has."""
    keys = _keys(plan)
    found = {site.ordinal: Reading(None, keys[site.ordinal]) for site in plan.sites}
    # What is selected in a graph that has no more tokens than that is all of them, and no group.
    found |= {
        layer.ordinal: Reading(layer.ordinal, keys[layer.ordinal], "index")
        for layer in layers
        if layer.index is not None
    }
    for group in plan.groups:
        if group.kind != "index":
            continue
        owners = _owners(group, plan)
        last = group.anchor
        for member in group.members:
            last = member if member in owners else last
            found[member] = Reading(last, keys[member], "index" if member in owners else "")
    return found


def _owners(group: Group, plan: Plan) -> set[int]:
    """Returns the layers of a group whose indexers run in the model."""
    others = [m for m in group.members if m != group.anchor and m not in plan.shares]
    # Where the model has equal indexers, the plan says how many; which ones only where it is all of them.
    equal = others if group.repeats and group.repeats >= len(others) else []
    return {group.anchor, *(m for m in group.members if m in plan.shares), *equal}


def _keys(plan: Plan) -> dict[int, int]:
    """Returns for each layer the one whose keys and values it reads."""
    shared = {m: group.anchor for group in plan.groups if group.kind == "kv" for m in group.members}
    return {site.ordinal: shared.get(site.ordinal, site.ordinal) for site in plan.sites}


def colours(plan: Plan, number: int) -> dict[int, int]:
    """Returns a colour, 0 to number - 1, for each layer that reads what others read, or chooses for them."""
    found: dict[int, int] = {}
    shared = [g for g in plan.groups if g.kind != "kv" and len({g.anchor, *g.members}) > 1]
    for place, group in enumerate(shared):
        for member in group.members:
            found[member] = place % number
        found.setdefault(group.anchor, place % number)
    return found


def folded(
    plan: Plan, layers: Mapping[int, Layer], sides: Sequence[Mapping[int, Reading]]
) -> tuple[tuple[int, ...], ...]:
    """Returns runs of consecutive layers that differ in nothing but their number, on any side."""
    wanted = [_wanted(side) for side in sides]
    rows: list[list[int]] = []
    last: object = None
    for site in plan.sites:
        ordinal = site.ordinal
        layer = layers[ordinal]
        looks = (
            alike(layer),
            *(_look(ordinal, side[ordinal], names) for side, names in zip(sides, wanted, strict=True)),
        )
        if rows and looks == last:
            rows[-1].append(ordinal)
        else:
            rows.append([ordinal])
        last = looks
    return tuple(map(tuple, rows))


def _wanted(side: Mapping[int, Reading]) -> set[int]:
    """Returns the layers that another one reads from."""
    return {
        other
        for ordinal, reading in side.items()
        for other in (reading.chooser, reading.keys, reading.among)
        if other is not None and other != ordinal
    }


def _look(ordinal: int, reading: Reading, wanted: set[int]) -> tuple[object, ...]:
    """Returns what of a layer's reading is the same for those that may be drawn as one."""
    chooser = "own" if reading.chooser == ordinal else reading.chooser
    keys = "own" if reading.keys == ordinal else reading.keys
    return chooser, keys, reading.chooses, reading.among, ordinal if ordinal in wanted else None
