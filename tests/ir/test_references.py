"""The references against naive float64 loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clsa_compile.ir.ops import DECODE_ROWS
from clsa_compile.ir.references import (
    REFERENCES,
    attend_mask,
    attention_mass_reference,
    attention_reference,
    index_topk_reference,
    mask_bounds_reference,
    select_topk_reference,
    selected,
    sparse_attention_reference,
)
from clsa_compile.ir.scores import SCORES

Draw = Any
LOWEST = torch.finfo(torch.float32).min


# -- naive loops in float64 --------------------------------------------------------------------------


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attention one row at a time; a row without keys gives zeros and -inf."""
    b, h, s, _ = q.shape
    group = h // k.shape[1]
    out = torch.zeros(b, h, s, v.shape[3], dtype=torch.float64)
    lse = torch.full((b, h, s), -math.inf, dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            for r in range(s):
                keys = [t for t in range(k.shape[2]) if allowed[i, j, r, t]]
                scores = []
                for t in keys:
                    dot = float(q[i, j, r].double() @ k[i, j // group, t].double()) * scale
                    dot = math.tanh(dot / softcap) * softcap if softcap else dot
                    scores.append(dot + (0.0 if bias is None else float(bias[i, j, r, t])))
                # The lowest value weighs nothing beside any other: left out, as -inf is.
                kept = [(t, x) for t, x in zip(keys, scores, strict=True) if x > LOWEST / 2]
                if not kept:
                    continue
                total = sum(math.exp(x) for _, x in kept)
                lse[i, j, r] = math.log(total)
                if sinks is not None:
                    total += math.exp(float(sinks[j]))
                for t, x in kept:
                    out[i, j, r] += math.exp(x) / total * v[i, j // group, t].double()
    return out, lse


@st.composite
def cases(draw: Draw) -> dict[str, Any]:
    """Draws operands, and a mask in one of its forms."""
    b, hkv = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    h = hkv * draw(st.integers(1, 3))
    s = draw(st.sampled_from([1, 2, DECODE_ROWS + 1]))
    t, d, dv = draw(st.integers(1, 7)), draw(st.sampled_from([1, 4])), draw(st.sampled_from([1, 3]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 5)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    form = draw(st.sampled_from(["none", "boolean", "additive", "lowest"]))
    broad = [draw(st.booleans()) for _ in range(4)]
    shape = [n if keep else 1 for n, keep in zip((b, h, s, t), broad, strict=True)]
    coin = torch.rand(shape, generator=g) > 0.4
    mask = {
        "none": None,
        "boolean": coin,
        "additive": torch.where(coin, normal(*shape), -math.inf),
        "lowest": torch.where(coin, 0.0, LOWEST),
    }[form]
    predicate = draw(st.sampled_from(["", "kv <= q + in0(b)", "Ne(in1(b, kv), 0)", "kv > h - 1"]))
    inputs = [torch.randint(0, t + 1, (b,), generator=g), torch.rand(b, t, generator=g) > 0.3]
    return {
        "q": normal(b, h, s, d), "k": normal(b, hkv, t, d), "v": normal(b, hkv, t, dv),
        "mask": mask, "inputs": inputs, "predicate": predicate,
        "sinks": normal(h) if draw(st.booleans()) else None,
        "scale": draw(st.sampled_from([0.3, 1.0])), "softcap": draw(st.sampled_from([0.0, 2.0])),
    }  # fmt: skip


def sizes_of(case: dict[str, Any]) -> tuple[int, int, int, int]:
    b, h, s, _ = case["q"].shape
    return b, h, s, case["k"].shape[2]


def meaning(case: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Returns what a case's masks allow, elementwise, and its bias: written out, not by attend_mask."""
    b, h, s, t = sizes = sizes_of(case)
    allowed = torch.ones(sizes, dtype=torch.bool)
    start, kept = case["inputs"]
    for i in range(b):
        for j in range(h):
            for r in range(s):
                for x in range(t):
                    allowed[i, j, r, x] = {
                        "": True,
                        "kv <= q + in0(b)": x <= r + int(start[i]),
                        "Ne(in1(b, kv), 0)": bool(kept[i, x]),
                        "kv > h - 1": x > j - 1,
                    }[case["predicate"]]
    mask = case["mask"]
    if mask is None:
        return allowed, None
    if mask.dtype == torch.bool:
        return allowed & mask, None
    return allowed, mask.expand(sizes)


def compare_rows(actual: Tensor, expected: Tensor, rows: Tensor) -> None:
    """Compares rows [B, H, S]; a row whose bias is the lowest value throughout is free."""
    torch.testing.assert_close(actual[rows].double(), expected[rows], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(actual).all()


@given(case=cases())
def test_attention_equals_the_naive_loop(case: dict[str, Any]) -> None:
    allowed, bias = meaning(case)
    out, lse = attention_reference(
        case["q"], case["k"], case["v"], case["mask"], None, case["inputs"], case["sinks"],
        case["scale"], case["softcap"], case["predicate"],
    )  # fmt: skip
    wanted, wanted_lse = naive(
        case["q"], case["k"], case["v"], allowed, bias, case["sinks"], case["scale"], case["softcap"]
    )
    # A row where only the lowest value is left is padding: eager gives the mean of V there.
    real = (allowed & (bias > LOWEST) if bias is not None else allowed).any(-1)
    none = ~allowed.any(-1) if bias is None else ~(allowed & (bias > -math.inf)).any(-1)
    compare_rows(out, wanted, real)
    torch.testing.assert_close(lse[real].double(), wanted_lse[real], atol=1e-5, rtol=1e-5)
    assert not out[none].any()
    assert (lse[none] == -math.inf).all()


@given(case=cases(), data=st.data())
def test_sparse_attention_equals_the_naive_loop_over_its_indices(case: dict[str, Any], data: Any) -> None:
    b, h, s, t = sizes_of(case)
    per_head = data.draw(st.booleans()) and case["k"].shape[1]
    k = data.draw(st.integers(1, t + 2))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 5)))
    rows = torch.rand(b, per_head or 1, s, t + 2, generator=g).argsort(-1)[..., :k]
    indices = torch.where(rows < t, rows, -1).to(torch.int32)
    named = torch.zeros(b, per_head or 1, s, t, dtype=torch.bool)
    for place in torch.nonzero(indices >= 0).tolist():
        i, j, r, _ = place
        named[i, j, r, int(indices[tuple(place)])] = True
    assert torch.equal(selected(indices, t), named)
    allowed, bias = meaning(case)
    allowed = allowed & named.repeat_interleave(h // named.shape[1], 1)
    out = sparse_attention_reference(
        case["q"], case["k"], case["v"], indices, case["mask"], None, case["inputs"],
        case["sinks"], case["scale"], case["softcap"], case["predicate"],
    )  # fmt: skip
    wanted, _ = naive(
        case["q"], case["k"], case["v"], allowed, bias, case["sinks"], case["scale"], case["softcap"]
    )
    real = (allowed & (bias > LOWEST) if bias is not None else allowed).any(-1)
    none = ~allowed.any(-1) if bias is None else ~(allowed & (bias > -math.inf)).any(-1)
    compare_rows(out, wanted, real)
    assert not out[none].any()


@given(case=cases())
def test_bounds_hold_every_key_that_a_row_may_read(case: dict[str, Any]) -> None:
    b, h, s, t = sizes_of(case)
    allowed, bias = meaning(case)
    if bias is not None:
        allowed = allowed & (bias > LOWEST)
    bounds = mask_bounds_reference(case["q"], case["mask"], case["inputs"], h, t, case["predicate"])
    assert bounds.dtype == torch.int32
    assert bounds.shape == (b, s, 2)
    for i in range(b):
        for r in range(s):
            keys = torch.nonzero(allowed[i, :, r].any(0)).flatten()
            tight = (int(keys[0]), int(keys[-1]) + 1) if len(keys) else (0, 0)
            assert tuple(bounds[i, r].tolist()) == tight


@given(case=cases(), power=st.sampled_from([1.0, 0.5]), sets=st.integers(1, 3))
def test_mass_is_what_heads_looked_at(case: dict[str, Any], power: float, sets: int) -> None:
    b, h, s, t = sizes_of(case)
    weight = torch.rand(sets, h, generator=torch.Generator().manual_seed(1))
    tail = (
        case["mask"], None, case["inputs"], case["sinks"], case["scale"], case["softcap"], case["predicate"]
    )  # fmt: skip
    out, mass = attention_mass_reference(case["q"], case["k"], case["v"], weight, *tail, power)
    dense, _ = attention_reference(case["q"], case["k"], case["v"], *tail)
    assert torch.equal(out, dense)
    assert mass.shape == (b, sets, s, t)
    every = torch.arange(t, dtype=torch.int32).expand(b, 1, s, t)
    some = every.masked_fill(torch.arange(t) % 3 == 1, -1)
    for read in (every, some):
        only, seen = attention_mass_reference(case["q"], case["k"], case["v"], weight, *tail, power, read)
        sparse = sparse_attention_reference(case["q"], case["k"], case["v"], read, *tail)
        torch.testing.assert_close(only, sparse, atol=1e-5, rtol=1e-4)
        assert ((seen > -math.inf) == ((mass > -math.inf) & (read >= 0))).all()
    assert torch.equal(
        attention_mass_reference(case["q"], case["k"], case["v"], weight, *tail, power, every)[1], mass
    )
    # Values that are one-hot over keys give the probabilities back.
    onehot = torch.eye(t).expand(b, case["k"].shape[1], t, t)
    seen, _ = attention_reference(case["q"], case["k"], onehot, *tail)
    wanted = torch.stack([(seen**power * row[None, :, None, None]).sum(1) for row in weight], 1)
    allowed, bias = meaning(case)
    readable = (allowed if bias is None else allowed & (bias > LOWEST)).any(1)
    for n in range(sets):
        torch.testing.assert_close(mass[:, n][readable], wanted[:, n][readable], atol=1e-5, rtol=1e-4)
        assert (mass[:, n][~readable] == -math.inf).all()


@given(data=st.data())
def test_selected_are_both_ends_and_the_largest_mass(data: Any) -> None:
    t = data.draw(st.integers(1, 12))
    first, last = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    topk = data.draw(st.integers(max(1, first + last), 14))
    values = st.sampled_from([-math.inf, 0.0, 0.25, 0.5, 1.0])
    row = data.draw(st.lists(values, min_size=t, max_size=t))
    (got,) = select_topk_reference(torch.tensor(row).view(1, 1, 1, t), None, topk, first, last).flatten(0, 2)
    readable = [i for i in range(t) if row[i] > -math.inf]
    ends = {i for i in readable if i < readable[0] + first or i > readable[-1] - last}
    ranked = sorted(readable, key=lambda i: (i not in ends, -row[i], i))[:topk]
    assert got.tolist() == sorted(ranked) + [-1] * (topk - len(ranked))


# -- the selection -----------------------------------------------------------------------------------


@st.composite
def index_cases(draw: Draw) -> dict[str, Any]:
    b, hkv = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    h = hkv * draw(st.integers(1, 3))
    s, t = draw(st.sampled_from([1, 3])), draw(st.integers(1, 8))
    g = torch.Generator().manual_seed(draw(st.integers(0, 9)))

    def small(*shape: int) -> Tensor:  # small integers: exact ties are common
        return torch.randint(-2, 3, shape, generator=g).float()

    form = draw(st.sampled_from(["none", "boolean", "additive", "lowest"]))
    coin = torch.rand(b, 1, s, t, generator=g) > 0.4
    mask = {
        "none": None, "boolean": coin,
        "additive": torch.where(coin, small(b, 1, s, t), -math.inf),
        "lowest": torch.where(coin, 0.0, LOWEST),
    }[form]  # fmt: skip
    return {
        "q": small(b, h, s, 2), "k": small(b, hkv, t, 2),
        "weight": small(b, h, s), "lse": small(b, h, s), "mask": mask,
        "topk": draw(st.integers(1, t + 2)), "scale": draw(st.sampled_from([0.5, 1.0])),
        "score": draw(st.sampled_from(SCORES)),
        "predicate": draw(st.sampled_from(["", "kv <= q + 2"])),
        "per_kv_head": draw(st.booleans()),
    }  # fmt: skip


def naive_selection(case: dict[str, Any]) -> Tensor:
    """The best tokens of each row by (score, then lowest position), with Python's own sort."""
    q, k = case["q"].double(), case["k"].double()
    b, h, s, _ = q.shape
    hkv, t = k.shape[1], k.shape[2]
    group = h // hkv
    sets = hkv if case["per_kv_head"] else 1
    out = torch.full((b, sets, s, case["topk"]), -1, dtype=torch.int32)
    point = {
        "lightning": lambda dot, w, lse: w * max(dot, 0.0),
        "dot": lambda dot, w, lse: dot,
        "mass": lambda dot, w, lse: math.exp(dot - lse),
        "max_head": lambda dot, w, lse: dot,
    }[case["score"].name]
    reduce = max if case["score"].reduce == "max" else sum
    for i in range(b):
        for j in range(sets):
            heads = range(j * group, (j + 1) * group) if case["per_kv_head"] else range(h)
            for r in range(s):
                ranked = []
                for x in range(t):
                    if case["predicate"] and not x <= r + 2:
                        continue
                    added = 0.0
                    if case["mask"] is not None:
                        value = case["mask"][i, 0, r, x]
                        if case["mask"].dtype == torch.bool:
                            if not value:
                                continue
                        elif float(value) <= LOWEST:
                            continue
                        else:
                            added = float(value)
                    terms = [
                        point(
                            float(q[i, n, r] @ k[i, n // group, x]) * case["scale"],
                            float(case["weight"][i, n, r]),
                            float(case["lse"][i, n, r]),
                        )
                        for n in heads
                    ]
                    ranked.append((-(reduce(terms) + added), x))
                best = sorted(x for _, x in sorted(ranked)[: case["topk"]])
                out[i, j, r, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return out


def select(case: dict[str, Any]) -> Tensor:
    return index_topk_reference(
        case["q"], case["k"], case["weight"], case["lse"], case["mask"], None, [], case["topk"],
        case["scale"], case["score"].text, case["predicate"], case["per_kv_head"],
    )  # fmt: skip


@given(case=index_cases())
def test_the_selection_equals_the_naive_one_ties_included(case: dict[str, Any]) -> None:
    indices, wanted = select(case), naive_selection(case)
    assert indices.dtype == torch.int32
    if case["score"].name == "mass":
        # Sums of exponentials tie to rounding only: compare how many, and their order.
        assert torch.equal((indices >= 0).sum(-1), (wanted >= 0).sum(-1))
        return
    assert torch.equal(indices, wanted)


def topk(scores: Tensor, k: int, mask: Tensor | None = None) -> list[int]:
    """Selects by given scores: one head of width 1, whose key is the score."""
    t = scores.shape[0]
    result = index_topk_reference(
        torch.ones(1, 1, 1, 1), scores.float().view(1, 1, t, 1), None, None, mask, None, [], k, 1.0,
        "sum: dot", "", False,
    )  # fmt: skip
    return result.flatten().tolist()  # type: ignore[no-any-return]


def test_exact_ties_at_the_boundary_go_to_the_lowest_position() -> None:
    assert topk(torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0, 1.0]), 4) == [0, 1, 2, 4]
    assert topk(torch.zeros(9), 3) == [0, 1, 2]
    assert topk(torch.tensor([0.0, -0.0, 0.0, -0.0]), 2) == [0, 1], "+0 equals -0"


def test_indices_are_ascending_and_padded_at_the_end() -> None:
    assert topk(torch.tensor([3.0, 1.0, 2.0]), 5) == [0, 1, 2, -1, -1]
    assert topk(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2) == [2, 3]


@pytest.mark.parametrize("low", [-math.inf, LOWEST])
def test_forbidden_tokens_are_never_selected(low: float) -> None:
    mask = torch.tensor([low, 0.0, low, 0.0]).view(1, 1, 1, 4)
    assert topk(torch.tensor([9.0, 1.0, 8.0, 2.0]), 3, mask) == [1, 3, -1]
    assert topk(torch.tensor([9.0, 1.0]), 2, torch.full((1, 1, 1, 2), low)) == [-1, -1]
    assert topk(torch.tensor([9.0, 1.0]), 2, torch.zeros(1, 1, 1, 2).bool()) == [-1, -1]


def test_a_score_of_minus_infinity_is_never_selected_and_nan_always() -> None:
    assert topk(torch.tensor([-math.inf, 1.0, -math.inf]), 2) == [1, -1]
    assert topk(torch.tensor([1.0, math.nan, 5.0, 3.0]), 2) == [1, 2]


# -- shapes and dtypes ------------------------------------------------------------------------------


@pytest.mark.parametrize("op", list(REFERENCES))
def test_references_do_not_write_their_operands(operands: Any, op: str) -> None:
    before = operands(op)
    after = operands(op)
    REFERENCES[op](*after)
    for one, two in zip(before, after, strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one, two)


def test_one_set_a_kv_head_on_request(operands: Any) -> None:
    assert index_topk_reference(*operands("index_topk", per_kv_head=True)).shape == (2, 2, 3, 4)
    assert index_topk_reference(*operands("index_topk")).shape == (2, 1, 3, 4)


def test_gathered_rows_are_addressed_in_int64(operands: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    values = operands("sparse_attention", s=1)
    traced = make_fx(lambda q, k, v, i: sparse_attention_reference(
        q, k, v, i, None, None, [], None, 0.3, 0.0, ""
    ))(*values[:4])  # fmt: skip
    gathers = [n for n in traced.graph.nodes if n.target is torch.ops.aten.gather.default]
    assert len(gathers) == 2
    for node in gathers:
        assert node.args[2].meta["val"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_keep_their_dtype_and_sums_are_kept_wide(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 8).to(dtype) for _ in range(3))
    out, lse = attention_reference(q, k, v, None, None, [], None, 0.3, 0.0, "")
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted, _ = naive(q, k, v, torch.ones(1, 2, 4, 4).bool(), None, None, 0.3, 0.0)
    limit = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    assert (out.double() - wanted).abs().max() < limit


def test_the_reference_agrees_with_torch() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    out, _ = attention_reference(q, k, v, None, None, [], None, 8**-0.5, 0.0, "kv <= q")
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, wanted)


def test_masks_and_predicates_are_anded() -> None:
    mask = torch.rand(2, 1, 3, 4) > 0.5
    sizes = (2, 3, 3, 4)
    cpu = torch.device("cpu")
    valid, bias = attend_mask(mask, [], "kv <= q", sizes, cpu)
    assert valid is not None
    causal = torch.ones(3, 4, dtype=torch.bool).tril()
    assert torch.equal(valid.expand(sizes), (mask & causal).expand(sizes))
    assert bias is None
    assert attend_mask(None, [], "", sizes, cpu) == (None, None)
    valid, bias = attend_mask(mask.float(), [], "", sizes, cpu)
    assert valid is None
    assert bias is not None


def test_a_number_of_keys_that_is_not_known_may_be_smaller_than_topk() -> None:
    """Compiled for any number of keys, nothing may assume that there are as many as are selected."""

    class Chosen(torch.nn.Module):
        def forward(self, mass: torch.Tensor) -> torch.Tensor:
            return select_topk_reference(mass, None, 8, 1, 2)

    keys = torch.export.Dim("keys", min=2, max=64)
    program = torch.export.export(Chosen(), (torch.rand(1, 1, 2, 20),), dynamic_shapes=({3: keys},))
    assert [(int(r.lower), int(r.upper)) for r in program.range_constraints.values()] == [(2, 64)]
    for count in (2, 7, 8, 9, 40):
        mass = torch.rand(1, 1, 2, count)
        assert torch.equal(program.module()(mass), select_topk_reference(mass, None, 8, 1, 2))
