"""What the two scans share: the arguments that queries, weights and scores need."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clsa_compile.ir.scores import Score
from clsa_compile.ir.variants import SUPPORTED, Facts, Support
from clsa_compile.kernels.launch import strides, unsupported_operands


def supports_index(facts: Facts) -> Support:
    """Refuses dtypes, index heads that are too wide for one tile, and a choice among some tokens."""
    if facts.pooled:
        return Support(False, "only some tokens may be selected")
    if reason := unsupported_operands(facts):
        return Support(False, reason)
    if facts.D > 576:
        return Support(False, f"index heads of {facts.D} do not fit into shared memory")
    return SUPPORTED


def score_arguments(score: Score, weight: Tensor | None, lse: Tensor | None) -> dict[str, Any]:
    """Returns the kernel arguments of the tensors that the score reads.

    Raises ValueError when one is missing.
    """
    args: dict[str, Any] = {}
    for name, tensor, used in (
        ("weight", weight, score.uses_weight),
        ("lse", lse, score.uses_lse),
    ):
        if not used:
            continue
        if tensor is None:
            raise ValueError(f"the score {score.text!r} needs {name}, which was not given")
        args[f"{name}_ptr"] = tensor
        args.update(strides(name, "bhs", tensor))
    return args
