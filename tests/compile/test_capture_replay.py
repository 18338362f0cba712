"""What replaying writes is what dispatching would have written."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from clsa_compile.capture import dynamo, replay
from clsa_compile.testing import TINY, generate_steps, tiny


class Dispatching(Interpreter):
    """What `Replaying` must not differ from."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)


def look(value: Any, storages: dict[int, int]) -> Any:
    """Returns what a value is, with storages numbered in the order they appear."""
    if not isinstance(value, Tensor):
        return str(value)
    storage = storages.setdefault(value.untyped_storage()._cdata, len(storages))
    sizes = (str(value.shape), str(value.stride()), str(value.storage_offset()))
    return (storage, value.dtype, value.device, *sizes)


def described(graph: Graph) -> list[Any]:
    """Returns all of a graph that passes read; nodes go by their place, names count dead nodes too."""
    storages: dict[int, int] = {}
    places = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    lines: list[Any] = []
    for node in graph.nodes:
        values = [look(v, storages) for v in tree_leaves(node.meta.get("val"))]
        stack = list(node.meta.get("nn_module_stack", {}))
        arguments = map_arg((node.args, node.kwargs), places.__getitem__)
        lines.append((str(node.target), str(arguments), values, stack, node.meta.get("stack_trace")))
    return lines


def both(gm: GraphModule, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any], int]:
    """Captures a graph with and without replaying; returns both, and how many nodes were replayed."""
    dynamo.capture(gm)  # what tracing learns about sizes stays in the graph's values
    _replayed.clear()
    replayed = described(dynamo.capture(gm).graph)
    calls = len(_replayed)
    with monkeypatch.context() as patch:
        patch.setattr(dynamo, "Replaying", Dispatching)
        dispatched = described(dynamo.capture(gm).graph)
    return replayed, dispatched, calls


_replayed: list[Node] = []


@pytest.fixture(autouse=True)
def count_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes each node that is replayed."""
    _replayed.clear()
    real = replay._replay

    def counted(known: Any, *args: Any) -> Any:
        _replayed.extend(step.node for step in known.steps)
        return real(known, *args)

    monkeypatch.setattr(replay, "_replay", counted)


def compared(function: Any, *args: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Asserts that a function is captured the same both ways; returns how many nodes were replayed."""
    counts = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        replayed, dispatched, calls = both(gm, monkeypatch)
        assert replayed == dispatched
        counts.append(calls)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    return sum(counts)


# Sizes that are unknown are replayed alike in any family, which two of them show.
ALWAYS = {
    ("llama", "static"), ("llama", "dynamic"), ("glm_moe_dsa", "static"), ("gemma2", "static"),
}  # fmt: skip
SLOW = {("glm_moe_dsa", "dynamic"), ("gpt_oss", "static")}


def marks(*case: str) -> Any:
    if case in ALWAYS:
        return ()
    return pytest.mark.slow if case in SLOW else pytest.mark.exhaustive


NAMES = [
    pytest.param(name, cache, marks=marks(name, cache))
    for name in sorted(TINY)
    for cache in ("static", "dynamic")
]


@pytest.mark.parametrize(("name", "cache"), NAMES)
def test_models_are_captured_the_same(name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name, "eager" if name == "gpt_oss" else "sdpa")
    seen = 0

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        nonlocal seen
        replayed, dispatched, calls = both(gm, monkeypatch)
        assert replayed == dispatched
        seen = max(seen, calls)
        return gm.forward

    torch._dynamo.reset()
    generate_steps(torch.compile(model, backend=backend), model.config, cache=cache, steps=3)
    assert seen > 20


def same_twice(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2.0 + y) + (y * 2.0 + x)


def zeros_of_both_signs(x: Tensor, y: Tensor) -> Tensor:
    return (x * 0.0) + (y * -0.0)


def one_tensor_or_two(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y) + torch.maximum(x, x)


def other_strides(x: Tensor, y: Tensor) -> Tensor:
    return x.contiguous() + y.t().contiguous()


def other_dtypes(x: Tensor, y: Tensor) -> Tensor:
    return x.softmax(-1) + y.double().softmax(-1)


def views_of_views(x: Tensor, y: Tensor) -> Tensor:
    a, b = x.view(16).view(2, 8), y.view(16).view(2, 8)
    return a[0] + b[1] + a.transpose(0, 1)[:, 0] + b.transpose(0, 1)[:, 0]


def views_of_one_storage_or_of_two(x: Tensor, y: Tensor) -> Tensor:
    def both(a: Tensor, b: Tensor) -> Tensor:
        first, second = torch.broadcast_tensors(a, b)
        return first.unsqueeze(0) + second.unsqueeze(0)

    return both(x[0], x[1]) + both(y[0], y[1]) + both(x[0], y[1])


def several_results(x: Tensor, y: Tensor) -> Tensor:
    a, b = x.chunk(2), y.chunk(2)
    return a[0] + b[1] + x.topk(2).values.sum() + y.topk(2).values.sum()


def written_between(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.clone(), y.clone()
    first = x.view(16) * 2
    x.add_(1)
    y.add_(1)
    return first + x.view(16) * 2 + y.view(16) * 2


def sizes_changed_in_place(x: Tensor, y: Tensor) -> Tensor:
    a, b = x.relu(), y.relu()
    b.unsqueeze_(0)
    return a.sum(0) + b.sum(0).sum(0)


def random_numbers(x: Tensor, y: Tensor) -> Tensor:
    return torch.rand_like(x) + torch.rand_like(y)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (same_twice, 3),
        (zeros_of_both_signs, 0),
        (one_tensor_or_two, 0),
        (other_strides, 0),
        (other_dtypes, 0),
        (views_of_views, 5),
        (views_of_one_storage_or_of_two, 13),
        (several_results, 5),
        (written_between, 6),
        (sizes_changed_in_place, 2),
        (random_numbers, 1),
    ],
)
def test_small_graphs_are_captured_the_same(
    function: Any, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = compared(function, torch.randn(4, 4), torch.randn(4, 4), monkeypatch=monkeypatch)
    assert replayed == expected


def test_a_replayed_random_number_is_another_one() -> None:
    torch._dynamo.reset()
    x = torch.zeros(64)

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.rand_like(x), torch.rand_like(x)

    graph: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        graph.append(dynamo.capture(gm).module)
        return graph[0].forward

    a, b = torch.compile(two, backend=backend)(x)
    assert not torch.equal(a, b)
