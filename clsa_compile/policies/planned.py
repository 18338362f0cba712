"""Routes from a sharing plan: who attends to whose tokens, as a search found it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TypeVar

from clsa_compile.errors import PlanError
from clsa_compile.ir.routing import Layer, Pool, Route, Shares
from clsa_compile.ir.sharing import SharingPlan

__all__ = ["route", "shares"]

T = TypeVar("T")

# Kernels compute in single precision: a scale that differs by less is the same.
_AGREE = 1e-5
# What a layer is called depends on what is compiled with it, where it stands on layers that cannot share.
_UNCHECKED = ("path", "ordinal")


def route(plan: SharingPlan) -> Route:
    """Returns the function that finds the plan's pools in a graph.

    It raises PlanError for a graph whose layers are not those of the plan.
    """
    return partial(_pools, plan)


def shares(plan: SharingPlan, owners: Sequence[int], layers: Sequence[Layer]) -> Shares:
    """Returns whose index each layer reads by a plan for layers with indexers.

    Raises PlanError for a graph whose layers are not those of the plan, or where one chooses that cannot.
    """
    found = list(owners)
    if not layers:
        return Shares(tuple(found))  # what a graph break cut off, or a prompt of few tokens
    _check(plan, layers)
    for pool in plan.pools:
        if owners[pool.anchor] != pool.anchor:
            path = layers[pool.anchor].path
            raise PlanError(f"the plan has layer {path} choose, which has no indexer here")
        for member in pool.members:
            found[member] = pool.anchor
    return Shares(tuple(found))


def _pools(plan: SharingPlan, layers: Sequence[Layer]) -> tuple[Pool, ...]:
    if not layers:
        return ()  # what a graph break cut off before or after the layers
    _check(plan, layers)
    return tuple(_found(pool, [layer.ordinal for layer in layers]) for pool in plan.pools)


def _check(plan: SharingPlan, layers: Sequence[Layer]) -> None:
    """Guards a plan's use: raises PlanError for other layers than its own."""
    what = "layers with an index" if plan.kind == "index" else "dense layers"
    if len(layers) != len(plan.layers):
        raise PlanError(
            f"the plan is for {len(plan.layers)} {what} that can share, and this graph has "
            f"{len(layers)}: it is for another model, or the model is cut into several graphs; search again"
        )
    for ours, theirs in zip(plan.layers, layers, strict=True):
        if difference := _difference(ours, theirs):
            raise PlanError(
                f"the plan is for another model: layer {theirs.path} has {difference} ({ours.path}); "
                "search again for this one"
            )


def _difference(ours: Layer, theirs: Layer) -> str:
    """Returns what a layer has that the plan's has not, or ""."""
    for name in (f.name for f in fields(Layer) if f.name not in _UNCHECKED):
        wanted, found = getattr(ours, name), getattr(theirs, name)
        if abs(wanted - found) > _AGREE * abs(wanted):
            return f"{name} {found:g}, the plan's {wanted:g}"
    return ""


def _found(pool: Pool, ordinals: Sequence[int]) -> Pool:
    """Names a pool's layers as a graph counts them."""

    def renamed(by_layer: dict[int, T]) -> dict[int, T]:
        return {ordinals[layer]: value for layer, value in by_layer.items()}

    return replace(
        pool,
        anchor=ordinals[pool.anchor],
        members=tuple(ordinals[m] for m in pool.members),
        sources=renamed(dict(pool.sources)),
        rows=renamed(dict(pool.rows)),
    )
