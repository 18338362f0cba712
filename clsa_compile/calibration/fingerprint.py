"""Fingerprints: what tells a model, and the tokens it was looked at with, from others."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor

from clsa_compile.ir.fingerprint import Fingerprint, middles

__all__ = ["data_hash", "of_model", "sequence_hash"]

# Where a table is looked at: what scales rotary embeddings often leaves their first half as it was.
_LATE = 0.75


def of_model(model: Any, attentions: int, without: Container[str] = ()) -> Fingerprint:
    """Returns a model's fingerprint, with `attentions` of one forward; values `without` some weights'."""
    inner = getattr(model, "_orig_mod", model)
    is_module = isinstance(inner, torch.nn.Module)
    parameters = sorted(inner.named_parameters()) if is_module else []
    tables = [(name, x) for name, x in sorted(inner.named_buffers()) if x.dim() == 1] if is_module else []
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name}{tuple(parameter.shape)};".encode())
    weights = middles((name, p) for name, p in parameters if name not in without)
    return Fingerprint(type(inner).__name__, attentions, digest.hexdigest(), weights, middles(tables, _LATE))


def sequence_hash(ids: Tensor) -> str:
    """Returns the sha256 of one sequence of ids."""
    return hashlib.sha256(str(ids.flatten().tolist()).encode()).hexdigest()


def data_hash(sequences: Iterable[Tensor]) -> str:
    """Returns the sha256 of sequences, in their order."""
    return hashlib.sha256("".join(map(sequence_hash, sequences)).encode()).hexdigest()
