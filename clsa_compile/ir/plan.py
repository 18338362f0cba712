"""Plan: what will be done with every attention of a graph, decided before the first node changes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from clsa_compile.ir.routing import Pool
from clsa_compile.ir.strip import strip

Action = Literal["sparse", "attention", "left"]


@dataclass(frozen=True, slots=True)
class SitePlan:
    """The decision for one attention.

    `ordinal` counts attentions in execution order, `layer` is the number in the module path. `action` is
    "sparse" (over selected tokens), "attention" (dense, each key read once) or "left", with a `reason`.
    `takes_all`: the model selects tokens here, and as many as there are keys.
    """

    ordinal: int
    layer: int
    path: str
    kind: Literal["dense", "topk"]
    action: Action
    reason: str = ""
    family: str = ""
    heads: int = 0
    kv_heads: int = 0
    scale: float = 0.0
    softcap: float = 0.0
    mask: str = ""
    score: str = ""
    topk: int = 0
    takes_all: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share something.

    One index ("index"), one pair of K and V ("kv"), or tokens chosen from the attention mass of dense layers
    ("mass", whose anchor is a member only where it attends to them too), or by an index that was trained for
    the group ("distilled"). `anchor` and `members` are ordinals.
    `repeats` is how many indexers of the model compute the same as the one that runs, besides it. An index is
    selected from all tokens, or from the best `pool` tokens of the indexer of layer `among`.
    """

    kind: Literal["index", "kv", "mass", "distilled"]
    anchor: int
    members: tuple[int, ...]
    topk: int = 0
    score: str = ""
    repeats: int = 0
    among: int | None = None
    pool: int = 0

    @property
    def runs_index(self) -> bool:
        """True where an indexer runs for the group, the model's own or one that was trained."""
        return self.kind in ("index", "distilled")


@dataclass(frozen=True, slots=True)
class Savings:
    """What a call no longer touches because of what layers share, with full caches.

    idle: paths in the model of parameters that nothing reads. weight_bytes: their size. cache_bytes: keys and
    values, or index keys, that are not read. flops: multiplications and additions that are not computed.
    """

    idle: tuple[str, ...]
    weight_bytes: int
    cache_bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions for one graph.

    `schedule` has a letter for each layer that attends to selected tokens: F where it runs its indexer, S
    where it reads an earlier index. `shares` are the ordinals of the layers that have an indexer and read
    another one's index, which changes results. `invalid` are those among them whose index keys are no longer
    written. `pools` are the selections made from the attention mass of dense layers, which change results
    too; the schedule then has a letter for each dense layer that may share: F where it attends to all tokens.
    `skipped` names the passes that were left out on request.
    """

    sites: tuple[SitePlan, ...]
    groups: tuple[Group, ...]
    schedule: str = ""
    shares: tuple[int, ...] = ()
    invalid: tuple[int, ...] = ()
    pools: tuple[Pool, ...] = ()
    savings: Savings | None = None
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain data, ready for JSON."""
        return {
            "sites": [asdict(s) for s in self.sites],
            "groups": [asdict(g) for g in self.groups],
            "schedule": self.schedule,
            "shares": list(self.shares),
            "invalid": list(self.invalid),
            "pools": [pool.to_dict() for pool in self.pools],
            "savings": None if self.savings is None else asdict(self.savings),
            "skipped": list(self.skipped),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Reads what `to_dict` wrote. Raises TypeError for unknown fields."""
        return cls(
            tuple(SitePlan(**s) for s in data["sites"]),
            tuple(Group(**{**g, "members": tuple(g["members"])}) for g in data["groups"]),
            data.get("schedule", ""),
            tuple(data.get("shares", ())),
            tuple(data.get("invalid", ())),
            tuple(Pool.from_dict(p) for p in data.get("pools", ())),
            None
            if (saved := data.get("savings")) is None
            else Savings(**{**saved, "idle": tuple(saved["idle"])}),
            tuple(data.get("skipped", ())),
        )

    def strip(self, model: torch.nn.Module) -> int:
        """Frees the weights that nothing reads under this plan; returns how many bytes. See `ir/strip.py`.

        The model then runs only compiled with the options that made this plan. Raises OptionError where the
        plan is of another model.
        """
        return strip(model, () if self.savings is None else self.savings.idle)

    def count(self, action: Action) -> int:
        """Returns how many sites get an action."""
        return sum(s.action == action for s in self.sites)
