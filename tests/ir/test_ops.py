"""The contract ops as torch sees them: schemas, fakes against what is computed, and what an import costs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clsa_compile.ir.ops import DECODE_ROWS, contract_op
from clsa_compile.ir.references import REFERENCES
from clsa_compile.ir.scores import LIGHTNING


@pytest.mark.parametrize("op", list(REFERENCES))
@pytest.mark.parametrize("s", [1, DECODE_ROWS + 2])
def test_fakes_have_the_shapes_and_dtypes_of_the_references(operands: Any, op: str, s: int) -> None:
    target = getattr(torch.ops.clsa, op).default
    real = target(*operands(op, s))
    mode = FakeTensorMode()
    faked = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in operands(op, s)]
    with mode:
        fake = target(*faked)
    for one, two in zip(*((x if isinstance(x, tuple) else (x,)) for x in (real, fake)), strict=True):
        assert one.shape == two.shape
        assert one.dtype == two.dtype


@pytest.mark.parametrize("op", list(REFERENCES))
def test_ops_are_functional_and_pass_torchs_own_checks(operands: Any, op: str) -> None:
    target = getattr(torch.ops.clsa, op).default
    assert not target._schema.is_mutable
    torch.library.opcheck(target, operands(op), test_utils=("test_schema", "test_faketensor"))


def test_indices_are_int32_and_positions_are_not_lost_in_long_sequences() -> None:
    # B * T * D is beyond int32: only fakes can be this long here.
    mode = FakeTensorMode()
    with mode:
        q = torch.empty(4, 8, 1, 128, dtype=torch.bfloat16)
        k = torch.empty(4, 1, 2**26, 128, dtype=torch.bfloat16)
        indices = torch.ops.clsa.index_topk(
            q, k, torch.empty(4, 8, 1), None, None, None, [], 2048, 1.0, LIGHTNING.text, "", False
        )
        out = torch.ops.clsa.sparse_attention(q, k, k, indices, None, None, [], None, 1.0, 0.0, "")
        bounds = torch.ops.clsa.mask_bounds(q, None, [], 1, 2**26, "kv <= q")
    assert indices.dtype == bounds.dtype == torch.int32
    assert tuple(indices.shape) == (4, 1, 1, 2048)
    assert tuple(out.shape) == (4, 8, 1, 128)


def test_contract_ops_are_told_from_others() -> None:
    assert {contract_op(getattr(torch.ops.clsa, op).default) for op in REFERENCES} == set(REFERENCES)
    assert contract_op(torch.ops.aten.add.Tensor) is None
    assert contract_op(torch.add) is None
    assert contract_op("placeholder") is None


def test_ops_are_there_at_once_and_what_they_compute_when_it_is_asked_for() -> None:
    program = """
import sys, clsa_compile, torch
print("sympy" in sys.modules, end=" ")
mass = torch.tensor([[[[1.0, 3.0, 2.0]]]])
print(torch.ops.clsa.select_topk(mass, None, 2, 0, 0).tolist(), "sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False [[[[1, 2]]]] True\n"
