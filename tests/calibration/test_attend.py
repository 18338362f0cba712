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
    index_topk_reference,
    select_topk_reference,
    selected,
    sparse_attention_reference,
)
from clsa_compile.ir.scores import parse_score

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


def whole(mass: attend.Mass) -> Tensor:
    return torch.cat(list(mass.blocks()), 2)


@pytest.fixture(params=["held", "computed again"], name="held")
def _held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param != "held":
        monkeypatch.setattr(attend, "HELD", 0)
    return request.param == "held"


@pytest.mark.parametrize("power", [0.5, 1.0, 0.7])
def test_mass_is_the_contract_ops(args: list[Any], power: float, held: bool) -> None:
    weight = torch.rand(3, H, generator=torch.Generator().manual_seed(2))
    out, mass = attend.massed(attend.Masks().operands(args), weight, power)
    expected, expected_mass = attention_mass_reference(*args[:3], weight, *args[3:], power)
    near(out, expected)
    near(whole(mass), expected_mass)
    assert (mass.held is not None) is held


def test_mass_of_some_tokens_is_the_contract_ops(args: list[Any], held: bool) -> None:
    weight = torch.rand(2, H, generator=torch.Generator().manual_seed(4))
    mass = attention_mass_reference(*args[:3], weight[:1], *args[3:], 1.0)[1]
    indices = select_topk_reference(mass, None, 6, 1, 2)
    among = attend.Chosen(indices, mass.shape[-1])
    out, ours = attend.massed(attend.Masks().operands(args), weight, 0.5, among)
    expected, theirs = attention_mass_reference(*args[:3], weight, *args[3:], 0.5, indices)
    near(out, expected)
    near(whole(ours), theirs)
    assert (ours.held is not None) is held


def test_sets_of_mass_are_added_up_over_layers_and_chosen_by(args: list[Any], held: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(3, H, generator=generator), torch.rand(2, H, generator=generator)
    layers = args, [torch.randn(args[0].shape, generator=generator), *args[1:]]
    masks = attend.Masks()
    found = [
        attend.massed(masks.operands(layer), weight, 0.5)[1]
        for layer, weight in zip(layers, weights, strict=True)
    ]
    total = found[0].sets(1, 3) + found[1]
    expected = sum(
        attention_mass_reference(*layer[:3], weight, *layer[3:], 0.5)[1]
        for layer, weight in zip(layers, (weights[0][1:], weights[1]), strict=True)
    )
    near(whole(total), expected)
    assert (total.held is not None) is held
    keys = expected.shape[-1]
    for topk in (6, keys, keys + 4):
        chosen = attend.selection(total, topk, 1, 2)
        assert chosen.dtype == torch.int32
        assert torch.equal(chosen, select_topk_reference(whole(total), None, min(topk, keys), 1, 2))


def test_mass_that_is_held_for_some_layers_only_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    operands, weight = attend.Masks().operands(call()), torch.rand(2, H)
    small = attend.massed(operands, weight, 0.5)[1]
    monkeypatch.setattr(attend, "HELD", 0)
    total = small + attend.massed(operands, weight, 0.5)[1]
    assert total.held is None
    near(whole(total), 2 * whole(small))


@pytest.mark.parametrize("sets", [1, HKV])
def test_sparse_is_the_contract_op(args: list[Any], sets: int) -> None:
    weight = torch.rand(sets, H, generator=torch.Generator().manual_seed(3))
    mass = attention_mass_reference(*args[:3], weight, *args[3:], 1.0)[1]
    indices = select_topk_reference(mass, None, 6, 1, 2)
    chosen = attend.best(mass, 6, 1, 2)
    assert torch.equal(chosen, selected(indices, mass.shape[-1]))
    ours = attend.sparse(attend.Masks().operands(args), attend.Chosen(indices, mass.shape[-1]))
    near(ours, sparse_attention_reference(*args[:3], indices, *args[3:]))


@pytest.mark.parametrize("name", ["causal", "packed", "window", "open"])
def test_rows_of_few_tokens_read_all_of_them(name: str) -> None:
    args = call(**CASES[name])
    mass = attention_mass_reference(*args[:3], torch.ones(1, H), *args[3:], 1.0)[1]
    indices = select_topk_reference(mass, None, 3, 0, 0)
    operands = attend.Masks().operands(args)
    ours = attend.sparse(operands, attend.AllBelow(attend.Chosen(indices, S), operands, 6))
    near(ours, sparse_attention_reference(*args[:3], indices, *args[3:], None, 6))


@pytest.mark.parametrize("text", ["sum: weight*Max(0, dot)", "sum: exp(dot + weight)"])
def test_an_index_chooses_what_the_contract_op_does(args: list[Any], text: str) -> None:
    q, k, _, mask, bounds, inputs, _, scale, _, predicate = args
    k, weight = k[:, :1], torch.rand(B, H, S, generator=torch.Generator().manual_seed(6))
    operands = attend.Masks().operands((q, k, k, mask, None, inputs, None, scale, 0.0, predicate))
    for topk in (5, k.shape[2]):
        ours = attend.indexed(operands, weight, None, parse_score(text), topk)
        theirs = index_topk_reference(
            q, k, weight, None, mask, bounds, inputs, topk, scale, text, predicate, False
        )
        assert torch.equal(ours, theirs)
    readable = attend.Readable(operands).of(torch.arange(3, 9))
    assert torch.equal(readable, selected(theirs, k.shape[2])[:, :, 3:9]), "all that may be selected"


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
    chosen = attend.best(mass, topk, *ends)
    assert torch.equal(chosen, selected(indices, 12))
    assert torch.equal(attend.positions(chosen, topk), indices[..., :12])


def test_a_row_without_keys_gives_zeros() -> None:
    args = call(mask=torch.zeros(B, 1, S, S, dtype=torch.bool))
    assert attend.dense(attend.Masks().operands(args)).abs().max() == 0
