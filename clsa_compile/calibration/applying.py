"""Applying: puts weights that `distill` trained for a model's own indexers into the model."""

from __future__ import annotations

import os

import torch
from torch import nn

from clsa_compile.calibration.fingerprint import of_model
from clsa_compile.errors import PlanError
from clsa_compile.ir.sharing import SharingPlan

__all__ = ["apply"]


@torch.no_grad()
def apply(model: nn.Module, plan: SharingPlan | str | os.PathLike[str]) -> None:
    """Puts the weights of a plan, or of its file, into a model's indexers, in place and in their dtypes.

    All of them or none. Key caches that were filled before hold keys of the indexers as they were: fill them
    again. Raises PlanError for a plan without such weights, and for another model's.
    """
    found = plan if isinstance(plan, SharingPlan) else SharingPlan.load(plan)
    if found.kind != "own":
        raise PlanError(
            "this plan holds no weights of a model's own indexers; give it to the backend as it is: "
            'options={"share": plan}'
        )
    inner = getattr(model, "_orig_mod", model)
    parameters = dict(inner.named_parameters())
    if found.model is not None:
        found.check_model(of_model(inner, found.model.layers, found.tensors))
    for name, tensor in found.tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise PlanError(f"the model has no weight {name!r} of shape {list(tensor.shape)}")
    for name, tensor in found.tensors.items():
        parameters[name].copy_(tensor)
