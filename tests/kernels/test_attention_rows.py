"""kernels/dense_attention/rows.py against `attention_reference`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.ir.references import mask_bounds_reference
from clsa_compile.ir.variants import Facts
from clsa_compile.kernels.dense_attention.rows import plan, supports
from clsa_compile.kernels.launch import is_latent

Run = Callable[..., Any]


def arguments(
    device: str,
    sizes: tuple[int, int, int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    inputs: tuple[Tensor, ...] = (),
    predicate: str = "",
    bounds: bool = False,
    sinks: bool = False,
    softcap: float = 0.0,
) -> tuple[Any, ...]:
    b, h, hkv, s, t, d, dv = sizes
    q = torch.randn(b, s, h, d, device=device, dtype=dtype).transpose(1, 2)
    k = torch.randn(b, hkv, t, d, device=device, dtype=dtype)
    v = torch.randn(b, hkv, t, dv, device=device, dtype=dtype)
    around = mask_bounds_reference(q, mask, inputs, h, t, predicate) if bounds else None
    sink = torch.randn(h, device=device, dtype=dtype) * 3 if sinks else None
    return (q, k, v, mask, around, list(inputs), sink, d**-0.5, softcap, predicate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(1, 4, 2, 70, 90, 32, 32), (2, 3, 3, 9, 33, 80, 48), (1, 2, 1, 1, 5, 24, 16)]
)
def test_sizes(device: str, run: Run, judge: Any, sizes: Any, dtype: torch.dtype) -> None:
    args = arguments(device, sizes, dtype)
    judge("attention")(run("attention", "rows", *args), args)


@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize("predicate", ["kv <= q", "(kv <= q + 20) & (kv > q + 10)"])
def test_predicates_and_bounds(device: str, run: Run, judge: Any, predicate: str, bounds: bool) -> None:
    args = arguments(device, (2, 4, 2, 70, 90, 32, 32), predicate=predicate, bounds=bounds)
    judge("attention")(run("attention", "rows", *args), args)


def test_what_lies_outside_the_bounds_is_not_read(device: str, run: Run) -> None:
    predicate = "(kv <= q + 100) & (kv > q + 80)"
    args = arguments(device, (1, 4, 2, 20, 200, 32, 32), predicate=predicate, bounds=True)
    block_n = plan(*args[1:3])[1]
    before = 81 // block_n * block_n
    assert before > block_n
    expected = run("attention", "rows", *args)[0]
    for x in args[1:3]:
        x[:, :, :before], x[:, :, 120:] = math.nan, math.nan
    assert torch.equal(run("attention", "rows", *args)[0], expected)


@pytest.mark.parametrize("shape", [(1, 1, 1, 90), (2, 4, 40, 90), (1, 1, 40, 90), (40, 90)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_mask_tensors_sinks_and_softcap(device: str, run: Run, judge: Any, shape: Any, kind: str) -> None:
    mask = torch.rand(shape, device=device) < 0.5
    mask[..., 0] = True
    mask[..., -1, 0] = len(shape) == 4 and shape[2] == 1
    if kind == "additive":
        mask = torch.where(mask, torch.randn(shape, device=device), -math.inf)
    args = arguments(device, (2, 4, 2, 40, 90, 32, 32), mask=mask, bounds=True, sinks=True, softcap=2.0)
    judge("attention")(run("attention", "rows", *args), args)


@pytest.mark.parametrize("sink", [-math.inf, -200.0, -90.0])
def test_low_sinks_of_any_stride_and_rows_without_keys(
    device: str, run: Run, judge: Any, sink: float
) -> None:
    args = list(arguments(device, (1, 4, 2, 10, 20, 32, 32), predicate="kv < q"))
    args[6] = torch.tensor([[sink, 1.0], [0.5, 2.0], [sink, 3.0], [-1.0, 4.0]], device=device)[:, 0]
    judge("attention")(run("attention", "rows", *args), tuple(args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 8, 2, 1000, 1300, 128, 128),
        (2, 4, 4, 300, 300, 80, 80),
        (1, 4, 4, 500, 600, 192, 128),
        (1, 4, 2, 200, 700, 256, 256),
    ],
)
def test_on_the_chip(run: Run, judge: Any, sizes: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = arguments("cuda", sizes, dtype, predicate="kv <= q + 100", bounds=True, sinks=True, softcap=20.0)
    judge("attention")(run("attention", "rows", *args), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mask", [False, True])
def test_prompts_over_latent_rows(device: str, run: Run, judge: Any, mask: bool, dtype: torch.dtype) -> None:
    """MLA as engines hold it: one row of 512 + 64 a token for all heads, values its first 512 columns."""
    sizes = (1, 3, 1, 37, 50, 576, 512)
    allowed = torch.rand(1, 1, 37, 50, device=device) < 0.7 if mask else None
    args = list(arguments(device, sizes, dtype, mask=allowed, predicate="kv <= q + 13", bounds=True))
    args[2] = args[1][..., :512]
    assert is_latent(args[1], args[2])
    judge("attention")(run("attention", "rows", *args), tuple(args))
    copied = [*args[:2], args[2].clone(), *args[3:]]
    assert not is_latent(copied[1], copied[2])
    judge("attention")(run("attention", "rows", *copied), tuple(copied))


def test_wide_heads(device: str, run: Run, judge: Any) -> None:
    args = arguments(device, (1, 2, 1, 20, 40, 320, 288), torch.float16, sinks=True, softcap=5.0)
    judge("attention")(run("attention", "rows", *args), args)


@pytest.mark.gpu
@pytest.mark.parametrize(("s", "t", "heads"), [(512, 700, 128), (300, 4096, 16)])
def test_latent_prompts_on_the_chip(run: Run, judge: Any, s: int, t: int, heads: int) -> None:
    torch.manual_seed(0)
    sizes = (2, heads, 1, s, t, 576, 512)
    args = list(arguments("cuda", sizes, torch.bfloat16, predicate=f"kv <= q + {t - s}", bounds=True))
    args[2] = args[1][..., :512]
    judge("attention")(run("attention", "rows", *args), tuple(args))


@pytest.mark.gpu
def test_every_launch_gives_the_same_bits(run: Run, repeats: range) -> None:
    torch.manual_seed(0)
    args = arguments("cuda", (2, 8, 2, 500, 700, 128, 128), torch.bfloat16, predicate="kv <= q", bounds=True)
    expected = run("attention", "rows", *args)
    for _ in repeats:
        for got, want in zip(run("attention", "rows", *args), expected, strict=True):
            assert torch.equal(got, want)


def test_what_is_refused_has_a_reason() -> None:
    known: dict[str, Any] = {
        "op": "attention", "device": "cuda", "dtype": torch.bfloat16, "B": None, "H": 8, "Hkv": 2,
        "S": None, "T": None, "D": 64, "Dv": 64, "topk": 0, "softcap": True, "sinks": True,
        "additive": True, "lse_used": True,
    }  # fmt: skip
    assert supports(Facts(**known)).ok
    for changes in ({"dtype": torch.float64}, {"D": 640}, {"mixed": True}, {"B": 0}, {"T": 0}):
        support = supports(Facts(**(known | changes)))
        assert not support.ok
        assert support.reason
