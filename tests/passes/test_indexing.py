"""Views as index arithmetic, against torch: root[index] must be the view, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Interpreter, Node

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.masks import floordiv, mod
from clsa_compile.passes.indexing import (
    View,
    argument,
    chain,
    dim,
    divide,
    identity,
    is_cast,
    remainder,
    reshape_index,
    same,
    shape,
    step,
)

Trace = Callable[..., Captured]
Draw = Any
aten = torch.ops.aten


# -- what an index expression means ---------------------------------------------------------------


def evaluate(e: Any, grid: dict[Any, torch.Tensor]) -> Any:
    """Evaluates an index expression over integer tensors, one a symbol."""
    e = sympy.sympify(e)
    if e.is_Integer:
        return int(e)
    if e.is_Symbol:
        return grid[e]
    args = [evaluate(a, grid) for a in e.args]
    if isinstance(e, floordiv):
        return args[0] // args[1]
    if isinstance(e, mod):
        return args[0] % args[1]
    assert isinstance(e, sympy.Add | sympy.Mul), f"{e} is no index expression"
    total = args[0]
    for a in args[1:]:
        total = total + a if isinstance(e, sympy.Add) else total * a
    return total


def grid_of(sizes: tuple[int, ...]) -> dict[Any, torch.Tensor]:
    """Returns d0, d1, ... as index tensors that broadcast to `sizes`."""
    places = torch.meshgrid(*(torch.arange(s) for s in sizes), indexing="ij") if sizes else ()
    return {dim(i): place for i, place in enumerate(places)}


def read(root: torch.Tensor, index: tuple[Any, ...], sizes: tuple[int, ...]) -> torch.Tensor:
    """Returns `root[index]` for every element of a tensor of shape `sizes`."""
    grid = grid_of(sizes)
    places = []
    for e, size in zip(index, root.shape, strict=True):
        place = torch.as_tensor(evaluate(e, grid)).expand(sizes)
        assert place.numel() == 0 or (int(place.min()) >= 0 and int(place.max()) < size), (
            f"{e} leaves the {size} elements of its dimension"
        )
        places.append(place)
    return root[tuple(places)] if places else root.expand(sizes)


class Recorder(Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def views_of(captured: Captured) -> tuple[Node, list[View]]:
    """Returns the output node, and all views of ever deeper roots of it."""
    out = next(n for n in captured.graph.nodes if n.op == "output").args[0]
    sizes = {dim(i): s for i, s in enumerate(shape(out))}
    return out, chain(out, identity(out).index, sizes)


def check_views(captured: Captured, *inputs: torch.Tensor) -> list[View]:
    """Checks every view of the output against the values that torch computes."""
    out, views = views_of(captured)
    recorder = Recorder(captured.module)
    recorder.run(*inputs)
    wanted = recorder.values[out]
    for view in views:
        got = read(recorder.values[view.root], view.index, tuple(wanted.shape))
        assert torch.equal(got, wanted), f"{out} is not {view.root}{list(view.index)}"
    return views


# -- random chains of views -----------------------------------------------------------------------


def factorisation(draw: Draw, total: int) -> list[int]:
    """Draws a shape with `total` elements."""
    sizes = []
    while total > 1 and len(sizes) < 4:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        size = draw(st.sampled_from(divisors))
        sizes.append(size)
        total //= size
    return [*sizes, total] if total > 1 or not sizes else sizes


def draw_view(draw: Draw, sizes: tuple[int, ...]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Draws one operation that the module under test must see through."""
    rank = len(sizes)
    kinds = ["reshape", "unsqueeze", "contiguous", "clone", "expand", "squeeze", "alias", "detach"]
    if rank:
        kinds += ["permute", "slice", "slice", "select", "flatten", "unflatten", "split", "chunk",
                  "unbind", "repeat_interleave", "transpose",
                  "narrow", "movedim"]  # fmt: skip
    if rank == 2:
        kinds += ["t", "T"]
    if rank >= 2:
        kinds.append("mT")
    kind = draw(st.sampled_from(kinds))
    d = draw(st.integers(-rank, rank - 1)) if rank else 0
    size = sizes[d] if rank else 1
    if kind == "reshape":
        new = factorisation(draw, math.prod(sizes))
        return lambda x: x.reshape(new)
    if kind == "unsqueeze":
        at = draw(st.integers(-rank - 1, rank))
        return lambda x: x.unsqueeze(at)
    if kind == "squeeze":
        return (lambda x: x.squeeze(d)) if rank and draw(st.booleans()) else lambda x: x.squeeze()
    if kind in ("contiguous", "clone", "detach", "t"):
        return lambda x: getattr(x, kind)()
    if kind == "alias":
        return lambda x: torch.ops.aten.alias.default(x)
    if kind == "expand":
        front = draw(st.lists(st.integers(1, 3), max_size=1))
        back = [draw(st.integers(1, 4)) if s == 1 else draw(st.sampled_from([s, -1])) for s in sizes]
        return lambda x: x.expand(*front, *back) if front or back else x.expand(())
    if kind == "permute":
        order = draw(st.permutations(range(rank)))
        return lambda x: x.permute(order)
    if kind == "transpose":
        other = draw(st.integers(-rank, rank - 1))
        return lambda x: x.transpose(d, other)
    if kind == "slice":
        bounds = [draw(st.one_of(st.none(), st.integers(-size - 3, size + 3))) for _ in range(2)]
        pace = draw(st.integers(1, 3))
        return lambda x: torch.ops.aten.slice.Tensor(x, d, *bounds, pace)
    if kind == "narrow":
        start = draw(st.integers(0, size - 1))
        return lambda x: x.narrow(d, start, size - start)
    if kind == "movedim":
        moved = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
        places = draw(st.permutations(range(rank)))[: len(moved)]
        return lambda x: x.movedim(moved, places)
    if kind in ("mT", "T"):
        return lambda x: getattr(x, kind)
    if kind == "select":
        at = draw(st.integers(-size, size - 1))
        return lambda x: x.select(d, at)
    if kind == "flatten":
        first, last = sorted(draw(st.lists(st.integers(0, rank - 1), min_size=2, max_size=2)))
        return lambda x: x.flatten(first, last)
    if kind == "unflatten":
        parts = factorisation(draw, size)
        return lambda x: x.unflatten(d, parts)
    if kind == "split":
        cuts = draw(st.lists(st.integers(1, size), min_size=1, max_size=3))
        sections = []
        for cut in cuts:
            sections.append(min(cut, size - sum(sections)))
        sections = [s for s in [*sections, size - sum(sections)] if s > 0]
        which = draw(st.integers(0, len(sections) - 1))
        return lambda x: x.split(sections, d)[which]
    if kind == "chunk":
        number = draw(st.integers(1, 3))
        pieces = len(torch.empty(size).chunk(number))
        which = draw(st.integers(0, pieces - 1))
        return lambda x: x.chunk(number, d)[which]
    if kind == "unbind":
        which = draw(st.integers(0, size - 1))
        return lambda x: x.unbind(d)[which]
    assert kind == "repeat_interleave"
    times = draw(st.integers(1, 3))
    return lambda x: x.repeat_interleave(times, d)


@st.composite
def chains_of_views(draw: Draw) -> tuple[torch.Tensor, list[Callable[..., torch.Tensor]]]:
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    start = torch.arange(math.prod(sizes)).reshape(sizes)
    steps: list[Callable[..., torch.Tensor]] = []
    x = start
    for _ in range(draw(st.integers(1, 6))):
        one = draw_view(draw, tuple(x.shape))
        after = one(x)
        if 0 < after.numel() <= 400 and after.dim() <= 5:
            steps.append(one)
            x = after
    return start, steps


@given(case=chains_of_views())
def test_a_chain_of_views_reads_the_elements_that_torch_reads(case: Any, trace: Trace) -> None:
    start, steps = case

    def fn(x: torch.Tensor) -> torch.Tensor:
        for one in steps:
            x = one(x)
        return x

    views = check_views(trace(fn, start), start)
    # Every operation drawn is a view: a chain that stops early would prove nothing.
    assert views[-1].root.op == "placeholder"


@given(data=st.data())
def test_reshape_index_is_what_reshape_does(data: Any) -> None:
    old = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6]), min_size=1, max_size=4)))
    new = tuple(factorisation(data.draw, math.prod(old)))
    source = torch.arange(math.prod(old)).reshape(old)
    sympified = [tuple(sympy.Integer(s) for s in sizes) for sizes in (old, new)]
    index = reshape_index(*sympified)
    assert index is not None, "sizes that are all known can always be compared"
    assert torch.equal(read(source, index, new), source.reshape(new))


@given(
    coefficient=st.integers(-6, 6),
    offset=st.integers(-9, 9),
    by=st.sampled_from([-4, -3, -2, -1, 1, 2, 3, 4, 6]),
    size=st.integers(1, 7),
    known=st.booleans(),
)
def test_division_rules_agree_with_python(
    coefficient: int, offset: int, by: int, size: int, known: bool
) -> None:
    e = coefficient * dim(0) + offset
    sizes = {dim(0): sympy.Integer(size)} if known else {}
    grid = {dim(0): torch.arange(size)}
    value = coefficient * torch.arange(size) + offset
    divisor = sympy.Integer(by)
    quotient = torch.as_tensor(evaluate(divide(e, divisor, sizes), grid)).expand(size)
    rest = torch.as_tensor(evaluate(remainder(e, divisor, sizes), grid)).expand(size)
    assert torch.equal(quotient, value // by)
    assert torch.equal(rest, value % by)


# -- single rules, and what must not be taken for a view ------------------------------------------


@pytest.mark.parametrize("start", [-100, -4, -3, -1, 0, 2, 3, 5])
def test_slices_clamp_their_start_as_torch_does(start: int, trace: Trace) -> None:
    x = torch.arange(3)
    check_views(trace(lambda x: x[start:], x), x)


def test_a_negative_slice_of_a_symbolic_size_is_right_for_every_size(trace: Trace) -> None:
    captured = trace(lambda x: x[:, -4:], torch.arange(20).reshape(2, 10), symbolic=True)
    views = views_of(captured)[1]
    for width in (10, 7, 4):
        x = torch.arange(2 * width).reshape(2, width)
        for view in views:
            index = tuple(sympy.sympify(e).xreplace(_sizes_at(captured, x)) for e in view.index)
            # The start may be beyond what can be proven; then the slice itself is the root.
            root = x if view.root.op == "placeholder" else _evaluated(captured, view.root, x)
            assert torch.equal(read(root, index, (2, 4)), x[:, -4:]), f"{width}: {view.index}"


def _evaluated(captured: Captured, node: Node, *inputs: torch.Tensor) -> torch.Tensor:
    recorder = Recorder(captured.module)
    recorder.run(*inputs)
    value: torch.Tensor = recorder.values[node]
    return value


def _sizes_at(captured: Captured, *inputs: torch.Tensor) -> dict[Any, Any]:
    """Returns the value of each size symbol for given inputs."""
    found = {}
    placeholders = [n for n in captured.graph.nodes if n.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=True):
        for symbol, size in zip(shape(node), value.shape, strict=True):
            if symbol.is_Symbol:
                found[symbol] = sympy.Integer(size)
    return found


def test_symbolic_sizes_keep_grouped_heads_readable(trace: Trace) -> None:
    # repeat_kv: expand and reshape, with a batch and a length that are not known.
    def fn(k: torch.Tensor) -> torch.Tensor:
        b, h, t, d = k.shape
        return k[:, :, None].expand(b, h, 3, t, d).reshape(b, h * 3, t, d)

    x = torch.randn(2, 2, 10, 4)
    captured = trace(fn, x, symbolic=True)
    views = views_of(captured)[1]
    assert views[-1].root.op == "placeholder"
    for b, t in ((2, 10), (3, 5)):
        y = torch.randn(b, 2, t, 4)
        index = [sympy.sympify(e).xreplace(_sizes_at(captured, y)) for e in views[-1].index]
        assert torch.equal(read(y, tuple(index), (b, 6, t, 4)), fn(y))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.flip(0),
        lambda x: x.roll(1, 0),
        lambda x: x.repeat(2, 1),
        lambda x: x.diagonal(),
        lambda x: x.unfold(0, 2, 1),
        lambda x: x + 0,
        lambda x: x.cumsum(0),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x.as_strided((2, 2), (1, 1)),
        lambda x: x.to(torch.float16),
        lambda x: x.to(torch.int64),
        lambda x: torch.cat([x, x]),
    ],
)
def test_what_is_no_plain_view_ends_the_chain(fn: Any, trace: Trace) -> None:
    x = torch.arange(9.0).reshape(3, 3)
    views = check_views(trace(fn, x), x)
    assert len(views) == 1


def test_widening_casts_are_views_only_when_asked(trace: Trace) -> None:
    captured = trace(lambda x: x.to(torch.float32).t(), torch.randn(2, 3).half())
    out = next(n for n in captured.graph.nodes if n.op == "output").args[0]
    index = identity(out).index
    assert [v.root.op for v in chain(out, index, {})] == ["call_function", "call_function"]
    views = chain(out, index, {}, casts=True)
    assert views[-1].root.op == "placeholder"
    assert [is_cast(c) for c in views[-1].copies] == [True]


@pytest.mark.parametrize(
    ("fn", "copies"),
    [
        (lambda x: x.clone(), 1),
        (lambda x: x.t().contiguous(), 1),
        (lambda x: x.repeat_interleave(2, 0), 1),
        (lambda x: x.t().reshape(6), 1),
        (lambda x: x.to(torch.float32, copy=True), 1),
        (lambda x: torch.ops.aten._to_copy.default(x), 1),
        (lambda x: x.t()[1:].unsqueeze(0).expand(3, -1, -1), 0),
        (lambda x: x.detach().view(6), 0),
    ],
)
def test_nodes_that_read_memory_are_remembered_as_copies(fn: Any, copies: int, trace: Trace) -> None:
    # A write after a copy does not reach it, a write after a view does.
    _, views = views_of(trace(fn, torch.randn(2, 3)))
    assert views[-1].root.op == "placeholder"
    assert len(views[-1].copies) == copies


def test_tensors_without_elements_are_read_without_an_error(trace: Trace) -> None:
    for fn in (lambda x: x.reshape(3, 0, 2), lambda x: x.transpose(0, 1), lambda x: x[:, 5:]):
        x = torch.zeros(2, 0, 3)
        check_views(trace(fn, x), x)


def test_sizes_are_compared_without_guards(trace: Trace) -> None:
    captured = trace(lambda x: x + 1, torch.randn(3, 5), symbolic=True)
    x = next(n for n in captured.graph.nodes if n.op == "placeholder")
    a, b = shape(x)
    guards = len(captured.fake_mode.shape_env.guards)
    assert same(a, a)
    assert not same(a, b)
    assert same(a * b, b * a)
    assert step(x) is None
    assert len(captured.fake_mode.shape_env.guards) == guards


def test_arguments_are_found_by_position_and_by_name(trace: Trace) -> None:
    captured = trace(lambda x: x.sum(dim=1, keepdim=True), torch.randn(2, 3))
    node = next(n for n in captured.graph.nodes if n.op == "call_function")
    assert argument(node, 1, "dim") == [1]
    assert argument(node, 2, "keepdim") is True
    assert argument(node, 3, "dtype", "none") == "none"
