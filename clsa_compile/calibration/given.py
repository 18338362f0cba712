"""What a search and an evaluation are given: a model, whose forward is captured, and sequences of tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from clsa_compile.calibration.fingerprint import of_model
from clsa_compile.calibration.graphs import Forward, fitting
from clsa_compile.calibration.stages import Stages
from clsa_compile.errors import OptionError

__all__ = ["Model", "sequences"]

# A sequence must have this many tokens more than are selected: with fewer, nothing is left out.
MARGIN = 16


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
        raise OptionError(
            f"a sequence of {shortest} tokens is too short for topk={topk}: next to nothing would be left "
            f"out; give {topk + MARGIN} at least, better {4 * topk}"
        )
    return found


def _first(model: Any) -> Tensor:
    """Returns a model's first weight, a number on the CPU for a model without any."""
    found = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    return torch.zeros(()) if found is None else found
