"""What a search and an evaluation are given: a model, whose forward is captured, a plan, and tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from clsa_compile.backend import requested
from clsa_compile.calibration.fingerprint import check, of_model
from clsa_compile.calibration.graphs import Forward, fitting
from clsa_compile.calibration.stages import Stages
from clsa_compile.config import Options
from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import Request
from clsa_compile.ir.sharing import SharingPlan

__all__ = ["MARGIN", "Model", "Planned", "asked", "sequences", "too_short"]

# A sequence must have this many tokens more than are selected: with fewer, nothing is left out.
MARGIN = 16

# A plan, its file, or options of the backend.
Planned = SharingPlan | str | os.PathLike[str] | Mapping[str, Any]


class Model:
    """A model with its captured forwards, one a length, and the folder in which results are kept."""

    def __init__(self, model: Any, first: Tensor, stages: Stages) -> None:
        self.model = model
        self.stages = stages
        self.device = _first(model).device
        self._forwards: dict[int, Forward] = {}
        forward = self.forward(first)
        self.layers = forward.layers
        self.fingerprint = of_model(model, forward.attentions)
        # What results depend on besides the tokens: another dtype or device rounds in another way.
        self.key = [asdict(self.fingerprint), str(_first(model).dtype), self.device.type]

    def forward(self, ids: Tensor) -> Forward:
        """Returns the forward for the length of ids [1, T]."""
        length = ids.shape[1]
        if length not in self._forwards:
            self._forwards[length] = fitting(self.model, ids.to(self.device))
        return self._forwards[length]

    def check(self, options: Options) -> None:
        """Raises PlanError where the options hold a plan for another model."""
        if isinstance(options.share, SharingPlan):
            check(options.share, self.fingerprint)


def asked(plan: Planned) -> tuple[Options, int, Request]:
    """Returns the options of what is to be measured, its topk, and its request with sparse prompts.

    Raises OptionError for options that cannot be, and for those that leave dense layers as they are.
    """
    options = Options.read(plan if isinstance(plan, Mapping) else {"share": plan})
    request = requested(options)
    if request is None or options.topk is None:
        raise OptionError("there is nothing to measure without 'topk', or a plan that brings it")
    return options, options.topk, replace(request, prompts=True)


def sequences(batches: Any, topk: int) -> list[Tensor]:
    """Returns ids [1, T] of batches of ids. Raises OptionError for none, and for those that are too short."""
    parts = [batches] if isinstance(batches, Tensor) else list(batches)
    found = []
    for i, part in enumerate(parts):
        ids = part if isinstance(part, Tensor) else torch.as_tensor(part)
        if ids.dim() not in (1, 2) or ids.is_floating_point():
            raise OptionError(
                f"batch {i} is {ids.dtype} of shape {list(ids.shape)}; expected token ids [B, T] or [T]"
            )
        found += list(ids.reshape(-1, ids.shape[-1]).long().split(1)) if ids.numel() else []
    if not found:
        raise OptionError("there are no tokens: give batches of ids [B, T], text of several kinds")
    shortest = min(ids.shape[1] for ids in found)
    if shortest < topk + MARGIN:
        raise too_short(shortest, topk)
    return found


def too_short(length: int, topk: int) -> OptionError:
    """Returns what is said of a sequence of fewer than topk + MARGIN tokens."""
    return OptionError(
        f"a sequence of {length} tokens is too short for topk={topk}: next to nothing would be left "
        f"out; give {topk + MARGIN} at least, better {4 * topk}"
    )


def _first(model: Any) -> Tensor:
    """Returns a model's first weight, a number on the CPU for a model without any."""
    found = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    return torch.zeros(()) if found is None else found
