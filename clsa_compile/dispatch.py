"""Contract ops called by themselves: on CUDA tensors they run the generated kernels.

Engines that do not compile their model call `torch.ops.clsa.index_topk`, `.sparse_attention` and `.attention`
directly; importing `clsa_compile` is all they need. On other devices the references run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.library import Library

import clsa_compile.ir.ops  # noqa: F401 (registers the contract ops)
from clsa_compile.errors import MissingTritonError

if TYPE_CHECKING:
    from clsa_compile.ir.variants import Variant

__all__ = ["kernels", "run", "torch_kernels"]

log = logging.getLogger("clsa_compile")

_LIBRARY = Library("clsa", "IMPL")


def kernels() -> tuple[Variant, ...]:
    """Returns every generated kernel. Raises MissingTritonError where Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise MissingTritonError from error
    from clsa_compile.kernels.catalog import VARIANTS

    return VARIANTS


def torch_kernels() -> tuple[Variant, ...]:
    """Returns the variants that call torch's own kernels, on any device; the references do the rest."""
    from clsa_compile.kernels.dense_attention.sdpa import SDPA

    return (SDPA,)


def run(op: str, variants: tuple[Variant, ...], *args: Any) -> Any:
    """Runs a contract op on real tensors by the first variant that can, or by its reference."""
    # Asked for here: who only loads a package does not wait for sympy, which these need.
    from clsa_compile.ir.references import REFERENCES
    from clsa_compile.ir.variants import Facts, select

    schema = getattr(torch.ops.clsa, op).default._schema
    values = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}
    variant, passed_over = select(variants, Facts.of(op, values, lse_used=True))
    if variant is None:
        if passed_over:
            log.debug("clsa: %s runs its reference: %s", op, "; ".join(passed_over))
        return REFERENCES[op](*args)
    if values.get("dense_below"):
        # A kernel takes these bounds as exact, and a caller's may be loose: without any it computes its own.
        args = tuple(None if name == "bounds" else value for name, value in values.items())
    with _made_current(args[0].device):
        return variant.launch(*args, wrap=lambda kernel: kernel)


def _made_current(device: torch.device) -> AbstractContextManager[Any]:
    """Returns a context in which Triton launches on `device`, not on the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _on_cuda(op: str) -> Callable[..., Any]:
    return lambda *args: run(op, kernels(), *args)


for _op in ("attention", "sparse_attention", "index_topk", "attention_mass", "select_topk"):
    _LIBRARY.impl(_op, _on_cuda(_op), "CUDA")
