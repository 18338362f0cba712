"""The engine gives what torch gives, refuses what does not fit, and frees what it made."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from clsa_compile.errors import MlirError
from clsa_compile.mlir import engine, lowering
from clsa_compile.mlir.engine import Engine
from clsa_compile.mlir.manifest import ProgramFiles
from clsa_compile.mlir.program import functional

pytestmark = pytest.mark.mlir


class Various(nn.Module):
    """Results of many kinds: an input as it came, a constant, a number, a turned one, an empty one, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))

    def forward(self, x: Tensor, cache: Tensor) -> Any:
        cache.add_(1)
        fixed = torch.ones(2, dtype=torch.int64)
        return x, fixed, (x * self.weight).sum(), x > 0, x.t(), x[:, :0], self.weight, x.to(torch.bfloat16)


def compiled(module: nn.Module, *args: Any, shapes: Any = None) -> Engine:
    with torch.no_grad():
        program = torch.export.export(module, args, strict=False, dynamic_shapes=shapes)
    found = functional("f", program, lowering.table())
    lowered = lowering.lowered("f", lowering.imported("f", found))
    ranges = {str(s): (int(r.lower), int(r.upper)) for s, r in program.range_constraints.items()}
    files = ProgramFiles("f", {}, found.arguments, found.results, ranges, {}, {})
    return Engine(files, lowered, {k: v for k, v in found.tensors.items() if isinstance(v, Tensor)})


@pytest.fixture(scope="module")
def various() -> Engine:
    shapes = {"x": {0: Dim("B", min=2, max=9)}, "cache": {0: Dim("B", min=2, max=9)}}
    return compiled(Various(), torch.randn(5, 3), torch.zeros(5), shapes=shapes)


@pytest.mark.parametrize("batch", [2, 4, 9])
def test_results_are_torchs_and_inputs_stay(various: Engine, batch: int) -> None:
    # Sums of these are exact in any order; bfloat16 rounds them.
    x, cache = torch.randint(-512, 512, (batch, 3)) / 64, torch.randn(batch)
    given = {"x": x.clone(), "cache": cache.clone()}
    found = various(given)
    assert torch.equal(given["cache"], cache), "an input was written"
    with torch.no_grad():
        wanted = Various()(x, cache)
    assert torch.equal(found.pop("cache"), cache)
    assert list(found) == [f"output_{i}" for i in range(len(wanted))]
    torch.testing.assert_close(list(found.values()), [w.detach() for w in wanted], atol=0, rtol=0)


def test_inputs_of_any_strides_are_taken(various: Engine) -> None:
    x = torch.randn(3, 4).t()
    assert torch.equal(various({"x": x, "cache": torch.zeros(4)})["output_4"], x.t())


def test_memory_is_given_back(various: Engine) -> None:
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    big = compiled(nn.Softmax(dim=-1), torch.randn(1000, 1000))
    for _ in range(3):
        big({"input": torch.randn(1000, 1000)})
    before = peak()
    for _ in range(30):  # 4 MB each, and as much in between
        big({"input": torch.randn(1000, 1000)})
    assert peak() - before < 40_000  # KB


X, CACHE = torch.zeros(4, 3), torch.zeros(4)
UNFIT = [
    ({"x": X}, "the call of 'f' lacks 'cache'; it takes x, cache"),
    ({"x": X, "cache": CACHE, "y": X}, "does not take 'y'"),
    ({"x": X.double(), "cache": CACHE}, r"'x' is float64\[4, 3\] on cpu; the program 'f' takes float32"),
    ({"x": torch.zeros(4, 2), "cache": CACHE}, r"'x' is float32\[4, 2\]"),
    ({"x": torch.zeros(4, 3, 1), "cache": CACHE}, r"'x' is float32\[4, 3, 1\]"),
    ({"x": X, "cache": torch.zeros(5)}, r"'cache' is float32\[5\] .* \(2 to 9; 4 here\)"),
    ({"x": torch.zeros(10, 3), "cache": torch.zeros(10)}, r"'x' is float32\[10, 3\]"),
    ({"x": X, "cache": CACHE, "p_weight": torch.zeros(2)}, r"'p_weight' is float32\[2\]"),
]


@pytest.mark.parametrize(("given", "message"), UNFIT)
def test_inputs_that_do_not_fit_are_refused(various: Engine, given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(MlirError, match=message):
        various(given)


def test_weights_that_are_missing_are_named() -> None:
    files = ProgramFiles("f", {}, functional_arguments(), (), {}, {}, {})
    with pytest.raises(MlirError, match=r"'f' needs 1 more tensors, as 'weight'"):
        Engine(files, lowering.parsed("f", "module {}"), {})


def functional_arguments() -> Any:
    program = torch.export.export(nn.Linear(2, 2, bias=False), (torch.ones(1, 2),))
    return functional("f", program, {}).arguments


def test_programs_that_llvm_cannot_compile_in_one_piece_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_LARGEST", 2)
    with pytest.raises(MlirError, match=r"operations, .* as one function: 2 at most.*IREE"):
        compiled(nn.Softmax(dim=-1), torch.randn(3, 3))
