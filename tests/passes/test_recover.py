"""Masks read from the nodes that build them: what is recovered must equal the mask, everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Interpreter, Node

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.masks import B_, KV_, Q_, parse_predicate, print_predicate
from clsa_compile.ir.references import attend_mask
from clsa_compile.ir.sites import MaskSpec, Operand
from clsa_compile.passes.analyze import Order
from clsa_compile.passes.recover import (
    MAX_INPUTS,
    Reader,
    Recovered,
    as_operand,
    is_lowest,
    top_indices,
)

Trace = Callable[..., Captured]
Rewritten = Callable[..., Any]
Draw = Any
Program = Callable[[dict[str, Tensor]], Tensor]
LOWEST = torch.finfo(torch.float32).min


# -- how a recovered mask is compared with the mask ------------------------------------------------


class Recorder(Interpreter):
    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def output_of(captured: Captured) -> Node:
    node: Node = next(n for n in captured.graph.nodes if n.op == "output").args[0]
    return node


def recovered_from(captured: Captured, roles: tuple[int, ...] = (0, 1, 2, 3)) -> Recovered | None:
    return Reader(Order(captured.graph)).recover([output_of(captured)], roles)


def arranged(value: Tensor, operand: Operand) -> Tensor:
    """Returns an operand's value as [B, H, S, T], as the rewriter would."""
    value = value.permute([d for d in operand.dims if d is not None])
    for position, d in enumerate(operand.dims):
        if d is None:
            value = value.unsqueeze(position)
    return value


def evaluated(
    spec: MaskSpec, values: dict[Node, Any], sizes: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Returns what a spec allows, and the bias it adds there: both of shape `sizes`."""
    tensor = None if spec.tensor is None else arranged(values[spec.tensor.root], spec.tensor)
    tensor = ~tensor if tensor is not None and spec.forbids else tensor
    inputs = [values[n] for n in spec.inputs]
    # Through its text, as it travels in the graph.
    text = print_predicate(spec.predicate)
    valid, bias = attend_mask(tensor, inputs, text, sizes, torch.device("cpu"))
    allowed = torch.ones(sizes, dtype=torch.bool) if valid is None else valid.expand(sizes)
    extra = torch.zeros(sizes) if bias is None else bias.expand(sizes)
    return allowed & (extra > LOWEST), extra


def check(captured: Captured, inputs: list[Tensor], sizes: tuple[int, int, int, int]) -> Recovered | None:
    """Compares what is recovered from the output with the output itself."""
    found = recovered_from(captured)
    if found is None:
        return None
    assert found.selection is None
    recorder = Recorder(captured.module)
    recorder.run(*inputs)
    mask = recorder.values[output_of(captured)]
    allowed, bias = evaluated(found.spec, recorder.values, sizes)
    what = f"{print_predicate(found.spec.predicate)!r} with {found.spec.inputs}, {found.spec.tensor}"
    if mask.dtype == torch.bool:
        assert torch.equal(allowed, mask.expand(sizes)), what
        return found
    mask = mask.expand(sizes)
    assert torch.equal(allowed, mask > LOWEST), what
    torch.testing.assert_close(bias[allowed], mask[allowed].float(), msg=lambda m: f"{what}: {m}")
    return found


# -- random masks ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Sizes, and inputs of every kind that a model hands to its mask."""

    sizes: tuple[int, int, int, int]
    inputs: dict[str, Tensor]


def world(b: int, h: int, s: int, t: int, seed: int) -> World:
    g = torch.Generator().manual_seed(seed)

    def ints(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=g)

    inputs = {
        "positions": ints(t + 1, s),  # [S], as cache_position
        "batch_positions": ints(t + 1, b, s),  # [B, S], as position_ids
        "starts": ints(3, b),  # [B], where padding ends
        "padding": ints(2, b, t),  # [B, T] of 0 and 1, as attention_mask
        "kept": ints(2, b, t).bool(),
        "documents": ints(3, b, t),
        "small": ints(200, b, t).to(torch.uint8),
        "square": ints(2, s, t).bool(),  # a materialised mask
        "whole": ints(2, b, 1, s, t).bool(),
        "bias": torch.randn(h, s, t, generator=g),
        "one": torch.where(ints(2, 1, 1, s, t).bool(), 0.0, LOWEST),
    }
    return World((b, h, s, t), inputs)


def integer(draw: Draw, sizes: tuple[int, int, int, int], depth: int) -> Program:
    """Draws an integer tensor that broadcasts to [B, H, S, T]."""
    b, h, s, t = sizes
    atoms: list[Program] = [
        lambda e: torch.arange(t),
        lambda e: torch.arange(1, 2 * t + 1, 2),
        lambda e: torch.arange(t + 3)[2:-1],
        lambda e: torch.arange(s)[:, None],
        lambda e: torch.arange(s).view(1, 1, s, 1).expand(b, h, s, t),
        lambda e: torch.arange(h)[:, None, None],
        lambda e: torch.arange(b).view(b, 1, 1, 1),
        lambda e: torch.arange(s * t).view(s, t),
        lambda e: e["positions"][:, None],
        lambda e: e["batch_positions"][:, None, :, None],
        lambda e: e["starts"][:, None, None, None],
        lambda e: e["documents"][:, None, None],
        lambda e: e["documents"].unsqueeze(1).unsqueeze(-2).to(torch.int32),
        lambda e: e["small"][:, None, None, :],
        lambda e: torch.full((s, 1), 2),
        lambda e: torch.full((), -1),
        lambda e: e["documents"][torch.arange(b)[:, None, None, None], torch.arange(t)],
    ]
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(atoms))
    left = integer(draw, sizes, depth - 1)
    kind = draw(st.sampled_from(["+c", "-c", "c-", "*c", "//", "%", "abs", "+", "-", "min", "max"]))
    if kind in ("+", "-", "min", "max"):
        right = integer(draw, sizes, depth - 1)
        both = {"+": torch.add, "-": torch.sub, "min": torch.minimum, "max": torch.maximum}[kind]
        return lambda e: both(left(e), right(e))
    constant = draw(st.integers(-3, 5))
    if kind == "abs":
        return lambda e: left(e).abs()
    if kind in ("//", "%"):
        by = draw(st.sampled_from([2, 3, 4, -2]))
        return (lambda e: left(e) // by) if kind == "//" else (lambda e: left(e) % by)
    return {
        "+c": lambda e: left(e) + constant,
        "-c": lambda e: left(e) - constant,
        "c-": lambda e: constant - left(e),
        "*c": lambda e: left(e) * constant,
    }[kind]


def condition(draw: Draw, sizes: tuple[int, int, int, int], depth: int) -> Program:
    """Draws a boolean tensor that broadcasts to [B, H, S, T]."""
    b, _, s, t = sizes
    atoms: list[Program] = [
        lambda e: e["kept"][:, None, None, :],
        lambda e: e["padding"][:, None, None].bool(),
        lambda e: e["padding"][:, None, None] != 0,
        lambda e: e["padding"].to(torch.bool)[
            torch.arange(b)[:, None, None, None], torch.arange(t)[None, None, None, :]
        ],
        lambda e: F.pad(e["kept"], (0, 2))[:, None, None, :t],
        lambda e: torch.ones(s, t, dtype=torch.bool),
        lambda e: torch.zeros(1, 1, s, t, dtype=torch.bool),
        lambda e: e["square"],
        lambda e: e["whole"],
        lambda e: torch.ones(s, t, dtype=torch.bool).tril(),
        lambda e: e["documents"][:, None, :, None][:, :, :1] == e["documents"][:, None, None],
    ]
    kind = draw(st.sampled_from(["atom", "compare", "compare", "and", "or", "not", "eq", "where"]))
    if depth == 0 and kind in ("and", "or", "not", "eq", "where"):
        kind = "compare"
    if kind == "atom":
        return draw(st.sampled_from(atoms))
    if kind == "compare":
        name = draw(st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"]))
        compare = getattr(torch, name)
        left = integer(draw, sizes, min(depth, 2))
        if draw(st.booleans()):
            number = draw(st.integers(-2, 6))
            return lambda e: compare(left(e), number)
        right = integer(draw, sizes, min(depth, 2))
        return lambda e: compare(left(e), right(e))
    first = condition(draw, sizes, depth - 1)
    if kind == "not":
        return draw(st.sampled_from([lambda e: ~first(e), lambda e: first(e).logical_not()]))
    second = condition(draw, sizes, depth - 1)
    if kind == "where":
        third = condition(draw, sizes, depth - 1)
        return lambda e: torch.where(first(e), second(e), third(e))
    both = {"and": torch.logical_and, "or": torch.bitwise_or, "eq": torch.eq}[kind]
    return lambda e: both(first(e), second(e))


def additive(draw: Draw, sizes: tuple[int, int, int, int], depth: int) -> Program:
    """Draws a float mask that broadcasts to [B, H, S, T]."""
    shape = sizes
    low = draw(st.sampled_from([-math.inf, LOWEST]))
    kind = draw(st.sampled_from(["where", "fill", "input", "bias", "cast", "sum", "inner"]))
    if depth == 0 and kind in ("sum", "inner"):
        kind = "where"
    if kind == "input":
        return lambda e: e["one"]
    if kind == "bias":
        return lambda e: e["bias"]
    allow = condition(draw, sizes, depth)
    if kind == "where":
        if draw(st.booleans()):
            return lambda e: torch.where(allow(e), 0.0, low)
        return lambda e: torch.where(allow(e), low, 0.0)
    if kind == "fill":
        return lambda e: torch.zeros(shape).masked_fill(allow(e), low)
    if kind == "cast":
        return lambda e: torch.where(allow(e), 0.0, -math.inf).to(torch.float64)
    other = additive(draw, sizes, depth - 1)
    if kind == "inner":
        return lambda e: other(e).masked_fill(~allow(e), low)
    return lambda e: torch.where(allow(e), 0.0, low) + other(e)


SIZES = st.tuples(
    st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 3]), st.sampled_from([1, 4, 6])
)


def check_random(draw: Draw, make: Callable[..., Program], trace: Trace) -> None:
    sizes = draw(SIZES)
    program = make(draw, sizes, draw(st.integers(0, 2)))
    given_world = world(*sizes, seed=draw(st.integers(0, 3)))
    names = list(given_world.inputs)

    def fn(*values: Tensor) -> Tensor:
        # The sum over nothing keeps every mask a node of its own, never an input.
        return program(dict(zip(names, values, strict=True)))

    inputs = list(given_world.inputs.values())
    captured = trace(fn, *inputs)
    check(captured, inputs, sizes)


@given(data=st.data())
def test_a_recovered_condition_equals_the_mask(data: Any, trace: Trace) -> None:
    check_random(data.draw, condition, trace)


@given(data=st.data())
def test_a_recovered_additive_mask_equals_the_mask(data: Any, trace: Trace) -> None:
    check_random(data.draw, additive, trace)


# -- masks that models build, which must be recovered whole -----------------------------------------

B, H, S, T = 2, 4, 3, 6
Q, K = (lambda: torch.arange(S)[:, None]), (lambda: torch.arange(T)[None])

KNOWN: dict[str, tuple[Callable[[dict[str, Tensor]], Tensor], str]] = {
    "causal": (lambda e: K() <= Q(), "kv <= q"),
    "causal, additive": (lambda e: torch.where(K() <= Q(), 0.0, LOWEST), "kv <= q"),
    "causal, triangular in floats": (
        lambda e: torch.zeros(S, T).masked_fill(K() > Q(), -math.inf),
        "kv <= q",
    ),
    "at cache positions": (lambda e: K() <= e["positions"][:, None], "kv <= in0(q)"),
    "sliding window": (
        lambda e: (K() <= e["positions"][:, None]) & (K() > e["positions"][:, None] - 4),
        "(kv <= in0(q)) & (kv > in0(q) - 4)",
    ),
    "chunks": (lambda e: (K() // 2 == Q() // 2) & (K() <= Q()), ""),
    "padding": (lambda e: e["kept"][:, None, None, :], "Ne(in0(b, kv), 0)"),
    "padding of integers": (lambda e: e["padding"][:, None, None, :] == 1, "Eq(in0(b, kv), 1)"),
    "padding, inverted": (lambda e: ~(e["padding"] == 0)[:, None, None], "Ne(in0(b, kv), 0)"),
    "padding looked up by index": (
        lambda e: e["kept"][torch.arange(B)[:, None, None, None], torch.arange(T)],
        "Ne(in0(b, kv), 0)",
    ),
    "causal and padding, expanded": (
        lambda e: ((K() <= Q())[None, None] & e["kept"][:, None, None]).expand(B, H, S, T),
        "",
    ),
    "left padding by its start": (
        lambda e: (K() >= e["starts"][:, None, None]).unsqueeze(1) & (K() <= Q()),
        "",
    ),
    "documents": (
        lambda e: e["documents"][:, None, :S, None] == e["documents"][:, None, None, :],
        "",
    ),
    "prefix": (lambda e: (K() <= Q()) | (K() < 2), ""),
    "two additive masks": (
        lambda e: torch.where(K() <= Q(), 0.0, LOWEST) + torch.where(e["kept"][:, None, None], 0.0, LOWEST),
        "",
    ),
    "everything": (lambda e: torch.ones(S, T, dtype=torch.bool), ""),
}


@pytest.mark.parametrize("name", list(KNOWN))
def test_the_masks_of_models_become_predicates_without_a_tensor(name: str, trace: Trace) -> None:
    build, text = KNOWN[name]
    inputs = world(B, H, S, T, seed=1).inputs

    def fn(*values: Tensor) -> Tensor:
        return build(dict(zip(inputs, values, strict=True)))

    found = check(trace(fn, *inputs.values()), list(inputs.values()), (B, H, S, T))
    assert found is not None
    assert found.spec.tensor is None
    if text:
        assert parse_predicate(print_predicate(found.spec.predicate)) == parse_predicate(text)


@pytest.mark.parametrize(
    "build",
    [
        lambda e: e["square"],
        lambda e: e["square"] & e["kept"][:, None, None],
        lambda e: e["bias"],
        lambda e: e["bias"].masked_fill(~(K() <= Q()), -math.inf),
        lambda e: torch.where(K() <= Q(), e["bias"], LOWEST),
        lambda e: torch.ones(S, T, dtype=torch.bool).tril(),
    ],
)
def test_what_is_materialised_stays_a_tensor_and_keeps_its_values(build: Any, trace: Trace) -> None:
    inputs = world(B, H, S, T, seed=2).inputs

    def fn(*values: Tensor) -> Tensor:
        return build(dict(zip(inputs, values, strict=True)))

    found = check(trace(fn, *inputs.values()), list(inputs.values()), (B, H, S, T))
    assert found is not None
    assert found.spec.tensor is not None


ARITHMETIC: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "quotient of both positions": lambda e: (Q() + K()) // 2 != 0,
    "remainder of both positions": lambda e: (Q() + K()) % 2 == 0,
    "not a remainder": lambda e: ~((Q() + K()) % 3 != 0),
    "division towards zero": lambda e: torch.div(K() - 3, 2, rounding_mode="trunc") <= Q() - 1,
    "division towards zero by a tensor": lambda e: torch.div(K() - 3, Q() + 1, rounding_mode="trunc") == 0,
    "true division": lambda e: K() / 2 <= Q(),
    "real positions": lambda e: torch.arange(0.0, T / 2, 0.5)[None] <= Q(),
    "real remainder": lambda e: torch.arange(0.0, T)[None].remainder(2.0) <= Q(),
    "real absolute value": lambda e: (torch.arange(0.0, T)[None] - 2.5).abs() <= Q(),
    "real bound": lambda e: K() <= 2.5,
    "counted": lambda e: e["padding"].cumsum(-1)[:, None, None] <= Q() + 1,
    "added with a factor": lambda e: torch.add(K(), Q(), alpha=-2) <= 0,
    "exclusive or": lambda e: (K() <= Q()) ^ e["kept"][:, None, None],
    "product of conditions": lambda e: (K() <= Q()) * e["kept"][:, None, None],
    "a condition as a number": lambda e: (K() <= Q()).long() + 1 > 1,
    "bits of integers": lambda e: (e["padding"][:, None, None] & 1).bool(),
    "inverted integers": lambda e: ~e["padding"][:, None, None] == -1,
    "powers": lambda e: K() ** 2 <= Q() + 4,
    "clamped": lambda e: K().clamp(max=3) <= Q(),
}


@pytest.mark.parametrize("name", list(ARITHMETIC))
def test_arithmetic_of_every_kind_is_right_whether_it_is_read_or_not(
    name: str, trace: Trace, rewritten: Rewritten
) -> None:
    inputs = world(B, H, S, T, seed=3).inputs

    def fn(*values: Tensor) -> Tensor:
        return ARITHMETIC[name](dict(zip(inputs, values, strict=True)))

    check(trace(fn, *inputs.values()), list(inputs.values()), (B, H, S, T))

    def attention(q: Tensor, k: Tensor, v: Tensor, *values: Tensor) -> Tensor:
        # A row that sees nothing says nothing: the first key is always seen.
        mask = fn(*values) | (K() == 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    outcome = rewritten(attention, *qkv(), *inputs.values())
    outcome.assert_equal()
    assert len(outcome.sites) == 1, "what is not read is carried as a tensor"


def test_additive_constants_that_forbid_are_told_from_those_that_do_not() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert is_lowest(torch.finfo(dtype).min)
    assert is_lowest(-math.inf)
    for value in (-1e9, -10000.0, 0.0, math.inf, math.nan, -65000.0):
        assert not is_lowest(value)


@pytest.mark.parametrize("fill", [-1e4, 1.0])
def test_a_finite_fill_is_a_bias_and_not_a_prohibition(fill: float, trace: Trace) -> None:
    captured = trace(lambda x: torch.where(x, 0.0, fill), torch.rand(S, T) > 0.5)
    x = torch.rand(S, T) > 0.5
    found = check(captured, [x], (1, 1, S, T))
    assert found is not None
    assert found.spec.predicate == sympy.true
    assert found.spec.tensor is not None


# -- memory ----------------------------------------------------------------------------------------


def attend(mask_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fn(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(*rest))

    return fn


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, S, 8), torch.randn(B, H, T, 8), torch.randn(B, H, T, 8)


def _written_clone(m: Tensor) -> Tensor:
    m = m.clone()
    m[:, :2] = True
    return m


def _written_zeros(m: Tensor) -> Tensor:
    made = torch.zeros(S, T, dtype=torch.bool)
    made[:, :3] = True
    return made


def _written_before_a_later_op(m: Tensor) -> Tensor:
    made = m & (K() <= Q())
    made[..., 0] = True
    return made | (K() > 4)


def _written_positions(m: Tensor) -> Tensor:
    positions = torch.arange(S)
    positions[1:] = 5
    return positions[:, None] >= K()


def _written_additive(m: Tensor) -> Tensor:
    made = torch.full((S, T), -math.inf)
    made[:, :2] = 0.0
    return made


def _written_whole(m: Tensor) -> Tensor:
    return torch.full((S, T), -math.inf).triu_(1)


def _written_through_out_of_place_alias(m: Tensor) -> Tensor:
    made = torch.ones(S, T, dtype=torch.bool)
    made.view(-1)[3:7].zero_()
    return made


@pytest.mark.parametrize(
    "build",
    [
        _written_clone,
        _written_zeros,
        _written_before_a_later_op,
        _written_positions,
        _written_additive,
        _written_whole,
        _written_through_out_of_place_alias,
    ],
)
def test_a_mask_written_in_place_is_read_as_it_is_when_attention_runs(
    build: Any, rewritten: Rewritten
) -> None:
    m = torch.rand(S, T) > 0.5
    m[:, 0] = True
    rewritten(attend(build), *qkv(), m).assert_equal()


def test_an_input_that_is_written_after_the_mask_was_made_is_not_read_again(
    rewritten: Rewritten,
) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
        mask = (K() <= positions[:, None]) & kept[:, None, None]
        positions.add_(1)
        kept.zero_()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    kept = torch.rand(B, T) > 0.3
    kept[:, 0] = True
    outcome = rewritten(fn, *qkv(), torch.tensor([0, 2, 4]), kept)
    outcome.assert_equal()


def test_an_input_written_before_the_mask_is_made_is_read_after_the_write(
    rewritten: Rewritten,
) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        positions.add_(2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=K() <= positions[:, None])

    rewritten(fn, *qkv(), torch.tensor([0, 1, 2])).assert_equal()


# -- limits ----------------------------------------------------------------------------------------


def test_too_many_inputs_are_cheaper_as_a_tensor(trace: Trace) -> None:
    def fn(*pads: Tensor) -> Tensor:
        mask = torch.ones(1, 1, S, T, dtype=torch.bool)
        for pad in pads:
            mask = mask & pad[:, None, None]
        return mask

    for number in (MAX_INPUTS, MAX_INPUTS + 1):
        found = recovered_from(trace(fn, *(torch.rand(B, T) > 0.5 for _ in range(number))))
        assert (found is not None) == (number <= MAX_INPUTS)


def test_a_mask_of_two_materialised_tensors_is_not_recovered(trace: Trace) -> None:
    captured = trace(lambda a, b: a & b, torch.rand(S, T) > 0.5, torch.rand(B, 1, S, T) > 0.5)
    assert recovered_from(captured) is None


def test_a_materialised_tensor_that_is_transposed_or_shifted_is_not_taken_as_it_is(
    trace: Trace,
) -> None:
    square = torch.rand(T, T) > 0.5
    for fn in (lambda m: m.t() & (m.sum() > 0), lambda m: ~m, lambda m: m[1:] & m[:-1]):
        captured = trace(fn, square)
        size = output_of(captured).meta["val"].shape[0]
        check(captured, [square], (1, 1, size, T))


def test_negative_places_wrap_around_and_are_not_read(trace: Trace) -> None:
    def fn(kept: Tensor) -> Tensor:
        return kept[torch.arange(B)[:, None, None, None], torch.arange(T) - 2]

    kept = torch.rand(B, T) > 0.5
    check(trace(fn, kept), [kept], (B, 1, 1, T))


def test_masks_of_higher_rank_than_the_scores_are_not_recovered(trace: Trace) -> None:
    captured = trace(lambda m: ~m, torch.rand(2, B, H, S, T) > 0.5)
    assert recovered_from(captured) is None


def test_three_dimensional_scores_have_no_heads(trace: Trace) -> None:
    captured = trace(lambda m: m[:, None] & (K() <= Q()), torch.rand(B, T) > 0.5)
    found = recovered_from(captured, roles=(0, 2, 3))
    assert found is not None
    assert found.spec.predicate.free_symbols == {B_, Q_, KV_}


@pytest.mark.parametrize("symbolic", [False, True])
def test_sizes_that_are_not_known_stay_out_of_the_predicate(symbolic: bool, trace: Trace) -> None:
    def fn(kept: Tensor, x: Tensor) -> Tensor:
        s, t = x.shape[2], kept.shape[1]
        return (torch.arange(t)[None] <= torch.arange(s)[:, None]) & kept[:, None, None]

    captured = trace(fn, torch.rand(2, 6) > 0.5, torch.randn(2, 4, 3, 8), symbolic=symbolic)
    found = recovered_from(captured)
    assert found is not None
    assert print_predicate(found.spec.predicate) == "(kv <= q) & Ne(in0(b, kv), 0)"


# -- selections ------------------------------------------------------------------------------------


def selections(form: str) -> Callable[[Tensor], Tensor]:
    def fn(scores: Tensor) -> Tensor:
        indices = scores.topk(2, dim=-1).indices
        b, s, t = scores.shape
        if form == "additive":
            return torch.full((b, s, t), -math.inf).scatter(-1, indices, 0.0)
        if form == "in place":
            return torch.full((b, s, t), -math.inf).scatter_(-1, indices, 0.0)
        if form == "boolean":
            return torch.zeros(b, s, t, dtype=torch.bool).scatter(-1, indices, True)
        if form == "negated":
            return ~torch.ones(b, s, t, dtype=torch.bool).scatter(-1, indices, False)
        if form == "forbidden":  # the selected ones are forbidden
            return ~torch.zeros(b, s, t, dtype=torch.bool).scatter(-1, indices, True)
        if form == "integers":
            return torch.zeros(b, s, t, dtype=torch.bool).scatter(-1, indices.int().long(), True)
        if form == "smallest":
            indices = scores.topk(2, dim=-1, largest=False).indices
            return torch.zeros(b, s, t, dtype=torch.bool).scatter(-1, indices, True)
        if form == "wrong axis":
            indices = scores.topk(2, dim=1).indices
            return torch.zeros(b, s, t, dtype=torch.bool).scatter(1, indices, True)
        if form == "the largest":
            best = scores.max(-1, keepdim=True).indices
            return torch.zeros(b, s, t, dtype=torch.bool).scatter(-1, best, True)
        if form == "one in the middle":
            middle = scores.kthvalue(2, -1, True).indices
            return torch.zeros(b, s, t, dtype=torch.bool).scatter(-1, middle, True)
        if form == "a sort":
            order = scores.sort(dim=-1, descending=True).indices
            return torch.zeros(b, s, t, dtype=torch.bool).scatter(-1, order, True)
        if form == "part of the indices":
            return torch.zeros(b, s, t, dtype=torch.bool).scatter(-1, indices[..., :1], True)
        if form == "base that varies":
            return (scores > 0).scatter(-1, indices, True)
        if form == "transposed":
            return torch.zeros(b, s, t, dtype=torch.bool).scatter(-1, indices, True)[:, :, :s].mT
        if form == "values":
            return torch.zeros(b, s, t, dtype=torch.bool).scatter(-1, indices, False)
        raise AssertionError(form)

    return fn


@pytest.mark.parametrize("form", ["additive", "in place", "boolean", "negated", "integers"])
def test_a_selection_is_seen_through_its_scatter(form: str, trace: Trace) -> None:
    captured = trace(selections(form), torch.randn(2, 3, 6))
    found = recovered_from(captured, roles=(0, 2, 3))
    assert found is not None
    assert found.selection is not None
    assert found.selection.topk_node.target is torch.ops.aten.topk.default
    assert found.spec.is_open


@pytest.mark.parametrize(
    "form",
    [
        "forbidden",
        "the largest",
        "one in the middle",
        "a sort",
        "smallest",
        "wrong axis",
        "part of the indices",
        "base that varies",
        "transposed",
        "values",
    ],
)
def test_what_only_looks_like_a_selection_is_none(form: str, trace: Trace) -> None:
    captured = trace(selections(form), torch.randn(2, 3, 6))
    found = recovered_from(captured, roles=(0, 2, 3))
    assert found is None or found.selection is None


def test_a_selection_of_every_token_selects_nothing(trace: Trace) -> None:
    def fn(scores: Tensor) -> Tensor:
        indices = scores.topk(scores.shape[-1], dim=-1).indices
        return torch.full(scores.shape, -math.inf).scatter(-1, indices, 0.0)

    found = recovered_from(trace(fn, torch.randn(2, 3, 6)), roles=(0, 2, 3))
    assert found is not None
    assert found.selection is None
    assert found.takes_all
    assert found.spec.is_open


def test_two_selections_are_not_recovered_as_one(trace: Trace) -> None:
    one = selections("boolean")
    captured = trace(lambda a, b: one(a) & one(b), torch.randn(2, 3, 6), torch.randn(2, 3, 6))
    assert recovered_from(captured, roles=(0, 2, 3)) is None


def test_a_selection_under_or_is_not_recovered(trace: Trace) -> None:
    # A window that is always kept beside the selection: the index alone would lose it.
    one = selections("boolean")
    captured = trace(lambda a: one(a) | (K() <= Q()), torch.randn(2, 3, 6))
    assert recovered_from(captured, roles=(0, 2, 3)) is None


def test_top_indices_sees_through_integer_casts_only(trace: Trace) -> None:
    captured = trace(
        lambda x: (x.topk(2).indices.int(), x.topk(2).indices.float(), x.topk(2).values),
        torch.randn(3, 5),
    )
    integers, floats, values = output_of(captured)  # type: ignore[misc]
    assert top_indices(integers) is not None
    assert top_indices(floats) is None
    assert top_indices(values) is None


def test_as_operand_takes_permutations_and_nothing_else(trace: Trace) -> None:
    captured = trace(lambda x: x + 1, torch.randn(3, 1, 5))
    node = next(n for n in captured.graph.nodes if n.op == "placeholder")
    zero = sympy.S.Zero
    assert as_operand(node, (KV_, zero, Q_), (Q_, KV_)) is None, "one dimension too many"
    assert as_operand(node, (KV_, zero, Q_), (B_, Q_, KV_)) == Operand(node, (1, 2, 0))
    assert as_operand(node, (KV_, zero, KV_), (B_, Q_, KV_)) is None, "a diagonal"
    assert as_operand(node, (KV_ + 1, zero, Q_), (B_, Q_, KV_)) is None, "a shift"
    assert as_operand(node, (zero, zero, Q_), (B_, Q_, KV_)) is None, "one row of several"
