"""What torch-mlir is asked, and what is said where it cannot do it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from clsa_compile.errors import MissingMlirError, MlirError
from clsa_compile.mlir import lowering
from clsa_compile.mlir.program import Functional, functional

mlir = pytest.mark.mlir
clsa = torch.ops.clsa


def program(function: Any, *args: Any, shapes: Any = None, table: Any = None) -> Functional:
    class Function(nn.Module):
        def forward(self, *given: Any) -> Any:
            return function(*given)

    with torch.no_grad():
        found = torch.export.export(Function(), args, strict=False, dynamic_shapes=shapes)
    return functional("f", found, lowering.table() if table is None else table)


def select(q: Tensor, k: Tensor) -> Tensor:
    return clsa.index_topk(q, k, None, None, None, None, [], 4, 0.5, "sum: dot", "", False)


OPERANDS = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 30, 8)


@pytest.mark.parametrize(
    ("wanted", "outcome"), [("", pytest.skip.Exception), ("required", pytest.fail.Exception)]
)
def test_without_torch_mlir_these_tests_skip_unless_it_is_required(
    wanted: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch, without: Callable[[str], Any]
) -> None:
    monkeypatch.setenv("CLSA_MLIR", wanted)
    with pytest.raises(outcome, match="there is no torch-mlir"):
        without("there is no torch-mlir")


@pytest.mark.parametrize("ask", [lowering.version, lowering.table, lambda: lowering.parsed("f", "module {}")])
def test_without_torch_mlir_the_error_says_how_to_get_it(
    ask: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_mlir.ir", None)
    with pytest.raises(MissingMlirError, match=r"pip install torch-mlir.*use Python 3\.11"):
        ask()


@mlir
def test_contract_ops_stay_and_are_parsed_again() -> None:
    module = lowering.imported("f", program(select, *OPERANDS, table={}))
    assert module.operators == {"torch.clsa.index_topk": 1}
    assert 'torch.operator "torch.clsa.index_topk"' in module.text
    assert "func.func @f(" in module.text
    assert lowering.parsed("f", module.text).text == module.text


@mlir
def test_linalg_is_of_dialects_that_every_mlir_knows() -> None:
    module = lowering.lowered("f", lowering.imported("f", program(select, *OPERANDS)))
    assert module.operators == {}
    assert set(module.dialects) <= {
        "affine", "arith", "builtin", "cf", "func", "linalg", "math", "scf", "tensor",
    }  # fmt: skip
    assert lowering.parsed("f", module.text).text == module.text


@mlir
def test_torch_mlirs_own_dialects_are_parsed_again_too() -> None:
    module = lowering.lowered("f", lowering.imported("f", program(lambda x: x.cumsum(0), torch.ones(9))))
    assert "tm_tensor" in module.dialects
    assert lowering.parsed("f", module.text).text == module.text


@mlir
def test_an_op_that_cannot_be_lowered_is_named() -> None:
    module = lowering.imported("f", program(lambda x: x.histc(4, 0, 1), torch.rand(9)))
    with pytest.raises(MlirError, match=r"cannot lower the program 'f' to linalg: .*torch\.aten\.histc"):
        lowering.lowered("f", module)


@mlir
def test_an_op_that_is_left_at_the_end_is_named_and_not_its_constants() -> None:
    module = lowering.imported("f", program(lambda x: x.topk(2, largest=False), torch.rand(3, 9)))
    try:
        lowering.lowered("f", module)
    except MlirError as error:
        assert "torch.aten.topk" in str(error)  # noqa: PT017 (newer ones may lower it)


@mlir
def test_a_graph_that_cannot_be_imported_says_why() -> None:
    def branch(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    with pytest.raises(MlirError, match=r"torch-mlir cannot import the program 'f': .*cond"):
        lowering.imported("f", program(branch, torch.ones(3), table={}))


@mlir
@pytest.mark.parametrize("text", ["module {", "func.func @f() { return 1 }", "nonsense"])
def test_texts_that_are_no_mlir_are_refused(text: str) -> None:
    with pytest.raises(MlirError, match="the MLIR of 'f' does not parse"):
        lowering.parsed("f", text)


@mlir
def test_a_size_that_torch_mlir_guesses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without our own spelling of views, torch-mlir takes a size that varies for 1."""
    shapes = (({0: Dim("B", max=99), 1: Dim("T", max=99)},),)
    x = torch.randn(5, 7, 8)

    def view(x: Tensor) -> Tensor:
        return x.view(x.shape[0] * x.shape[1], 8)

    spelled = lowering.lowered("f", lowering.imported("f", program(view, x, shapes=shapes)))
    assert "tensor.collapse_shape" in spelled.text
    monkeypatch.setattr("clsa_compile.mlir.program._merge", lambda graph, node: None)
    with pytest.raises(MlirError, match=r"guesses a size in the program 'f': tensor<\?x\?x8xf32>"):
        lowering.lowered("f", lowering.imported("f", program(view, x, shapes=shapes)))
