"""Writes into memory that a graph made itself become values, and no others do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.passes.canonicalize import canonicalize
from clsa_compile.passes.early import stop_early
from clsa_compile.passes.emit import Emitter
from clsa_compile.passes.owned import make_values
from clsa_compile.passes.verify import mutations, verify

Trace = Callable[..., Captured]
aten = torch.ops.aten


def x() -> Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))


def z() -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def assign(y: Tensor, where: Any, value: Any) -> Tensor:
    y[where] = value
    return y


def read_around(y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    first, view = y * 2, y[1:]
    before = view + 1
    view += z
    between = y.mean(0)
    y.mul_(3)
    return first, before, between, y, view, y[2].t()


def twice(y: Tensor, z: Tensor) -> Tensor:
    y[1:] += z
    y[:2] -= z
    y[:, 1].mul_(y[:, 2])
    return y


# What is done to y, a result of the graph.
WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "all of it": lambda y, z: y.add_(z),
    "with a factor": lambda y, z: y.add_(z, alpha=0.5),
    "a slice": lambda y, z: y[1:].add_(z),
    "a slice of a slice": lambda y, z: (y[1:][:, :2].mul_(z[:2]), y),
    "every other row": lambda y, z: assign(y, slice(0, None, 2), z.expand(2, 3, 6)),
    "one row": lambda y, z: assign(y, 1, z),
    "one column from the end": lambda y, z: assign(y, (..., -1), z[:, 0].expand(4, 3)),
    "through a transposed view": lambda y, z: (y.transpose(1, -1).mul_(z.t()), y),
    "through a permuted view": lambda y, z: (y.permute(2, -3, 1).div_(2), y),
    "through a new dimension": lambda y, z: (y.unsqueeze(-2).add_(z[:, None]), y),
    "with wider numbers": lambda y, z: y.add_(z.double()),
    "with narrower numbers": lambda y, z: y.copy_((y * 2).half()),
    "where something holds": lambda y, z: (y[1:].masked_fill_(z > 0, 7.0), y),
    "several times": twice,
    "and read before, between and after": read_around,
    "transposed memory": lambda y, z: y.transpose(1, 2).clone().transpose(1, 2).add_(z),
    "and a view of it is viewed": lambda y, z: y.add_(z).view(12, 6).t(),
}


@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("what", WRITES)
def test_a_write_becomes_what_it_computes(trace: Trace, what: str, symbolic: bool) -> None:
    def fn(x: Tensor, z: Tensor) -> Any:
        return WRITES[what](x * 3, z)

    captured = canonicalize(trace(fn, x(), z(), symbolic=symbolic))
    before = mutations(captured.graph)
    assert before
    left = set(before) - set(make_values(captured))
    verify(captured, "rewrite", [node for node in before if node in left])
    if not symbolic:
        assert not left
    torch.testing.assert_close(captured.module(x(), z()), fn(x(), z()), atol=0, rtol=0)


def test_a_slice_is_put_into_itself_for_nothing(trace: Trace) -> None:
    def fn(x: Tensor, z: Tensor) -> Tensor:
        y = x * 3
        y[1:] += z
        return y

    captured = canonicalize(trace(fn, x(), z()))
    make_values(captured)
    assert [n.target for n in captured.graph.nodes if n.op == "call_function"] == [
        aten.mul.Tensor,
        aten.slice.Tensor,
        aten.add.Tensor,
        aten.slice_scatter.default,
    ]


def test_a_stream_that_many_layers_add_to_is_no_deep_recursion(trace: Trace) -> None:
    def fn(x: Tensor, z: Tensor) -> Tensor:
        y = x * 3
        for _ in range(1200):
            y += z
        return y

    captured = trace(fn, x(), z())
    assert len(make_values(captured)) == 1200
    assert mutations(captured.graph) == []


def seen_by(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, z: fn(x).add_(z)


STAY: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "an input": lambda x, z: x.add_(z),
    "a view of an input": seen_by(lambda x: x[1:]),
    "what may be an input": seen_by(lambda x: x.type_as(x)),
    "no elementwise write": lambda x, z: (x * 3).index_copy_(0, torch.tensor([1]), z[None]),
    "one among elementwise writes": lambda x, z: (x * 3).add_(z).cumsum_(0),
    "random numbers": lambda x, z: (x * 3).bernoulli_(0.5) * 0,
    "values that are broadcast": lambda x, z: (x * 3).copy_(z),
    "through a view of another size": lambda x, z: (x * 3).view(12, 6).add_(1),
    "with another meaning in place": lambda x, z: (x * 3).pow_(2),
    "read through what is no pure view": lambda x, z: torch.feature_dropout((x * 3).add_(z), 0.5, False),
    "in memory with gaps": lambda x, z: torch.empty_strided((4, 3), (6, 2)).copy_(x[..., 0]),
}


@pytest.mark.parametrize("why", STAY)
def test_what_is_seen_or_not_known_stays(trace: Trace, why: str) -> None:
    captured = canonicalize(trace(STAY[why], x(), z()))
    before = list(captured.graph.nodes)
    assert mutations(captured.graph)
    assert make_values(captured) == []
    assert list(captured.graph.nodes) == before


def test_bounds_that_are_no_numbers_stay(trace: Trace) -> None:
    def fn(x: Tensor, z: Tensor) -> Tensor:
        return (x * 3)[:, : z.shape[0]].add_(1)

    captured = canonicalize(trace(fn, x(), z()[:2], symbolic=True))
    assert make_values(captured) == []


def test_a_view_of_what_a_pass_has_put_there_is_no_memory_of_its_own(trace: Trace) -> None:
    """Views keep the fake memory of the node that was replaced; its other readers then read other memory."""

    def fn(x: Tensor, z: Tensor) -> Tensor:
        y = x * 3
        part = y[1:]
        part.add_(z)
        return y + 1

    captured = canonicalize(trace(fn, x(), z()))
    made = next(n for n in captured.graph.nodes if n.target is aten.mul.Tensor)
    with captured.graph.inserting_before(made):
        other = Emitter(captured, made).call(aten.multiply.Tensor, *made.args)
    made.replace_all_uses_with(other)
    captured.graph.erase_node(made)
    assert make_values(captured) == []


def test_rows_of_memory_that_is_written_are_computed_alone(trace: Trace) -> None:
    """As in gemma3n: several states of each token, of which a layer changes some in place."""
    w = torch.eye(6) * 2

    def fn(x: Tensor, w: Tensor) -> Tensor:
        states = torch.stack([x, F.linear(F.relu(x), w)])
        states += F.linear(x, w).repeat(2, 1, 1, 1)
        states[1:] += F.linear(states[0], w)
        states[0] = torch.multiply(states[1], 2)
        return F.linear(states[:, :, -1:].to(x.device, torch.float32), w)

    captured = canonicalize(trace(fn, x(), w))
    assert len(make_values(captured)) == 4
    stop_early(captured)
    found = [n.meta["val"].shape for n in captured.graph.nodes if n.target is aten.linear.default]
    assert [shape[-2] for shape in found] == [1] * 4
    torch.testing.assert_close(captured.module(x(), w), fn(x(), w), atol=1e-6, rtol=1e-6)


SCATTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a slice of rows": lambda y, z: y.slice_scatter(z[:, :1], 1, 1, 2),
    "one row": lambda y, z: y.select_scatter(z[:, 0], 1, 1),
    "rows repeated": lambda y, z: y.repeat(1, 2, 1),
    "rows repeated as a new dimension": lambda y, z: y[0].repeat(3, 1, 1).transpose(0, 1),
}


@pytest.mark.parametrize("why", SCATTERS)
def test_other_rows_put_there_are_no_rows_by_themselves(trace: Trace, why: str) -> None:
    w = torch.eye(6) * 2

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(SCATTERS[why](F.linear(F.relu(x), w), x)[:, -1:], w)

    captured = canonicalize(trace(fn, x(), w))
    stop_early(captured)
    first = next(n for n in captured.graph.nodes if n.target is aten.linear.default)
    assert first.meta["val"].shape[-2] == 3
    torch.testing.assert_close(captured.module(x(), w), fn(x(), w), atol=1e-6, rtol=1e-6)
