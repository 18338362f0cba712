"""Fingerprints: what tells a model, and the tokens it was looked at with, from others."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor

from clsa_compile.errors import PlanError
from clsa_compile.ir.sharing import Fingerprint, SharingPlan

__all__ = ["check", "data_hash", "of_model", "sequence_hash"]

SAMPLED = 32


def of_model(model: Any, attentions: int, without: Container[str] = ()) -> Fingerprint:
    """Returns a model's fingerprint, with `attentions` of one forward; values `without` some weights'."""
    inner = getattr(model, "_orig_mod", model)
    parameters = sorted(inner.named_parameters()) if isinstance(inner, torch.nn.Module) else []
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name}{tuple(parameter.shape)};".encode())
    values = [p.detach() for name, p in parameters if name not in without]
    every = max(1, len(values) // SAMPLED)
    # The middle of a tensor: ends are often padding, or tokens that no text has.
    sample = [p.reshape(-1)[p.numel() // 2].item() for p in values[::every] if p.numel()]
    rounded = tuple(float(f"{value:.4g}") for value in sample)
    return Fingerprint(type(inner).__name__, attentions, digest.hexdigest(), rounded)


def check(plan: SharingPlan, found: Fingerprint) -> None:
    """Raises PlanError for a model that is not the plan's."""
    if plan.model is not None and (difference := plan.model.difference(found)):
        raise PlanError(
            f"the plan is for another model than this one: {difference}; search for a plan for it"
        )


def sequence_hash(ids: Tensor) -> str:
    """Returns the sha256 of one sequence of ids."""
    return hashlib.sha256(str(ids.flatten().tolist()).encode()).hexdigest()


def data_hash(sequences: Iterable[Tensor]) -> str:
    """Returns the sha256 of sequences, in their order."""
    return hashlib.sha256("".join(map(sequence_hash, sequences)).encode()).hexdigest()
