"""Traced: a function whose graphs Dynamo finds once, for backends that take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

__all__ = ["Backend", "Traced"]

Backend = Callable[..., Callable[..., Any]]


class Traced:
    """A function that runs through one backend after the other.

    Tracing a deep model takes longer than most of what is done with its graphs. A graph keeps what the last
    backend made of it, so calls that alternate between two make both again and again.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.graphs = 0
        self._compiled = torch.compile(function, backend=self._found)
        self._backend: Backend | None = None

    def by(self, backend: Backend) -> Callable[..., Any]:
        """Returns the function as `backend` compiles it, until it is asked for by another."""
        self._backend = backend
        return self._compiled

    def _found(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        self.graphs += 1
        maker: Backend | None = None
        made: Callable[..., Any] = gm.forward

        def run(*values: Any) -> Any:
            nonlocal maker, made
            if maker is not self._backend:
                assert self._backend is not None
                maker, made = self._backend, self._backend(gm, inputs)
            return made(*values)

        return run
