"""Students over borrowed keys: they begin as the layers' own queries, and say what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.calibration.borrowed import Borrowed
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.stages import Stages
from clsa_compile.calibration.trainer import Training
from clsa_compile.errors import OptionError


def make(model: Any, tokens: list[Tensor], training: Training) -> Borrowed:
    given = [ids[None] for ids in tokens[0]]
    return Borrowed(Model(model, given[0], Stages(None)), given, (0, 3), training)


def test_indices_begin_as_their_layers_own_queries(model: Any, tokens: list[Tensor]) -> None:
    student = make(model, tokens, Training(topk=8, query_rate=0.5, head_rate=0.25))
    for number, layer in enumerate((0, 3)):
        own = model.model.layers[layer].self_attn.q_proj.weight
        torch.testing.assert_close(student.tensors[f"{number}.query"], own.detach())
        assert not student.tensors[f"{number}.head"].any()
    assert student.rates() == {
        f"{number}.{name}": rate
        for number in range(2)
        for name, rate in (("query", 0.5), ("head", 0.25), ("bias", 0.25))
    }


def test_its_plan_holds_copies(model: Any, tokens: list[Tensor]) -> None:
    student = make(model, tokens, Training(topk=8))
    plan = student.plan()
    assert plan.pattern() == "ISSIS"
    assert plan.topk == 8
    with torch.no_grad():
        student.tensors["0.query"].zero_()
    assert plan.tensors["0.query"].any()


def test_more_key_heads_than_there_are_is_an_error(model: Any, tokens: list[Tensor]) -> None:
    with pytest.raises(OptionError, match="kv_heads=3, but layer 0 has 2"):
        make(model, tokens, Training(topk=8, kv_heads=3))
