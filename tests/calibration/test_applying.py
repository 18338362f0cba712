"""Applying: all weights or none, in the model's dtypes; another model and another kind of plan are errors."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clsa_compile
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.own import Own
from clsa_compile.calibration.stages import Stages
from clsa_compile.calibration.trainer import Training
from clsa_compile.errors import PlanError
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.testing import tiny


@pytest.fixture(scope="module")
def plan(tokens: list[Tensor]) -> SharingPlan:
    model = tiny("deepseek_v32")
    known = Model(model, tokens[0][:1], Stages(None))
    student = Own(known, [tokens[0][:1]], Training(topk=8))
    with torch.no_grad():
        for tensor in student.tensors.values():
            tensor += 0.5
    return student.plan()


def test_weights_are_put_into_the_model_once_and_again(plan: SharingPlan, tmp_path: Path) -> None:
    model = tiny("deepseek_v32")
    others = {n: p.detach().clone() for n, p in model.named_parameters() if n not in plan.tensors}
    plan.save(tmp_path / "plan.json")
    for given in (plan, tmp_path / "plan.json"):
        clsa_compile.apply(model, given)
        held = dict(model.named_parameters())
        assert all(torch.equal(held[name], tensor) for name, tensor in plan.tensors.items())
    assert all(torch.equal(held[name], tensor) for name, tensor in others.items())


def test_weights_take_the_dtype_of_the_model(plan: SharingPlan) -> None:
    model = tiny("deepseek_v32").to(torch.bfloat16)
    clsa_compile.apply(model, plan)
    name, tensor = next(iter(plan.tensors.items()))
    assert torch.equal(dict(model.named_parameters())[name], tensor.bfloat16())


def test_a_compiled_model_is_the_model(plan: SharingPlan) -> None:
    model = tiny("deepseek_v32")
    clsa_compile.apply(torch.compile(model, backend="clsa"), plan)
    name, tensor = next(iter(plan.tensors.items()))
    assert torch.equal(dict(model.named_parameters())[name], tensor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 96}, "its parameters have other names or shapes"),
        ({"num_hidden_layers": 3}, "its parameters have other names or shapes"),
    ],
)
def test_another_model_is_an_error_and_stays(
    changes: dict[str, Any], message: str, plan: SharingPlan
) -> None:
    model = tiny("deepseek_v32", **changes)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(PlanError, match=re.escape(message)):
        clsa_compile.apply(model, plan)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_missing_weight_leaves_the_others(plan: SharingPlan) -> None:
    """A plan without a fingerprint: names and shapes alone decide."""
    model = tiny("deepseek_v32")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loose = replace(plan, model=None, tensors={**plan.tensors, "model.nothing": torch.ones(3)})
    with pytest.raises(PlanError, match=re.escape("the model has no weight 'model.nothing' of shape [3]")):
        clsa_compile.apply(model, loose)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_other_weights_are_an_error(plan: SharingPlan) -> None:
    model = tiny("deepseek_v32")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    with pytest.raises(PlanError, match="its weights are others"):
        clsa_compile.apply(model, plan)


def test_a_plan_that_the_backend_takes_is_an_error(plan: SharingPlan) -> None:
    with pytest.raises(PlanError, match=re.escape('options={"share": plan}')):
        clsa_compile.apply(tiny("deepseek_v32"), replace(plan, kind="index", tensors={}, weights=""))
