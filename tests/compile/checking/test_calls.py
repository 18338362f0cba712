"""checking/calls.py: names of tensors in what a call is given and gives, and copies in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from clsa_compile.checking.calls import Call, doubled, tensors

ONE = torch.ones(2)


def test_tensors_in_containers_and_objects_have_names() -> None:
    layer = SimpleNamespace(keys=ONE, size=3)
    value = {"a": [ONE, (ONE,)], "cache": SimpleNamespace(layers=[layer]), "model": nn.Linear(2, 2), "s": "x"}
    assert [n for n, _ in tensors(value, "")] == ["a[0]", "a[1][0]", "cache.layers[0].keys"]
    assert [n for n, _ in tensors(value["cache"], "kept")] == ["kept.layers[0].keys"]


def test_an_object_in_a_circle_ends() -> None:
    circle: Any = SimpleNamespace(x=ONE)
    circle.itself = circle
    assert next(tensors(circle, ""))[0] == "x"
    assert len(list(tensors(circle, ""))) < 20


def test_copies_are_in_float64_and_the_originals_stay() -> None:
    model = nn.Linear(2, 2)
    cache = SimpleNamespace(keys=ONE, length=torch.tensor(3), dtype=torch.bfloat16, kinds=(ONE,))
    twice, (first, other), kwargs = doubled(model, (ONE, cache), {"flag": True})
    assert (twice.weight.dtype, model.weight.dtype) == (torch.float64, torch.float32)
    assert (first.dtype, other.keys.dtype, other.kinds[0].dtype) == (torch.float64,) * 3
    assert (other.length.dtype, other.dtype) == (torch.int64, torch.float64)
    assert cache.keys.dtype == torch.float32
    assert kwargs == {"flag": True}


def test_every_run_starts_from_the_same_arguments() -> None:
    def count(state: list[torch.Tensor]) -> torch.Tensor:
        state[0].add_(1)
        return state[0] * 2

    state = [torch.zeros(2)]
    call = Call(count, (state,), {})
    for _ in range(2):
        found = call.run(None)
        assert found["output"].tolist() == [2, 2]
        assert found["argument[0][0]"].tolist() == [1, 1]
    assert state[0].tolist() == [0, 0]
