"""Programs become functions: weights in, caches in and out, and no size taken for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from clsa_compile.errors import MlirError
from clsa_compile.mlir.program import Argument, Functional, Result, functional

aten, prims = torch.ops.aten, torch.ops.prims


class Cached(nn.Module):
    """Writes into a cache and a buffer; has a weight that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.idle = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, cache: Tensor, nothing: None = None) -> Tensor:
        cache.index_copy_(0, torch.tensor([1]), (x * self.weight)[None])
        self.count.add_(1)
        return cache.sum(0)


def export(module: Any, *args: Any, shapes: Any = None) -> ExportedProgram:
    if not isinstance(module, nn.Module):
        function = module
        module = type("Function", (nn.Module,), {"forward": lambda self, *given: function(*given)})()
    with torch.no_grad():
        return torch.export.export(module, args, strict=False, dynamic_shapes=shapes)


def targets(found: Functional) -> list[Any]:
    return [node.target for node in found.graph.nodes if node.op == "call_function"]


def test_writes_are_results_and_idle_weights_are_left_out() -> None:
    program = export(Cached(), torch.ones(4), torch.zeros(6, 4), None)
    before = str(program.graph)
    found = functional("f", program, {})
    assert [a for a in found.arguments if a.kind != "constant"] == [
        Argument("p_weight", "parameter", "weight", "float32", (4,)),
        Argument("b_count", "buffer", "count", "float32", ()),
        Argument("x", "input", "", "float32", (4,)),
        Argument("cache", "input", "", "float32", (6, 4)),
    ]
    assert set(found.results) == {
        Result("b_count", "b_count", "float32", ()),
        Result("cache", "cache", "float32", (6, 4)),
        Result("output_0", "", "float32", (4,)),
    }
    assert found.results[-1].writes == "", "outputs come last"
    assert len(found.graph.output_node().args[0]) == 3
    assert str(program.graph) == before, "the program was touched"


def test_sizes_that_vary_are_symbols() -> None:
    program = export(lambda x: x + 1, torch.ones(5, 3), shapes=(({0: Dim("B", min=2, max=9)},),))
    (argument,), (result,) = (found := functional("f", program, {})).arguments, found.results
    assert isinstance(argument.sizes[0], str)
    assert argument.sizes == result.sizes
    assert argument.sizes[1] == 3


MERGES = [
    ("[b, t, 8] to [b*t, 8]", lambda x: x.view(x.shape[0] * x.shape[1], 8), 1),
    ("[b, t, 8] to [b*t*8]", lambda x: x.view(-1), 1),
    ("[b, t, 8] to [b, t*8]", lambda x: x.view(x.shape[0], -1), 1),
    ("[b, t, 8] to [b, t, 2, 4] is no merge", lambda x: x.view(x.shape[0], x.shape[1], 2, 4), 0),
    ("[b, t, 8] to [t, b, 8] is no merge", lambda x: x.view(x.shape[1], x.shape[0], 8), 0),
]


@pytest.mark.parametrize(("name", "function", "merges"), MERGES, ids=[m[0] for m in MERGES])
def test_views_of_several_varying_sizes_are_merges(name: str, function: Any, merges: int) -> None:
    x = torch.randn(5, 7, 8)
    program = export(function, x, shapes=(({0: Dim("B", max=99), 1: Dim("T", max=99)},),))
    found = functional("f", program, {})
    assert targets(found).count(prims.collapse.default) == merges
    made = torch.fx.Interpreter(torch.fx.GraphModule({}, found.graph)).run(x)
    assert torch.equal(made[0], function(x))


def test_views_of_one_varying_size_stay() -> None:
    program = export(lambda x: x.view(-1, 8), torch.randn(5, 1, 8), shapes=(({0: Dim("B", max=99)},),))
    assert aten.view.default in targets(functional("f", program, {}))


def test_a_strided_view_of_everything_goes_and_another_stays() -> None:
    whole = export(lambda x: (x + 1).as_strided((3, 4), (4, 1)).sin(), torch.ones(3, 4))
    turned = export(lambda x: (x + 1).as_strided((4, 3), (1, 4)).sin(), torch.ones(3, 4))
    counts = [sum("as_strided" in str(t) for t in targets(functional("f", p, {}))) for p in (whole, turned)]
    assert counts == [0, 1]


def test_a_decomposition_that_holds_for_the_example_only_is_refused() -> None:
    def guessing(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] < 7 else x * 3

    program = export(lambda x: x.sin(), torch.ones(5), shapes=(({0: Dim("B", max=99)},),))
    for _ in range(2):  # torch notes a condition once
        with pytest.raises(MlirError, match=r"'f' would hold only where .* < 7"):
            functional("f", program, {aten.sin.default: guessing})


def test_a_condition_that_always_holds_is_not_refused() -> None:
    def sure(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] < 200 else x * 3

    program = export(lambda x: x.sin(), torch.ones(5), shapes=(({0: Dim("B", max=99)},),))
    assert aten.mul.Tensor in targets(functional("f", program, {aten.sin.default: sure}))


def test_inputs_and_outputs_that_are_no_tensors() -> None:
    symbolic = export(lambda x: (x, x.shape[0]), torch.ones(5), shapes=(({0: Dim("B", max=99)},),))
    with pytest.raises(MlirError, match=r"an output of the program 'f' is no tensor"):
        functional("f", symbolic, {})
    fixed = export(lambda x, n: (x * n, n), torch.ones(5), 3)
    found = functional("f", fixed, {})
    assert ([a.name for a in found.arguments], len(found.results)) == (["given_0"], 1)


def test_a_decomposition_that_fails_says_which_program() -> None:
    def broken(x: Tensor) -> Tensor:
        raise MlirError("no way")

    with pytest.raises(MlirError, match=r"the program 'f' cannot be decomposed: .*no way"):
        functional("f", export(lambda x: x.sin(), torch.ones(2)), {aten.sin.default: broken})


def test_constants_that_passes_add_are_arguments(
    rewritten: Callable[..., ExportedProgram], varying: dict[int, Any], call: Callable[..., Any]
) -> None:
    from clsa_compile.testing import tiny

    step, args = call(tiny("llama"))
    program = rewritten(step, args, {"topk": 8, "share": "FS", "keep_last": 2}, varying)
    found = functional("decode", program, {})
    assert [a.tensor for a in found.arguments if a.kind == "constant"] == ["clsa_weight_0"]
    assert [r.writes for r in found.results] == [*(a.name for a in found.arguments if "caches" in a.name), ""]
