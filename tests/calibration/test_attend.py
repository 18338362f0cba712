"""Attention by rows against the contract ops' references: every mask, sinks, softcap, and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clsa_compile.calibration import attend
from clsa_compile.ir.references import (
    attention_mass_reference,
    attention_reference,
    select_topk_reference,
    selected,
    sparse_attention_reference,
)

B, H, HKV, S, D = 2, 4, 2, 20, 8
PACKED = torch.tensor([[0] * 12 + [1] * 8] * B)


def call(**changes: Any) -> list[Any]:
    """The arguments of `clsa::attention`, in its order."""
    generator = torch.Generator().manual_seed(0)
    given = {
        "q": torch.randn(B, H, S, D, generator=generator),
        "k": torch.randn(B, HKV, S, D, generator=generator),
        "v": torch.randn(B, HKV, S, D, generator=generator),
        "mask": None, "bounds": None, "mask_inputs": [], "sinks": None, "scale": 0.3, "softcap": 0.0,
        "predicate": "kv <= q",
    }  # fmt: skip
    return list({**given, **changes}.values())


CASES = {
    "causal": {},
    "causal by position": {"predicate": "(kv <= q) & Eq(in0(0, q), in0(0, kv))", "mask_inputs": [PACKED * 0]},
    "packed": {"predicate": "(kv <= q) & Eq(in0(b, q), in0(b, kv))", "mask_inputs": [PACKED]},
    "open": {"predicate": ""},
    "window": {"predicate": "(kv <= q) & (q - kv < 5)"},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 0.0, 2.0])},
    "boolean": {"mask": torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(1)) > 0.3},
    "additive": {
        "mask": torch.zeros(1, 1, S, S).masked_fill_(torch.ones(S, S).triu(1).bool(), -torch.inf) + 0.1,
        "predicate": "",
    },
    "lowest": {
        "mask": torch.zeros(S, S).masked_fill_(torch.ones(S, S).triu(1).bool(), torch.finfo().min)[
            None, None
        ],
        "predicate": "",
    },
    "other keys": {"k": torch.randn(B, HKV, S + 3, D), "v": torch.randn(B, HKV, S + 3, D)},
}


@pytest.fixture(params=CASES, name="args")
def _args(request: pytest.FixtureRequest) -> list[Any]:
    return call(**CASES[request.param])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "BLOCK", 7 * B * H * S)


def near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_dense_is_the_contract_op(args: list[Any]) -> None:
    near(attend.dense(attend.Masks().operands(args)), attention_reference(*args)[0])


@pytest.mark.parametrize("power", [0.5, 1.0, 0.7])
def test_mass_is_the_contract_ops(args: list[Any], power: float) -> None:
    weight = torch.rand(3, H, generator=torch.Generator().manual_seed(2))
    out, mass = attend.massed(attend.Masks().operands(args), weight, power)
    expected, expected_mass = attention_mass_reference(*args[:3], weight, *args[3:], power)
    near(out, expected)
    near(mass, expected_mass)


def test_mass_of_some_tokens_is_the_contract_ops(args: list[Any]) -> None:
    weight = torch.rand(2, H, generator=torch.Generator().manual_seed(4))
    mass = attention_mass_reference(*args[:3], weight[:1], *args[3:], 1.0)[1]
    indices = select_topk_reference(mass, None, 6, 1, 2)
    chosen = attend.best(mass, 6, 1, 2)
    out, ours = attend.massed(attend.Masks().operands(args), weight, 0.5, chosen)
    expected, theirs = attention_mass_reference(*args[:3], weight, *args[3:], 0.5, indices)
    near(out, expected)
    near(ours, theirs)


@pytest.mark.parametrize("sets", [1, HKV])
def test_sparse_is_the_contract_op(args: list[Any], sets: int) -> None:
    weight = torch.rand(sets, H, generator=torch.Generator().manual_seed(3))
    mass = attention_mass_reference(*args[:3], weight, *args[3:], 1.0)[1]
    indices = select_topk_reference(mass, None, 6, 1, 2)
    chosen = attend.best(mass, 6, 1, 2)
    assert torch.equal(chosen, selected(indices, mass.shape[-1]))
    ours = attend.sparse(attend.Masks().operands(args), chosen)
    near(ours, sparse_attention_reference(*args[:3], indices, *args[3:]))


@pytest.mark.parametrize("name", ["causal", "packed", "softcap", "sinks"])
def test_gradients_are_those_of_the_reference(name: str) -> None:
    both = []
    for compute in (
        lambda args: attend.dense(attend.Masks().operands(args)),
        lambda args: attention_reference(*args)[0],
    ):
        args = call(**CASES[name])
        for x in args[:3]:
            x.requires_grad_()
        compute(args).square().sum().backward()
        both.append([x.grad for x in args[:3]])
    for ours, theirs in zip(*both, strict=True):
        near(ours, theirs)


@pytest.mark.parametrize(
    ("name", "causal"),
    [("causal", True), ("causal by position", True), ("packed", False), ("open", False), ("boolean", False)],
)
def test_masks_are_known_to_be_causal_by_what_they_allow(name: str, causal: bool) -> None:
    assert attend.Masks().operands(call(**CASES[name])).causal is causal


def test_a_mask_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = attend.Masks()
    first = masks.operands(call())
    monkeypatch.setattr(attend, "_is_causal", None)
    assert masks.operands(call()).causal is first.causal


@settings(max_examples=40, deadline=None)
@given(
    topk=st.integers(1, 14),
    ends=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, -torch.inf]), min_size=12, max_size=12),
)
def test_ties_go_to_the_first_token(topk: int, ends: tuple[int, int], values: list[float]) -> None:
    mass = torch.tensor(values).view(1, 1, 1, 12)
    indices = select_topk_reference(mass, None, topk, *ends)
    assert torch.equal(attend.best(mass, topk, *ends), selected(indices, 12))


def test_a_row_without_keys_gives_zeros() -> None:
    args = call(mask=torch.zeros(B, 1, S, S, dtype=torch.bool))
    assert attend.dense(attend.Masks().operands(args)).abs().max() == 0
