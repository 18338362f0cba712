"""Frees the weights that nothing reads under a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clsa_compile.errors import OptionError, StrippedError


def strip(model: nn.Module, idle: Iterable[str]) -> int:
    """Frees the parameters with these paths; returns how many bytes.

    They keep shape and dtype, and hold one NaN. The modules that had them raise StrippedError when they run
    eagerly; compiled with the plan that they were stripped for, nothing reads them. Raises OptionError where
    a path is not a parameter of the model, before anything is freed.
    """
    found = [_find(model, path) for path in idle]
    freed = 0
    for module, name in found:
        weight = module._parameters[name]
        if weight is None or is_stripped(weight):
            continue
        freed += weight.numel() * weight.element_size()
        hole = torch.full((1,) * weight.dim(), math.nan, dtype=weight.dtype, device=weight.device)
        module._parameters[name] = nn.Parameter(hole.expand(weight.shape), requires_grad=False)
        module.register_forward_pre_hook(_refuse)
    return freed


def is_stripped(weight: Tensor) -> bool:
    """Tells whether a parameter was freed: it has a shape and no memory."""
    return weight.numel() > 1 and not any(weight.stride())


def _find(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, name = path.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        module = nn.Module()
    if module._parameters.get(name) is None:
        raise OptionError(f"the model has no parameter {path!r}: the plan is of another model")
    return module, name


def _refuse(module: nn.Module, inputs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    raise StrippedError(type(module).__name__)
