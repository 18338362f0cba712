"""Routing: selections that layers of dense models make for others, and who attends to them.

A dense layer (an anchor) can say, in the pass over its keys that it makes anyway, how much each of its heads
looked at every token. A pool is a top-k of such mass, which later layers attend to instead of all tokens. Or
an index that was trained for it ranks the keys that the anchor caches, and no layer reads everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from clsa_compile.errors import OptionError

# The most tokens of a selection that kernels hold.
MOST_TOKENS = 4096
# Tokens to choose again among, for each that is chosen.
POOL = 4
# One row of weights a set of tokens, one weight a head.
Weights = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A dense attention that may share: `ordinal` counts a graph's attentions in order of execution.

    width and value_width are those of a head's keys and values. `path` is the module's, for people.
    """

    ordinal: int
    heads: int
    kv_heads: int
    path: str = ""
    width: int = 0
    value_width: int = 0
    scale: float = 0.0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class Index:
    """An index that was trained for a group of layers; it borrows the keys that the anchor caches.

    What the anchor makes its queries from, x [B, S, E], goes through another weight in place of the one that
    makes them, and then through all that queries go through (norms, rotation). Heads of `kv_heads` key heads
    from `first_head` on rank the keys by `score` (see `ir/scores.py`), whose dot is scaled as in the anchor's
    attention and whose `weight` is linear in x. name: of its tensors, see `tensor_names`.
    """

    name: str
    score: str
    first_head: int
    kv_heads: int

    def tensor_names(self) -> tuple[str, str, str]:
        """Returns the names of its weights: query, as the layer's own; head [Hi, E]; and bias [Hi]."""
        return f"{self.name}.query", f"{self.name}.head", f"{self.name}.bias"


@dataclass(frozen=True, slots=True)
class Pool:
    """N sets of tokens a query, chosen after layer `anchor` from the mass of `sources`, or by an `index`.

    topk: tokens of a set. sources: by layer, weights [N, H] of its heads; layers up to the anchor. members:
    the layers that attend to these sets, the anchor itself where it does too. rows: by member, the set that
    each kv head attends to; without an entry all of them attend to set 0. keep_first, keep_last: tokens at
    both ends that are always in a set. power: mass is the probability raised to it. dense_below: queries
    whose readable tokens lie within so many positions attend to all of them. Layers are ordinals. An `index`
    chooses before the anchor attends, one set for all heads, and there are no sources then.
    """

    anchor: int
    topk: int
    sources: Mapping[int, Weights]
    members: tuple[int, ...]
    rows: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    keep_first: int = 0
    keep_last: int = 0
    power: float = 1.0
    dense_below: int = 0
    index: Index | None = None

    @property
    def sets(self) -> int:
        """N, the number of sets of tokens a query."""
        return 1 if self.index is not None else len(next(iter(self.sources.values())))

    def to_dict(self) -> dict[str, Any]:
        """Returns the pool as plain data, ready for JSON."""
        return {
            **asdict(self),
            "sources": {str(layer): [list(row) for row in rows] for layer, rows in self.sources.items()},
            "members": list(self.members),
            "rows": {str(layer): list(sets) for layer, sets in self.rows.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Pool:
        """Reads what `to_dict` wrote. Raises TypeError for unknown fields."""
        changed = {
            "sources": {int(layer): tuple(map(tuple, rows)) for layer, rows in data["sources"].items()},
            "members": tuple(data["members"]),
            "rows": {int(layer): tuple(sets) for layer, sets in data.get("rows", {}).items()},
            "index": None if (index := data.get("index")) is None else Index(**index),
        }
        return cls(**{**data, **changed})


@dataclass(frozen=True, slots=True)
class Shares:
    """Who reads whose index among layers with indexers, counted from 0 among those that can share.

    anchors: for each layer the one whose index it reads, itself where its indexer runs. among: by layer whose
    indexer selects among the best tokens of another one, that one. pool: how many tokens these are; see
    `offered`.
    """

    anchors: tuple[int, ...]
    among: Mapping[int, int] = field(default_factory=dict)
    pool: int | None = None


# What of a model's own indices is shared, from the layer whose index each layer reads in the model, and from
# the layers themselves.
Sharing = Callable[[Sequence[int], Sequence[Layer]], Shares]


def offered(topk: int, pool: int | None) -> int:
    """Returns how many tokens a layer offers to those that choose again among them; `pool` where it is given.

    Raises OptionError for a pool that is no larger than what is chosen from it.
    """
    found = min(POOL * topk, MOST_TOKENS) if pool is None else pool
    if found <= topk:
        raise OptionError(
            f"a pool of {found} tokens leaves nothing to choose for topk={topk}; give a larger 'pool', "
            f"{MOST_TOKENS} at most, or a smaller 'topk'"
        )
    return found


def is_reindex(pools: Sequence[Pool], layer: int) -> bool:
    """Tells whether a layer chooses among what an earlier one has chosen: it reads that, and feeds a pool."""
    follows = any(layer in pool.members and pool.anchor != layer for pool in pools)
    return follows and any(layer in pool.sources for pool in pools)


def role(pools: Sequence[Pool], layer: int) -> str:
    """Returns a letter: F attends to all tokens, R to those that it chooses among, S to chosen ones.

    I attends to what an index chooses that was trained for it and the S after it.
    """
    if any(pool.index is not None and pool.anchor == layer for pool in pools):
        return "I"
    if not any(layer in pool.members for pool in pools):
        return "F"
    return "R" if is_reindex(pools, layer) else "S"


# The pools of a graph, from its layers that may share.
Route = Callable[[Sequence[Layer]], tuple[Pool, ...]]


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of dense layers: the pools, and whether prompts use them too, not single steps only.

    dense_below: see `Pool`. tensors: the weights of indices, by name.
    """

    route: Route
    prompts: bool = False
    dense_below: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
