"""Calls: repeated runs of one call, each with copies of its arguments, and the tensors that they leave."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clsa_compile.checking.traced import Backend, Traced

__all__ = ["Call", "doubled", "tensors"]


@dataclass(slots=True)
class Call:
    """A call that can be repeated: each run gets the same copies of the arguments, filled again.

    A backend that is a function gets the graphs that Dynamo found for the one before it, as long as they fit;
    a name is compiled by itself. Dynamo may remember which tensors it has seen, so copies stay the same.
    """

    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    _copies: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _traced: Traced | None = None

    def run(
        self, backend: str | Backend | None, options: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Returns what a run returns and leaves in its arguments, by name."""
        args, kwargs = self._arguments()
        if backend is None:
            function = self._fresh()
        elif isinstance(backend, str):
            given = None if options is None else dict(options)
            function = torch.compile(self._fresh(), backend=backend, options=given)
        else:
            function = self._trace().by(backend)
        graphs = self._traced.graphs if self._traced else 0
        with torch.no_grad():
            result = function(*args, **kwargs)
        if self._traced and graphs and self._traced.graphs > graphs:
            self._traced = None  # graphs did not fit; a function has few of them before Dynamo gives it up
        named = (*tensors(result, "output"), *tensors(kwargs, ""), *tensors(args, "argument"))
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in named:
            if tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                found[name] = tensor.detach().clone()
        return found

    def _arguments(self) -> tuple[Any, Any]:
        """Returns copies: containers and objects are new ones, the tensors in them those of the last run."""
        given = self.args, dict(self.kwargs)
        memo: dict[int, Any] = {key: mine for key, (_, mine) in self._copies.items()}
        for original, mine in self._copies.values():
            mine.untyped_storage().copy_(original.untyped_storage())
        args, kwargs = copy.deepcopy(given, memo)
        self._copies = {id(x): (x, memo[id(x)]) for _, x in tensors(given, "")}
        return args, kwargs

    def _trace(self) -> Traced:
        if self._traced is None:
            self._traced = Traced(self._fresh())
        return self._traced

    def _fresh(self) -> Callable[..., Any]:
        """Returns a function with code of its own: Dynamo's cache of the model stays as it is."""
        model = self.model

        def call(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        code = call.__code__.replace(co_name="checked")
        return types.FunctionType(code, globals(), "checked", None, call.__closure__)


def tensors(value: Any, name: str, depth: int = 8) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) of all tensors in containers and in objects such as caches."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if depth == 0 or isinstance(value, nn.Module | type | types.FunctionType | str | bytes):
        return
    if isinstance(value, Mapping):
        parts = [(f"{name}.{key}".lstrip("."), part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{name}[{i}]", part) for i, part in enumerate(value)]
    else:
        parts = [(f"{name}.{key}".lstrip("."), part) for key, part in getattr(value, "__dict__", {}).items()]
    for part_name, part in parts:
        yield from tensors(part, part_name, depth - 1)


def doubled(model: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Returns copies of a model and of what it is called with, in float64."""
    model, args, kwargs = copy.deepcopy((model, args, dict(kwargs)))
    if isinstance(model, nn.Module):
        model = model.double()
    return model, _converted(args), _converted(kwargs)


def _converted(value: Any, depth: int = 8) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if depth == 0 or isinstance(value, nn.Module | type | types.FunctionType | str | bytes):
        return value
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, dict):
        for key, part in value.items():
            value[key] = _converted(part, depth - 1)
    elif isinstance(value, list):
        value[:] = [_converted(part, depth - 1) for part in value]
    elif isinstance(value, tuple):
        return tuple(_converted(part, depth - 1) for part in value)
    elif hasattr(value, "__dict__"):
        for key, part in vars(value).items():
            setattr(value, key, _converted(part, depth - 1))
    return value
