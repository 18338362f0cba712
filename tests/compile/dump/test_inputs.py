"""Recipes of inputs: what they make is like what came, and keeps no contents but masks and positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.config import Options
from clsa_compile.dump.inputs import recipe
from clsa_compile.dump.repro import _TEXT, repro
from clsa_compile.ir.captured import Captured


def made(value: Any) -> Any:
    """Runs the recipe of a value as a script would."""
    namespace: dict[str, Any] = {}
    text = _TEXT.format(options="{}", imports="", inputs=f"        {recipe(value, value)},", graph="")
    exec(text.partition("def tensors")[0], namespace)
    (result,) = namespace["inputs"]()
    return result


EXACT = {
    "positions": torch.arange(3, 9),
    "positions of a batch": torch.arange(4).repeat(2, 1),
    "one position": torch.tensor([17]),
    "a length": torch.tensor(5),
    "constants": torch.full((2, 3), -1, dtype=torch.int32),
    "counting down": torch.arange(6, 0, -2, dtype=torch.int32),
    "a boolean mask": torch.ones(5, 5).tril().bool(),
    "a mask of integers": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    "an additive mask": torch.where(torch.ones(4, 4).tril() > 0, 0.0, -torch.inf).to(torch.bfloat16),
    "a mask with the least number": torch.tensor([0.0, torch.finfo(torch.float32).min]),
    "zeros": torch.zeros(2, 3),
    "nothing": torch.empty(0, 4),
    "expanded": torch.arange(4)[None].expand(3, 4),
    "transposed": torch.ones(5, 5).tril().bool().mT,
}


@pytest.mark.parametrize("name", list(EXACT))
def test_masks_and_positions_are_kept(name: str) -> None:
    value = EXACT[name]
    again = made(value)
    assert torch.equal(again, value)
    assert (again.dtype, again.stride()) == (value.dtype, value.stride())


LIKE = [
    torch.randn(64, 64) * 0.1 + 3,
    torch.randn(8, 16, dtype=torch.bfloat16).mT,
    torch.randn(4, 1, 8).expand(4, 6, 8),
    torch.nn.Parameter(torch.randn(3, 3), requires_grad=False),
    torch.randn(6, 8)[1:4, ::2],
]


@pytest.mark.parametrize("value", LIKE)
def test_floats_are_random_and_alike(value: Tensor) -> None:
    again = made(value)
    assert (again.shape, again.stride(), again.dtype) == (value.shape, value.stride(), value.dtype)
    assert not torch.equal(again, value)
    assert abs(again.double().mean() - value.double().mean()) < 1
    assert torch.equal(again, made(value)), "with a fixed seed"


def test_tokens_stay_in_their_range_and_are_not_kept() -> None:
    tokens = torch.tensor([[3, 99, 41, 7, 23, 5, 61, 88]])
    again = made(tokens)
    assert 3 <= int(again.min()) <= int(again.max()) <= 99
    assert not torch.equal(again, tokens)


def test_what_is_no_plain_tensor_is_made_from_its_metadata() -> None:
    assert made(7) == 7
    assert made(True) is True
    meta = torch.empty(2, 3, dtype=torch.int64, device="meta")
    assert recipe(meta, meta) == "tensor(full(6, 0), (2, 3), torch.int64, device='meta')"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint32, torch.int8, torch.float8_e4m3fn])
def test_every_dtype_has_a_recipe(dtype: torch.dtype) -> None:
    value = torch.arange(1, 9).to(dtype).reshape(2, 4)
    again = made(value)
    assert (again.shape, again.dtype) == (value.shape, value.dtype)


def test_options_are_those_of_the_compile(tmp_path: Any) -> None:
    graph = torch.fx.Graph()
    graph.output(())
    captured = Captured(torch.fx.GraphModule({}, graph), None, "dynamo")  # type: ignore[arg-type]
    options = Options.read(
        {"dump": "here", "mode": "max-autotune", "inductor": {"a": 1, "b": print}, "skip": "tables,layers.0"}
    )
    text = repro(captured, [], options)
    kept = {"inductor": {"a": 1}, "mode": "max-autotune", "skip": ("tables", "layers.0")}
    assert f"OPTIONS = {kept}\n" in text
