"""kernels/dense_attention/decode.py against `attention_reference`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.ir.references import mask_bounds_reference
from clsa_compile.ir.variants import Facts
from clsa_compile.kernels.dense_attention import decode
from clsa_compile.kernels.dense_attention.decode import plan, supports
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
    q = torch.randn(b, h, s, d, device=device, dtype=dtype)
    k = torch.randn(b, hkv, t, d, device=device, dtype=dtype)
    v = torch.randn(b, hkv, t, dv, device=device, dtype=dtype)
    around = mask_bounds_reference(q, mask, inputs, h, t, predicate) if bounds else None
    sink = torch.randn(h, device=device, dtype=dtype) * 3 if sinks else None
    return (q, k, v, mask, around, list(inputs), sink, d**-0.5, softcap, predicate)


# In the interpreter 128 heads are more programs of the same text as 40, whose last block is not full.
@pytest.mark.parametrize(("heads", "s"), [(3, 2), (40, 1), pytest.param(128, 1, marks=pytest.mark.gpu)])
def test_many_heads_share_a_latent_row(device: str, run: Run, judge: Any, heads: int, s: int) -> None:
    """MLA as engines hold it: one row of 512 + 64 a token for all heads, values its first 512 columns."""
    args = list(arguments(device, (2, heads, 1, s, 100, 576, 512), torch.float16))
    args[2] = args[1][..., :512]
    assert is_latent(args[1], args[2])
    judge("attention")(run("attention", "decode", *args), tuple(args))


def random_mask(device: str, *sizes: int, share: float = 0.5) -> Tensor:
    return torch.rand(sizes, device=device) < share


SIZES = [
    (1, 4, 2, 1, 100, 32, 32),
    (2, 6, 2, 3, 77, 16, 32),
    (1, 3, 3, 1, 65, 80, 48),
    (1, 2, 1, 8, 130, 24, 16),
    (1, 1, 1, 1, 1, 16, 16),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes(device: str, run: Run, judge: Any, sizes: Any, dtype: torch.dtype) -> None:
    args = arguments(device, sizes, dtype)
    judge("attention")(run("attention", "decode", *args), args)


@pytest.mark.parametrize("shape", [(1, 1, 1, 90), (2, 1, 3, 90), (2, 4, 3, 90), (1, 4, 1, 1), (3, 90)])
@pytest.mark.parametrize("kind", ["bool", "additive", "lowest"])
def test_mask_tensors(device: str, run: Run, judge: Any, shape: Any, kind: str) -> None:
    mask = random_mask(device, *shape)
    mask.view(-1)[0] = True
    if len(shape) == 4 and shape[2] == 3:
        mask[0, 0, 1] = False
    if kind != "bool":
        lowest = -math.inf if kind == "additive" else torch.finfo(torch.float32).min
        mask = torch.where(mask, torch.randn(shape, device=device), lowest)
    args = arguments(device, (2, 4, 2, 3, 90, 32, 32), mask=mask)
    judge("attention")(run("attention", "decode", *args), args)


def test_predicates_read_their_inputs(device: str, run: Run, judge: Any) -> None:
    position = torch.tensor([40, 41, 42], device=device)
    padding = torch.rand(2, 90, device=device) < 0.8
    heads = torch.tensor([1, 0, 1, 1], device=device, dtype=torch.int32)
    predicate = "(kv <= in0(q)) & Ne(in1(b, kv), 0) & (Eq(mod(h, 2), 1) | (kv > in2(h) - 3 + floordiv(q, 2)))"
    args = arguments(
        device,
        (2, 4, 2, 3, 90, 32, 32),
        inputs=(position, padding, heads),
        predicate=predicate,
        bounds=True,
    )
    judge("attention")(run("attention", "decode", *args), args)


@pytest.mark.parametrize("valid", [0, 1, 33, 200])
def test_bounds_and_empty_rows(device: str, run: Run, judge: Any, valid: int) -> None:
    mask = torch.zeros(2, 1, 2, 200, dtype=torch.bool, device=device)
    mask[0, 0, 0, :valid] = True
    mask[1, 0, 1, max(0, 150 - valid) : 150] = True
    args = arguments(device, (2, 4, 2, 2, 200, 32, 32), mask=mask, bounds=True)
    judge("attention")(run("attention", "decode", *args), args)


def test_what_lies_outside_the_bounds_is_not_read(
    device: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In one split: of several, those that see nothing valid are left out of the result.
    monkeypatch.setattr(decode, "plan", lambda *operands: (1, *plan(*operands)[1:]))
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool, device=device)
    mask[..., 170:240] = True
    args = arguments(device, (1, 4, 2, 1, 300, 32, 32), mask=mask, bounds=True)
    block_n = plan(*args[:3])[2]
    before = 170 // block_n * block_n
    assert before > block_n
    expected = run("attention", "decode", *args)[0]
    for x in args[1:3]:
        x[:, :, :before], x[:, :, 240:] = math.nan, math.nan
    assert torch.equal(run("attention", "decode", *args)[0], expected)


@pytest.mark.parametrize("splits", ["split", "direct"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_sinks_and_softcap(
    device: str, run: Run, judge: Any, splits: str, sinks: bool, softcap: float
) -> None:
    t = 100 if splits == "split" else 20
    args = arguments(device, (1, 4, 2, 2, t, 32, 16), sinks=sinks, softcap=softcap)
    assert (plan(*args[:3])[0] == 1) == (splits == "direct")
    judge("attention")(run("attention", "decode", *args), args)


@pytest.mark.parametrize("splits", ["split", "direct"])
@pytest.mark.parametrize("sink", [-math.inf, -200.0, -90.0])
def test_low_sinks_and_rows_without_keys(device: str, run: Run, judge: Any, sink: float, splits: str) -> None:
    t = 100 if splits == "split" else 20
    mask = torch.ones(1, 1, 2, t, dtype=torch.bool, device=device)
    mask[:, :, 0] = False
    args = list(arguments(device, (1, 4, 2, 2, t, 32, 16), mask=mask))
    args[6] = torch.full((4,), sink, device=device)
    assert (plan(*args[:3])[0] == 1) == (splits == "direct")
    judge("attention")(run("attention", "decode", *args), tuple(args))


@pytest.mark.parametrize("t", [20, 100])
def test_sinks_of_any_stride(device: str, run: Run, judge: Any, t: int) -> None:
    args = list(arguments(device, (1, 4, 2, 1, t, 32, 16)))
    args[6] = torch.randn(4, 3, device=device)[:, 1]
    judge("attention")(run("attention", "decode", *args), tuple(args))


def test_caches_of_any_strides_are_read_in_place(device: str, run: Run, judge: Any) -> None:
    args = list(arguments(device, (2, 4, 2, 1, 60, 32, 32)))
    wide = torch.randn(2, 60, 2, 96, device=device)
    args[1], args[2] = wide[..., :32].transpose(1, 2), wide[..., 32:64].transpose(1, 2)
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    judge("attention")(run("attention", "decode", *args), tuple(args))


def test_nan_reaches_its_row_only(device: str, run: Run) -> None:
    args = arguments(device, (1, 4, 2, 1, 60, 32, 32))
    args[0][0, 1] = math.nan
    out, _ = run("attention", "decode", *args)
    assert out[0, 1].isnan().all()
    assert not out[0, [0, 2, 3]].isnan().any()


# --- on the chip only: bf16, real sizes, and what a race would show ---


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 24, 8, 1, 8192, 128, 128),
        (4, 24, 8, 1, 4099, 128, 128),
        (1, 8, 1, 3, 2048, 64, 64),
        (2, 4, 4, 8, 1000, 80, 80),
        (1, 12, 4, 2, 1500, 96, 96),
        (1, 16, 16, 1, 3000, 192, 128),
        (1, 8, 4, 1, 2500, 256, 256),
    ],
)
def test_on_the_chip(run: Run, judge: Any, sizes: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = arguments("cuda", sizes, dtype)
    judge("attention")(run("attention", "decode", *args), args)


@pytest.mark.gpu
@pytest.mark.parametrize("s", range(1, 9))
def test_speculative_rows_with_everything_on(run: Run, judge: Any, s: int) -> None:
    torch.manual_seed(s)
    mask = torch.randn(2, 1, s, 3000, device="cuda", dtype=torch.bfloat16)
    mask[:, :, :, 2000:] = -math.inf
    mask[1, :, 0] = -math.inf
    position = torch.arange(1900, 1900 + s, device="cuda")
    args = arguments(
        "cuda",
        (2, 8, 2, s, 3000, 128, 128),
        torch.bfloat16,
        mask,
        (position,),
        "kv <= in0(q)",
        bounds=True,
        sinks=True,
        softcap=30.0,
    )
    judge("attention")(run("attention", "decode", *args), args)


@pytest.mark.gpu
def test_every_launch_gives_the_same_bits(run: Run, repeats: range) -> None:
    torch.manual_seed(0)
    args = arguments("cuda", (2, 24, 8, 1, 40000, 128, 128), torch.bfloat16)
    expected = run("attention", "decode", *args)
    for _ in repeats:
        for got, want in zip(run("attention", "decode", *args), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits(run: Run) -> None:
    """Rows of one sequence lie further apart than 32 bits can say, in K and in V; the last ones win."""
    t, h, d, last = 1 << 21, 8, 192, 64
    q = torch.randn(1, h, 1, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.zeros(1, t, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "kv")
    k[:, :, -last:] = 3 * q + 0.1 * torch.randn(1, h, last, d, device="cuda")
    v[:, :, -last:] = torch.randn(1, h, last, d, device="cuda")
    assert (t - last) * k.stride(2) > 2**31
    assert (t - last) * v.stride(2) > 2**31
    assert not is_latent(k, v)
    out, lse = run("attention", "decode", q, k, v, None, None, [], None, d**-0.5, 0.0, "")
    ends = (x[:, :, -last:].float() for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), *ends)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    assert lse.isfinite().all()


def facts(**changes: Any) -> Facts:
    known: dict[str, Any] = {
        "op": "attention", "device": "cuda", "dtype": torch.bfloat16, "B": 1, "H": 8, "Hkv": 2, "S": 1,
        "T": 100, "D": 64, "Dv": 64, "topk": 0, "softcap": True, "sinks": True, "additive": True,
        "lse_used": True,
    }  # fmt: skip
    return Facts(**(known | changes))


def test_what_is_refused_has_a_reason() -> None:
    assert supports(facts()).ok
    assert supports(facts(H=256, Hkv=1)).ok, "in blocks of heads"
    for changes in (
        {"S": 9},
        {"S": None},
        {"D": 1024},
        {"dtype": torch.float64},
        {"mixed": True},
        {"B": 0},
        {"T": 0},
    ):
        support = supports(facts(**changes))
        assert not support.ok
        assert support.reason
