"""kernels/sparse_attention/gather.py against `sparse_attention_reference`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.dispatch import run as dispatch
from clsa_compile.ir.masks import index_grid, parse_predicate, predicate_to_torch
from clsa_compile.ir.references import (
    mask_bounds_reference,
    select_topk_reference,
    sparse_attention_reference,
)
from clsa_compile.ir.variants import Facts
from clsa_compile.kernels.launch import is_latent
from clsa_compile.kernels.sparse_attention.gather import GATHER, plan, supports

Run = Callable[..., Any]


def random_indices(device: str, b: int, heads: int, s: int, t: int, topk: int, empty: float) -> Tensor:
    """Returns ascending unique positions; about a share `empty` of the rows ends in -1."""
    order = torch.rand(b, heads, s, max(t, topk), device=device).argsort(-1)[..., :topk]
    order = torch.where(order < t, order, t)
    keep = torch.randint(0, topk + 1, (b, heads, s, 1), device=device)
    keep = torch.where(torch.rand(b, heads, s, 1, device=device) < empty, keep, topk)
    order = torch.where(torch.arange(topk, device=device) < keep, order, t).sort(-1).values
    return torch.where(order < t, order, -1).to(torch.int32)


def arguments(
    device: str,
    sizes: tuple[int, int, int, int, int, int, int],
    topk: int,
    dtype: torch.dtype = torch.float32,
    heads: int = 1,
    empty: float = 0.5,
    mask: Tensor | None = None,
    inputs: tuple[Tensor, ...] = (),
    predicate: str = "",
    sinks: bool = False,
    softcap: float = 0.0,
) -> tuple[Any, ...]:
    b, h, hkv, s, t, d, dv = sizes
    q = torch.randn(b, h, s, d, device=device, dtype=dtype)
    k = torch.randn(b, hkv, t, d, device=device, dtype=dtype)
    v = torch.randn(b, hkv, t, dv, device=device, dtype=dtype)
    indices = random_indices(device, b, heads, s, t, topk, empty)
    sink = torch.randn(h, device=device, dtype=dtype) * 3 if sinks else None
    return (q, k, v, indices, mask, None, list(inputs), sink, d**-0.5, softcap, predicate)


SIZES = [
    ((1, 4, 2, 1, 300, 32, 32), 40),
    ((2, 6, 2, 3, 77, 16, 32), 77),
    ((1, 3, 3, 1, 65, 80, 48), 9),
    ((1, 2, 1, 12, 130, 24, 16), 20),
    ((1, 1, 1, 1, 600, 16, 16), 300),
    ((1, 2, 2, 1, 10, 16, 16), 24),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("sizes", "topk"), SIZES)
def test_sizes(device: str, run: Run, judge: Any, sizes: Any, topk: int, dtype: torch.dtype) -> None:
    args = arguments(device, sizes, topk, dtype)
    judge("sparse_attention")(run("sparse_attention", "gather", *args), args)


@pytest.mark.parametrize("below", [30, 60, 100, 200])
@pytest.mark.parametrize("rows", [1, 3, 12])
@pytest.mark.parametrize("predicate", ["kv <= q + in0(b)", "(kv <= q + in0(b)) & Ne(in1(b, kv), 0)", ""])
def test_rows_of_few_tokens_read_all_of_them(
    device: str, run: Run, judge: Any, predicate: str, rows: int, below: int
) -> None:
    """Sequences of 20, 60 and 150 tokens; the second predicate leaves holes, so its bounds are not exact."""
    b, t = 3, 150
    lengths = torch.tensor([20, 60, 149], device=device) - rows + 1
    inputs = (lengths, torch.randint(0, 4, (b, t), device=device))
    inputs = inputs[: predicate.count("in")] if predicate else ()
    args = list(arguments(device, (b, 4, 2, rows, t, 32, 32), 24, predicate=predicate, inputs=inputs))
    bounds = mask_bounds_reference(args[0], None, inputs, 4, t, predicate) if predicate else None
    # Tokens that were chosen under the mask, as passes have it.
    allowed = predicate_to_torch(parse_predicate(predicate), index_grid((b, 1, rows, t), device), inputs)
    allowed = allowed.expand(b, 1, rows, t) if predicate else torch.ones(b, 1, rows, t, device=device)
    scores = torch.where(allowed.bool(), torch.rand(b, 1, rows, t, device=device), -torch.inf)
    args[3] = select_topk_reference(scores, None, 24, 1, 2)
    args[5] = bounds
    whole = (*args, None, below)
    judge("sparse_attention")(run("sparse_attention", "gather", *whole), whole)
    chosen, everything = (sparse_attention_reference(*args, None, x) for x in (0, t))
    got = sparse_attention_reference(*whole)
    spans = torch.full((b, rows), t) if bounds is None else (bounds[..., 1] - bounds[..., 0]).cpu()
    for i in range(b):
        for row in range(rows):
            wanted = everything if spans[i, row] <= below else chosen
            torch.testing.assert_close(got[i, :, row], wanted[i, :, row], atol=1e-5, rtol=1e-4)


# Bounds by name, of a row that may read 20 of 40 tokens.
CALLERS_BOUNDS = {"exact": (0, 20), "loose": (0, 40), "beyond": (0, 400), "none": None}


@pytest.mark.parametrize("predicate", ["kv < in0(b)", ""])
@pytest.mark.parametrize("below", [2, 30, 100])
@pytest.mark.parametrize("name", CALLERS_BOUNDS)
def test_bounds_of_a_caller_may_be_loose(device: str, name: str, below: int, predicate: str) -> None:
    """Of the tokens that are named, some lie beyond the predicate."""
    inputs = (torch.tensor([20], device=device),) if predicate else ()
    args = list(arguments(device, (1, 4, 2, 1, 40, 32, 32), 4, predicate=predicate, inputs=inputs))
    args[3] = torch.tensor([0, 5, 25, 30], dtype=torch.int32, device=device).view(1, 1, 1, 4)
    span = CALLERS_BOUNDS[name]
    args[5] = span if span is None else torch.tensor([[span]], dtype=torch.int32, device=device)
    whole = (*args, None, below)
    exact = sparse_attention_reference(*whole)
    torch.testing.assert_close(dispatch("sparse_attention", (GATHER,), *whole), exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_set_per_kv_head_and_rows_without_tokens(device: str, run: Run, judge: Any, heads: int) -> None:
    args = arguments(device, (2, 4, 2, 2, 100, 32, 32), 24, heads=heads)
    args[3][0, :, 1] = -1
    judge("sparse_attention")(run("sparse_attention", "gather", *args), args)


@pytest.mark.parametrize("shape", [(1, 1, 1, 90), (2, 1, 3, 90), (2, 4, 3, 90), (1, 4, 1, 1)])
@pytest.mark.parametrize("kind", ["bool", "additive", "lowest"])
def test_mask_tensors(device: str, run: Run, judge: Any, shape: Any, kind: str) -> None:
    mask = torch.rand(shape, device=device) < 0.7
    mask.view(-1)[0] = True
    if kind != "bool":
        lowest = -math.inf if kind == "additive" else torch.finfo(torch.float32).min
        mask = torch.where(mask, torch.randn(shape, device=device), lowest)
    args = arguments(device, (2, 4, 2, 3, 90, 32, 32), 30, mask=mask)
    judge("sparse_attention")(run("sparse_attention", "gather", *args), args)


def test_predicates_sinks_and_softcap(device: str, run: Run, judge: Any) -> None:
    position = torch.tensor([40, 41, 42], device=device)
    padding = torch.rand(2, 90, device=device) < 0.8
    args = arguments(
        device,
        (2, 4, 2, 3, 90, 32, 32),
        50,
        inputs=(position, padding),
        predicate="(kv <= in0(q)) & Ne(in1(b, kv), 0) & (h < 3)",
        sinks=True,
        softcap=3.0,
    )
    judge("sparse_attention")(run("sparse_attention", "gather", *args), args)


@pytest.mark.parametrize("splits", ["split", "direct"])
def test_both_ways_of_writing_the_result(device: str, run: Run, judge: Any, splits: str) -> None:
    topk = 300 if splits == "split" else 100
    args = arguments(device, (1, 4, 2, 1, 400, 32, 16), topk, sinks=True)
    assert (plan(*args[:3], topk)[0] == 1) == (splits == "direct")
    judge("sparse_attention")(run("sparse_attention", "gather", *args), args)


@pytest.mark.parametrize("topk", [100, 300])
@pytest.mark.parametrize("sink", [-math.inf, -200.0, -90.0])
def test_low_sinks_of_any_stride_and_rows_without_keys(
    device: str, run: Run, judge: Any, sink: float, topk: int
) -> None:
    args = list(arguments(device, (2, 4, 2, 1, 400, 32, 16), topk))
    args[3][0] = -1
    args[7] = torch.tensor([[sink, 1.0], [0.5, 2.0], [sink, 3.0], [-1.0, 4.0]], device=device)[:, 0]
    judge("sparse_attention")(run("sparse_attention", "gather", *args), tuple(args))


# In the interpreter 128 heads are more programs of the same text as 40, whose last block is not full.
@pytest.mark.parametrize("heads", [3, 40, pytest.param(128, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_heads_share_a_latent_row(device: str, run: Run, judge: Any, heads: int, dtype: Any) -> None:
    """MLA as engines hold it: one row of 512 + 64 a token for all heads, values its first 512 columns."""
    args = list(arguments(device, (2, heads, 1, 1, 200, 576, 512), 70, dtype))
    args[2] = args[1][..., :512]
    assert is_latent(args[1], args[2])
    judge("sparse_attention")(run("sparse_attention", "gather", *args), tuple(args))
    copied = [*args[:2], args[2].clone(), *args[3:]]
    assert not is_latent(copied[1], copied[2])
    judge("sparse_attention")(run("sparse_attention", "gather", *copied), tuple(copied))


def test_all_tokens_selected_is_dense_attention(device: str, run: Run) -> None:
    args = arguments(device, (1, 4, 2, 1, 64, 32, 32), 64, empty=0.0)
    dense, _ = run("attention", "decode", *args[:3], *args[4:])
    torch.testing.assert_close(run("sparse_attention", "gather", *args), dense, atol=2e-6, rtol=1e-5)


def test_caches_of_any_strides_are_read_in_place(device: str, run: Run, judge: Any) -> None:
    args = list(arguments(device, (2, 4, 2, 1, 60, 32, 32), 20))
    wide = torch.randn(2, 60, 2, 96, device=device)
    args[1], args[2] = wide[..., :32].transpose(1, 2), wide[..., 32:64].transpose(1, 2)
    judge("sparse_attention")(run("sparse_attention", "gather", *args), tuple(args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("sizes", "topk"),
    [
        ((1, 24, 8, 1, 8192, 128, 128), 2048),
        ((4, 24, 8, 1, 8192, 128, 128), 2048),
        ((1, 8, 1, 3, 2048, 64, 64), 500),
        ((2, 4, 4, 8, 1000, 80, 80), 256),
        ((1, 16, 16, 1, 3000, 192, 128), 1024),
        ((1, 8, 4, 1, 2500, 256, 256), 256),
        ((1, 8, 2, 700, 1000, 128, 128), 200),
    ],
)
def test_on_the_chip(run: Run, judge: Any, sizes: Any, topk: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = arguments("cuda", sizes, topk, dtype)
    judge("sparse_attention")(run("sparse_attention", "gather", *args), args)


@pytest.mark.gpu
@pytest.mark.parametrize("s", [1, 4, 8, 33])
def test_everything_on(run: Run, judge: Any, s: int) -> None:
    torch.manual_seed(s)
    mask = torch.randn(2, 1, s, 3000, device="cuda", dtype=torch.bfloat16)
    mask[:, :, :, 2000:] = -math.inf
    mask[1, :, 0] = torch.finfo(torch.bfloat16).min
    position = torch.arange(1900, 1900 + s, device="cuda")
    args = arguments(
        "cuda",
        (2, 8, 2, s, 3000, 128, 128),
        512,
        torch.bfloat16,
        2,
        0.5,
        mask,
        (position,),
        "kv <= in0(q)",
        sinks=True,
        softcap=30.0,
    )
    judge("sparse_attention")(run("sparse_attention", "gather", *args), args)


@pytest.mark.gpu
def test_every_launch_gives_the_same_bits(run: Run, repeats: range) -> None:
    torch.manual_seed(0)
    args = arguments("cuda", (2, 24, 8, 1, 40000, 128, 128), 2048, torch.bfloat16)
    expected = run("sparse_attention", "gather", *args)
    for _ in repeats:
        assert torch.equal(run("sparse_attention", "gather", *args), expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits(run: Run) -> None:
    """Rows of one sequence lie further apart than 32 bits can say, in K and in V."""
    t, h, d, topk = 1 << 21, 8, 192, 512
    q = torch.randn(1, h, 1, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.zeros(1, t, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "kv")
    indices = t - topk * 7 + 7 * torch.arange(topk, device="cuda", dtype=torch.int32)
    for x in (k, v):
        x[:, :, -topk * 7 :] = torch.randn(1, h, topk * 7, d, device="cuda")
        assert (t - topk * 7) * x.stride(2) > 2**31
    args = (q, k, v, indices.view(1, 1, 1, -1), None, None, [], None, d**-0.5, 0.0, "")
    rows = (x[:, :, indices.long()].float() for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), *rows)
    got = run("sparse_attention", "gather", *args)
    torch.testing.assert_close(got.float(), expected, atol=2e-2, rtol=2e-2)


def test_what_is_refused_has_a_reason() -> None:
    known: dict[str, Any] = {
        "op": "sparse_attention", "device": "cuda", "dtype": torch.bfloat16, "B": None, "H": 8, "Hkv": 2,
        "S": None, "T": None, "D": 64, "Dv": 64, "topk": 64, "softcap": True, "sinks": True,
        "additive": True, "lse_used": False,
    }  # fmt: skip
    assert supports(Facts(**known)).ok
    assert supports(Facts(**(known | {"H": 256, "Hkv": 1}))).ok, "in blocks of heads"
    support = supports(Facts(**(known | {"D": 1024})))
    assert not support.ok
    assert support.reason
