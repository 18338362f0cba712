"""Who attends to whose tokens in a dense model, without a search: every layer, every n-th, or a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import Layer, Pool, Route, Weights, offered
from clsa_compile.policies.schedule import shown

__all__ = ["Dense", "route"]


@dataclass(frozen=True, slots=True)
class Dense:
    """The options for dense layers; see `config.Options`."""

    topk: int
    share: int | str = "off"
    scope: str = "layer"
    dense_layers: int = 0
    keep_first: int = 4
    keep_last: int = 32
    pool: int | None = None


def route(dense: Dense) -> Route:
    """Returns the function that makes the pools of a graph from its layers that may share."""
    return partial(_pools, dense)


def _pools(dense: Dense, layers: Sequence[Layer]) -> tuple[Pool, ...]:
    if dense.share == "off":
        # Every layer after the dense ones attends to what it would have looked at most itself.
        return tuple(_pool(dense, layer, (layer,)) for layer in layers[dense.dense_layers :])
    schedule = roles(dense, len(layers))
    # By the layer that chooses: who attends to its tokens, and who chooses among the more it offers.
    narrow: dict[Layer, list[Layer]] = {}
    again: dict[Layer, list[Layer]] = {}
    full = last = None
    for layer, role in zip(layers, schedule, strict=True):
        if role == "R" and full is not None:
            again.setdefault(full, []).append(layer)
        if role == "S" and last is not None:
            narrow.setdefault(last, []).append(layer)
        else:
            full, last = (layer, layer) if role == "F" else (full, layer)
    wide = replace(dense, scope="layer", topk=offered(dense.topk, dense.pool) if again else dense.topk)
    wider = [_pool(wide, anchor, members) for anchor, members in again.items()]
    return (*wider, *(_pool(dense, anchor, members) for anchor, members in narrow.items()))


def roles(dense: Dense, layers: int) -> str:
    """Returns the schedule of a graph: F attends to all tokens, S to those that the last F or R chose.

    R attends to the tokens that the last F offers, and chooses among them. Raises OptionError for a schedule
    of another length.
    """
    if isinstance(dense.share, int):
        first = dense.dense_layers
        return "".join("F" if i < first or (i - first) % dense.share == 0 else "S" for i in range(layers))
    if layers and len(dense.share) != layers:
        raise OptionError(
            f"the schedule {shown(dense.share)!r} is for {len(dense.share)} layers; "
            f"this graph has {layers} dense layers that can share"
        )
    return dense.share if layers else ""


def _pool(dense: Dense, anchor: Layer, members: Sequence[Layer]) -> Pool:
    per_head = dense.scope == "kv_head"
    rows = {}
    if per_head:
        for member in members:
            if member.kv_heads != anchor.kv_heads:
                raise OptionError(
                    f"scope='kv_head' needs as many kv heads in {member.path} ({member.kv_heads}) as in "
                    f"{anchor.path} ({anchor.kv_heads}); use scope='layer', or write a plan whose 'rows' say "
                    "which set each kv head reads (docs/sharing.md)"
                )
            rows[member.ordinal] = tuple(range(member.kv_heads))
    return Pool(
        anchor=anchor.ordinal,
        topk=dense.topk,
        sources={anchor.ordinal: _by_kv_head(anchor) if per_head else _pooled(anchor)},
        members=tuple(member.ordinal for member in members),
        rows=rows,
        keep_first=dense.keep_first,
        keep_last=dense.keep_last,
    )


def _pooled(layer: Layer) -> Weights:
    return ((1.0 / layer.heads,) * layer.heads,)


def _by_kv_head(layer: Layer) -> Weights:
    group = layer.heads // layer.kv_heads
    return tuple(
        tuple(1.0 / group if h // group == j else 0.0 for h in range(layer.heads))
        for j in range(layer.kv_heads)
    )
