"""Plan: what will be done with every attention of a graph, decided before the first node changes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Action = Literal["sparse", "attention", "left"]


@dataclass(frozen=True, slots=True)
class SitePlan:
    """The decision for one attention.

    `ordinal` counts attentions in execution order, `layer` is the number in the module path. `action` is
    "sparse" (over selected tokens), "attention" (dense, each key read once) or "left", with a `reason`.
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


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share something: one index ("index"), or one pair of K and V ("kv").

    `anchor` and `members` are ordinals; the anchor is the first member.
    """

    kind: Literal["index", "kv"]
    anchor: int
    members: tuple[int, ...]
    topk: int = 0
    score: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """All decisions for one graph.

    `schedule` has a letter for each layer that attends to selected tokens: F where it runs its indexer, S
    where it reads an earlier index. `shares` are the ordinals of the layers that have an indexer and read
    another one's index, which changes results. `invalid` are those among them whose index keys are no longer
    written.
    """

    sites: tuple[SitePlan, ...]
    groups: tuple[Group, ...]
    schedule: str = ""
    shares: tuple[int, ...] = ()
    invalid: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain data, ready for JSON."""
        return {
            "sites": [asdict(s) for s in self.sites],
            "groups": [asdict(g) for g in self.groups],
            "schedule": self.schedule,
            "shares": list(self.shares),
            "invalid": list(self.invalid),
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
        )

    def count(self, action: Action) -> int:
        """Returns how many sites get an action."""
        return sum(s.action == action for s in self.sites)
