"""kernels/dense_attention/sdpa.py against `attention_reference`; torch's own kernels, so any device."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from clsa_compile.ir.references import attention_reference
from clsa_compile.ir.variants import Facts
from clsa_compile.kernels.dense_attention.sdpa import supports

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Run = Callable[..., Any]


def arguments(
    where: str, s: int, t: int, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Any, ...]:
    torch.manual_seed(0)
    b, h, hkv, d = 2, 4, 2, 32
    q = torch.randn(b, s, h, d, device=where, dtype=dtype).transpose(1, 2)
    k = torch.randn(b, hkv, t, d, device=where, dtype=dtype)
    v = torch.randn(b, hkv, t, d, device=where, dtype=dtype)
    return (
        q, k, v, changes.get("mask"), None, changes.get("inputs", []), None, d**-0.5, 0.0,
        changes.get("predicate", ""),
    )  # fmt: skip


def check(run: Run, args: tuple[Any, ...], rows: torch.Tensor | None = None) -> None:
    out, lse = run("attention", "sdpa", *args)
    expected, expected_lse = attention_reference(*args)
    assert lse.shape == expected_lse.shape
    assert out.transpose(1, 2).is_contiguous()
    tolerance = 3e-6 if args[0].dtype == torch.float32 else 3e-2
    if rows is None:
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
        return
    torch.testing.assert_close(out[rows], expected[rows], atol=tolerance, rtol=tolerance)
    assert (out[~rows] == 0).all()


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("predicate", ["", "kv <= q", "q >= kv", "kv <= q + 20", "kv < 7"])
@pytest.mark.parametrize("t", [24, 44])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicates(where: str, run: Run, predicate: str, t: int, dtype: torch.dtype) -> None:
    check(run, arguments(where, 24, t, dtype, predicate=predicate))


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("kind", ["bool", "additive", "lowest"])
@pytest.mark.parametrize("predicate", ["", "kv <= q + 20"])
def test_masks_and_rows_without_keys(where: str, run: Run, kind: str, predicate: str) -> None:
    torch.manual_seed(1)
    allowed = torch.rand(2, 1, 24, 44, device=where) < 0.5
    allowed[..., 0] = True
    allowed[1, 0, 5] = False
    mask = allowed
    if kind != "bool":
        lowest = -math.inf if kind == "additive" else torch.finfo(torch.float32).min
        mask = torch.where(allowed, torch.randn(allowed.shape, device=where), lowest)
    args = arguments(where, 24, 44, mask=mask, predicate=predicate)
    check(run, args, allowed.any(-1).expand(2, 4, 24))


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("shape", [(24, 44), (44,), (4, 1, 44), (1, 4, 24, 1)])
def test_masks_of_fewer_dimensions(where: str, run: Run, shape: tuple[int, ...]) -> None:
    mask = torch.randn(shape, device=where)
    check(run, arguments(where, 24, 44, mask=mask))
    check(run, arguments(where, 24, 44, mask=mask, predicate="kv <= q + 20"))


@pytest.mark.parametrize("where", DEVICES)
def test_nan_of_a_valid_row_is_not_hidden(where: str, run: Run) -> None:
    mask = torch.ones(1, 1, 24, 44, dtype=torch.bool, device=where)
    mask[0, 0, 3] = False
    args = arguments(where, 24, 44, mask=mask)
    args[0][0, 1, 2] = math.nan
    out, _ = run("attention", "sdpa", *args)
    assert out[0, 1, 2].isnan().all()
    assert (out[:, :, 3] == 0).all()


def test_what_is_refused_has_a_reason() -> None:
    known: dict[str, Any] = {
        "op": "attention", "device": "cuda", "dtype": torch.bfloat16, "B": None, "H": 8, "Hkv": 2,
        "S": None, "T": None, "D": 64, "Dv": 64, "topk": 0, "softcap": False, "sinks": False,
        "additive": True, "lse_used": False,
    }  # fmt: skip
    assert supports(Facts(**known)).ok
    for name in ("softcap", "sinks", "lse_used", "paged"):
        support = supports(Facts(**(known | {name: True})))
        assert not support.ok
        assert support.reason
    written_out = known | {"formula": True}
    assert "written out it has S x T elements" in supports(Facts(**written_out)).reason
    assert supports(Facts(**(written_out | {"D": 640}))).ok, "no other kernel takes such wide heads"
    assert supports(Facts(**(written_out | {"device": "cpu"}))).ok, "there is no other kernel"
