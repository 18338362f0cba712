"""Fingerprints: other weights and other tokens are told apart, another dtype is not."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from clsa_compile.calibration.finding import Found
from clsa_compile.calibration.fingerprint import data_hash, of_model, sequence_hash
from clsa_compile.errors import PlanError
from clsa_compile.testing import tiny


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_the_same_model(model: Any, dtype: torch.dtype) -> None:
    ours = of_model(model, 5)
    assert ours.difference(of_model(copy.deepcopy(model).to(dtype), 5)) == ""
    assert ours == of_model(torch.compile(model), 5)


def test_other_weights_are_another_model(model: Any) -> None:
    ours = of_model(model, 5)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * torch.randn_like(weight)
    assert ours.difference(of_model(other, 5)).startswith("its weights are others, as ")
    assert "its parameters" in ours.difference(of_model(tiny("llama"), 5))
    assert ours.name == "LlamaForCausalLM"


def test_one_kind_of_weights_or_another_rope_is_another_model() -> None:
    """Also with 32 layers, where every so many weights are of one kind."""
    ours = tiny("llama", num_hidden_layers=32, hidden_size=16, intermediate_size=16)
    known = of_model(ours, 32)
    for kind in ("mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "lm_head"):
        other = copy.deepcopy(ours)
        with torch.no_grad():
            for name, weight in other.named_parameters():
                weight.mul_(1.5 if kind in name else 1)
        assert "its weights are others" in known.difference(of_model(other, 32)), kind
    for rope in ({"rope_theta": 20000.0, "rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}):
        given = {"rope_theta": 10000.0, **rope}
        twin = tiny(
            "llama", num_hidden_layers=32, hidden_size=16, intermediate_size=16, rope_parameters=given
        )
        assert known.difference(of_model(twin, 32)).endswith("inv_freq"), rope


def test_a_plan_of_another_model_is_an_error(found: Found) -> None:
    plan = found.plan
    assert plan.model is not None
    plan.check_model(plan.model)
    with pytest.raises(
        PlanError, match="for another model than this one: it has 6 attentions, the plan's has 5"
    ):
        plan.check_model(replace(plan.model, layers=6))


def test_tokens_are_told_apart() -> None:
    ids = torch.arange(6)
    assert sequence_hash(ids) == sequence_hash(ids.view(1, 6).int())
    assert data_hash([ids[:3], ids[3:]]) != data_hash([ids[3:], ids[:3]])
