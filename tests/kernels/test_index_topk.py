"""kernels/index_topk/{decode,rows,pooled}.py against `index_topk_reference`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.ir.references import index_scores_reference, index_topk_reference, mask_bounds_reference
from clsa_compile.ir.scores import DOT_PRODUCT, LIGHTNING, MASS, MAX_HEAD, SCORES, parse_score
from clsa_compile.kernels.device import Device
from clsa_compile.kernels.index_topk import decode
from clsa_compile.kernels.index_topk import select as select_module
from clsa_compile.kernels.launch import padded_width

Run = Callable[..., Any]
VARIANTS = ["decode", "rows"]


def arguments(
    device: str,
    sizes: tuple[int, int, int, int, int, int],
    topk: int,
    score: str,
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    inputs: tuple[Tensor, ...] = (),
    predicate: str = "",
    bounds: bool = False,
    per_kv_head: bool = False,
    whole: bool = False,
) -> tuple[Any, ...]:
    """Returns contract arguments; `whole` numbers make every sum exact, and ties frequent."""
    b, h, hkv, s, t, d = sizes

    def draw(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-2, 3, shape, device=device).to(dtype)
        return torch.randn(shape, device=device).to(dtype)

    q, k = draw(b, h, s, d), draw(b, hkv, t, d)
    parsed = parse_score(score)
    weight = draw(b, h, s) if parsed.uses_weight else None
    lse = torch.randn(b, h, s, device=device) + 3 if parsed.uses_lse else None
    around = mask_bounds_reference(q, mask, inputs, 1, t, predicate) if bounds else None
    scale = 0.5 if whole else d**-0.5
    return (q, k, weight, lse, mask, around, list(inputs), topk, scale, score, predicate, per_kv_head)


def scores_of(args: tuple[Any, ...]) -> Tensor:
    """Returns the float64 scores of contract arguments."""
    q, k, weight, lse, mask, _, inputs, _, scale, score, predicate, per_kv_head = args
    wide = [x if x is None else x.double() for x in (q, k, weight, lse)]
    return index_scores_reference(*wide, mask, inputs, scale, parse_score(score), predicate, per_kv_head)


def check_selection(indices: Tensor, args: tuple[Any, ...], tolerance: float = 1e-4) -> None:
    """Asserts that a selection is well formed and that its float64 scores are the best there are."""
    scores = scores_of(args)
    topk, keys = args[7], scores.shape[-1]
    assert indices.dtype == torch.int32
    assert indices.shape == (*scores.shape[:-1], topk)
    chosen = indices >= 0
    # Ascending, without repetition, and -1 only at the end.
    following = torch.where(chosen, indices, keys + torch.arange(topk, device=indices.device))
    assert (following.diff(dim=-1) > 0).all()
    assert (indices < keys).all()
    expected = (scores > -math.inf).sum(-1).clamp(max=topk)
    assert torch.equal(chosen.sum(-1), expected)
    best = scores.sort(-1, descending=True).values
    best = torch.nn.functional.pad(best, (0, max(0, topk - keys)), value=-math.inf)[..., :topk]
    got = scores.gather(-1, indices.clamp(min=0).long())
    got = torch.where(chosen, got, -math.inf).sort(-1, descending=True).values
    finite = best > -math.inf
    size = best[finite].abs().max() if finite.any() else 1.0
    assert torch.equal(got > -math.inf, finite)
    assert (got[finite] - best[finite]).abs().le(tolerance * size).all()


SIZES = [
    ((1, 8, 1, 1, 300, 32), 40),
    ((2, 1, 1, 2, 100, 32), 100),
    ((1, 6, 2, 3, 130, 80), 20),
    ((1, 3, 3, 1, 65, 24), 80),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("score", [s.text for s in SCORES])
@pytest.mark.parametrize(("sizes", "topk"), SIZES)
def test_scores_and_sizes(device: str, run: Run, variant: str, score: str, sizes: Any, topk: int) -> None:
    args = arguments(device, sizes, topk, score)
    check_selection(run("index_topk", variant, *args), args)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("score", [LIGHTNING.text, "mean: dot", "max: weight*dot"])
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_ties_are_broken_as_the_reference_does(
    device: str, run: Run, variant: str, score: str, per_kv_head: bool
) -> None:
    sizes = (2, 4, 2, 3, 200, 32)
    args = arguments(device, sizes, 50, score, torch.float16, per_kv_head=per_kv_head, whole=True)
    assert torch.equal(run("index_topk", variant, *args), index_topk_reference(*args))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 90), (2, 1, 3, 90), (3, 90)])
@pytest.mark.parametrize("kind", ["bool", "additive", "lowest"])
def test_mask_tensors(device: str, run: Run, variant: str, shape: Any, kind: str) -> None:
    mask = torch.rand(shape, device=device) < 0.4
    if len(shape) == 4 and shape[2] == 3:
        mask[0, 0, 1] = False
    if kind != "bool":
        lowest = -math.inf if kind == "additive" else torch.finfo(torch.float32).min
        mask = torch.where(mask, torch.randint(-3, 3, shape, device=device).float(), lowest)
    args = arguments(device, (2, 4, 2, 3, 90, 32), 60, DOT_PRODUCT.text, mask=mask, whole=True)
    assert torch.equal(run("index_topk", variant, *args), index_topk_reference(*args))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bounds", [False, True])
def test_predicates_and_bounds(device: str, run: Run, variant: str, bounds: bool) -> None:
    position = torch.tensor([2100, 0, 4000], device=device)
    padding = torch.rand(2, 4200, device=device) < 0.8
    padding[1, :2100] = False
    args = arguments(
        device,
        (2, 1, 1, 3, 4200, 16),
        70,
        DOT_PRODUCT.text,
        inputs=(position, padding),
        predicate="(kv <= in0(q)) & Ne(in1(b, kv), 0) & (Abs(q - 1) <= Max(q, kv) + mod(h - 5, 3))",
        bounds=bounds,
        whole=True,
    )
    assert torch.equal(run("index_topk", variant, *args), index_topk_reference(*args))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("score", [DOT_PRODUCT.text, MAX_HEAD.text])
def test_nan_ranks_first(device: str, run: Run, variant: str, score: str) -> None:
    args = arguments(device, (1, 4, 2, 2, 90, 32), 10, score, whole=True)
    args[1][0, 0, 77] = math.nan
    expected = index_topk_reference(*args)
    assert (expected == 77).any(-1).all()
    assert torch.equal(run("index_topk", variant, *args), expected)


def test_blocks_of_heads_of_several_rows(device: str, run: Run) -> None:
    args = arguments(device, (1, 40, 1, 3, 70, 32), 20, LIGHTNING.text, whole=True)
    assert torch.equal(run("index_topk", "decode", *args), index_topk_reference(*args))


@pytest.mark.parametrize("chip", ["h100", "a100"])
@pytest.mark.parametrize("d", [128, 192, 256, 576])
@pytest.mark.parametrize("heads", [24, 32, 64, 128])
def test_what_a_step_has_in_flight_fits(
    monkeypatch: pytest.MonkeyPatch, heads: int, d: int, chip: str
) -> None:
    """A step loads its keys and, where they do not stay on the chip, the queries of all rows."""
    device = Device.named(chip)
    monkeypatch.setattr(Device, "of", staticmethod(lambda _: device))
    k = torch.empty(1, 1, 131072, d, dtype=torch.bfloat16, device="meta")
    for s in range(3, 9):
        q = torch.empty(1, heads, s, d, dtype=torch.bfloat16, device="meta")
        shape = decode.plan(q, k, 1, 131072)
        assert not shape.resident
        step = (shape.block_n + s * shape.block_h) * padded_width(d) * 2
        # With one stage nothing is in flight.
        assert shape.stages == 1 or shape.stages * step <= device.program_shared


def test_tiles_outside_the_bounds_are_not_scored(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predicate = "(kv >= 300) & (kv < 400)"
    args = arguments(device, (1, 4, 1, 1, 700, 32), 20, LIGHTNING.text, predicate=predicate, bounds=True)
    new_empty = Tensor.new_empty

    def poisoned(x: Tensor, *sizes: Any, **options: Any) -> Tensor:
        made = new_empty(x, *sizes, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    scores = decode.scan(*args[:7], *args[8:], wrap=lambda kernel: kernel)
    block_n = decode.plan(args[0], args[1], 1, 700).block_n
    first, last = 300 // block_n * block_n, -(-400 // block_n) * block_n
    assert first > 0
    assert scores[..., :first].isnan().all()
    assert scores[..., last:].isnan().all()
    assert not scores[..., first:last].isnan().any()


def test_rows_are_scored_a_chunk_at_a_time(device: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_module, "SCORE_BYTES", 2 * 16 * 2048 * 4)
    args = arguments(
        device, (2, 2, 1, 40, 50, 16), 20, LIGHTNING.text, predicate="kv <= q", bounds=True, whole=True
    )
    assert torch.equal(run("index_topk", "rows", *args), index_topk_reference(*args))


@pytest.mark.parametrize("score", [LIGHTNING.text, MASS.text, DOT_PRODUCT.text])
@pytest.mark.parametrize(("pool", "topk"), [(40, 8), (200, 64), (16, 16), (16, 30)])
def test_only_what_is_offered_is_selected(device: str, run: Run, score: str, pool: int, topk: int) -> None:
    """Whole numbers, so ties are exact; the last row is offered nothing."""
    args = arguments(device, (2, 3, 1, 3, 250, 32), topk, score, whole=score != MASS.text)
    offers = torch.full((2, 1, 3, pool), -1, dtype=torch.int32)
    generator = torch.Generator().manual_seed(5)
    for i, row in enumerate(offers.view(-1, pool)[:-1]):
        row[: pool - i] = torch.randperm(250, generator=generator)[: pool - i].sort().values
    offers = offers.to(device)
    got = run("index_topk", "pooled", *args, None, offers)
    assert torch.equal(got, index_topk_reference(*args, None, offers))
    assert (got[-1, 0, -1] == -1).all()


def test_what_is_best_of_all_is_best_of_what_is_offered(device: str, run: Run) -> None:
    args = arguments(device, (2, 4, 1, 1, 500, 32), 32, LIGHTNING.text, whole=True)
    wide = run("index_topk", "decode", *args[:7], 128, *args[8:])
    assert torch.equal(run("index_topk", "pooled", *args, None, wide), run("index_topk", "decode", *args))


def test_offers_under_another_mask_are_taken_under_both(device: str, run: Run) -> None:
    args = arguments(device, (2, 4, 1, 2, 300, 32), 16, LIGHTNING.text, whole=True, predicate="kv < 200 + q")
    offers = torch.arange(150, 260, device=device, dtype=torch.int32).expand(2, 1, 2, 110).contiguous()
    got = run("index_topk", "pooled", *args, None, offers)
    assert torch.equal(got, index_topk_reference(*args, None, offers))


def test_keys_of_any_strides_are_read_in_place(device: str, run: Run) -> None:
    args = list(arguments(device, (2, 4, 2, 1, 60, 32), 20, DOT_PRODUCT.text, whole=True))
    wide = torch.randint(-2, 3, (2, 60, 2, 64), device=device).float()
    args[1] = wide[..., 32:].transpose(1, 2)
    for variant in VARIANTS:
        assert torch.equal(run("index_topk", variant, *args), index_topk_reference(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("score", [LIGHTNING.text, MASS.text])
@pytest.mark.parametrize(
    ("sizes", "topk"),
    [
        ((1, 64, 1, 1, 131072, 128), 2048),
        ((4, 32, 1, 2, 30001, 128), 2048),
        ((1, 24, 8, 1, 20000, 128), 1000),
        ((2, 1, 1, 4, 9000, 64), 512),
        ((1, 32, 1, 300, 3000, 128), 256),
    ],
)
def test_on_the_chip(run: Run, sizes: Any, topk: int, score: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = arguments("cuda", sizes, topk, score, dtype)
    variant = "decode" if sizes[3] <= 8 else "rows"
    check_selection(run("index_topk", variant, *args), args)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_ties_on_the_chip(run: Run, variant: str, repeats: range) -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 1, 4, 70000, device="cuda") < 0.7
    for per_kv_head in (False, True):
        args = arguments(
            "cuda",
            (2, 8, 2, 4, 70000, 64),
            2048,
            LIGHTNING.text,
            torch.bfloat16,
            mask,
            predicate="kv <= 65000 + q",
            bounds=True,
            per_kv_head=per_kv_head,
            whole=True,
        )
        expected = index_topk_reference(*args)
        for _ in repeats:
            assert torch.equal(run("index_topk", variant, *args), expected)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["decode", "rows"])
def test_offsets_beyond_32_bits(run: Run, variant: str) -> None:
    torch.manual_seed(0)
    b, t, d, topk = 2, (1 << 23) + 100, 128, 2048
    q = torch.randn(b, 1, 1, d, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(b, 1, t, d, device="cuda", dtype=torch.bfloat16)
    assert k.numel() > 2**31
    args = (q, k, None, None, None, None, [], topk, d**-0.5, DOT_PRODUCT.text, "", False)
    found = run("index_topk", variant, *args).long()
    assert (found.diff(dim=-1) > 0).all()
    for i in range(b):
        parts = [part.float() @ q[i, 0, 0].float() for part in k[i, 0].split(1 << 20)]
        scores = torch.cat(parts)
        chosen = scores[found[i, 0, 0]].sort(descending=True).values
        torch.testing.assert_close(chosen, scores.topk(topk).values, atol=1e-3, rtol=1e-4)
