"""Sites: what was found in a graph, and Reject: what was not taken, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sympy
from torch.fx import Node

from clsa_compile.ir.scores import Score


class Reason(StrEnum):
    """Why something was left as it was."""

    USERS = "users"  # an intermediate result is needed elsewhere
    LAYOUT = "layout"  # an operand is not laid out as attention needs it
    SHAPE = "shape"  # ranks or sizes do not fit
    ORDER = "order"  # scale, softcap and mask come in another order
    SCALE = "scale"  # the scale is not a constant
    DTYPE = "dtype"  # operands differ in dtype
    DROPOUT = "dropout"  # probabilities are dropped at random
    MASK = "mask"  # a mask that cannot be carried over
    MUTATION = "mutation"  # an operand is written between its read and its use
    SCORE = "score"  # an indexer's score of unknown form
    TOPK = "topk"  # a selection of unknown form
    TRAINING = "training"  # gradients are needed
    AUTOCAST = "autocast"  # autocast decides dtypes at run time
    SUBCLASS = "subclass"  # a tensor subclass (DTensor, quantised) is not a plain tensor
    HIGHER_ORDER = "higher_order"  # attention behind a higher-order op
    TRITON = "triton"  # kernels for CUDA cannot be generated without Triton
    INDUCTOR = "inductor"  # Inductor failed on the rewritten graph
    CAPTURE = "capture"  # the graph could not be brought into the dialect
    SKIPPED = "skipped"  # the option `skip` names it


class Refused(Exception):
    """Raised inside a pattern to refuse a candidate; becomes a Reject."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Reject:
    """A candidate that stays as it was. `node` names it in the graph, `path` in the model."""

    ordinal: int
    node: str
    path: str
    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor read through a permutation: `dims[i]` is the root's dimension that plays role i.

    None stands for a role that the root does not have; it becomes a dimension of size 1.
    """

    root: Node
    dims: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class MaskSpec:
    """A recovered mask: `predicate` over b, h, q, kv and the inputs' loads, AND `tensor` if any.

    `forbids` says that the tensor is boolean and true where a key may not be read.
    """

    predicate: Any = sympy.true
    inputs: tuple[Node, ...] = ()
    tensor: Operand | None = None
    forbids: bool = False

    @property
    def is_open(self) -> bool:
        """True when every key may be read."""
        return bool(self.predicate == sympy.true) and self.tensor is None


@dataclass(frozen=True, slots=True)
class IndexerSite:
    """A top-k over an index score. Operands: q [B, Hi, S, Di], k [B, 1, T, Di], weight [B, Hi, S]."""

    topk_node: Node
    q: Operand
    k: Operand
    weight: Operand | None
    scale: float
    score: Score
    mask: MaskSpec
    topk: int


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention. Operands: q [B, H, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], sinks [H].

    has_selection: the model selects tokens for it. takes_all: and the selection is as long as the keys are
    many, so that there is nothing to choose.
    """

    ordinal: int
    path: str
    family: str
    out: Node
    q: Operand
    k: Operand
    v: Operand
    heads: int
    kv_heads: int
    scale: float
    softcap: float
    mask: MaskSpec
    sinks: Operand | None
    indexer: IndexerSite | None
    has_selection: bool
    out_roles: tuple[int, ...] = (0, 1, 2, 3)
    note: str = ""
    takes_all: bool = False

    @property
    def kind(self) -> str:
        """ "topk" when the model selects tokens for this attention, else "dense"."""
        return "topk" if self.has_selection else "dense"


@dataclass(frozen=True, slots=True)
class Sites:
    """All that `match` found, in execution order."""

    attention: tuple[AttentionSite, ...]
    rejects: tuple[Reject, ...]
