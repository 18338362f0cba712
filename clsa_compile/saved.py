"""Saved: a compiled graph as `torch.compile(...).aot_compile(...)` writes it and another process loads it.

torch's own class for this also writes down the Triton kernels that were traced, to be imported by name where
they are loaded. Ours are generated, lie in no module, and are part of the compiled code already.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.aot_compile_types import SerializableCallable

__all__ = ["Saved", "saveable"]


class Saved(SerializableCallable):
    """A compiled graph that can be written. Loading it unpickles: load what is trusted."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self._compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph."""
        return self._compiled(*args, **kwargs)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Saved) -> bytes:
        """Returns the graph as bytes."""
        compiled: Any = fn._compiled
        with torch._functorch.config.patch("bundled_autograd_cache", True):
            return pickle.dumps(compiled.serialize())

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Saved:
        """Returns a graph that was written; nothing is compiled."""
        from torch._functorch._aot_autograd.aot_autograd_result import deserialize_bundled_cache_entry

        return cls(deserialize_bundled_cache_entry(pickle.loads(data)))


def saveable(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a compiled graph as one that can be written, where torch asks for that."""
    wanted = torch._functorch.config.bundled_autograd_cache and hasattr(compiled, "serialize")
    return Saved(compiled) if wanted else compiled
