"""kernels/dense_attention/{mass,mass_rows,pooled}.py and kernels/index_topk/choose.py against references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.ir.references import attention_mass_reference, mask_bounds_reference, select_topk_reference
from clsa_compile.kernels.dense_attention import mass_rows
from clsa_compile.kernels.index_topk import select

Run = Callable[..., Any]

SIZES = [
    (1, 4, 2, 1, 300, 32, 32),
    (2, 6, 2, 3, 77, 16, 32),
    (2, 3, 3, 1, 1030, 16, 16),
    (1, 2, 1, 2, 1, 16, 16),
]
# Many query rows: more and fewer than keys, no multiples of a tile, other widths of values.
MANY = [
    (1, 4, 2, 40, 36, 32, 32),
    (2, 3, 1, 33, 70, 16, 32),
    (1, 2, 2, 9, 1, 16, 16),
    (1, 2, 1, 40, 40, 80, 16),
]
BOTH = [
    *((sizes, sets, "decode") for sizes in SIZES for sets in (1, 33)),
    *((sizes, sets, "rows") for sizes in [SIZES[1], *MANY] for sets in (1, 3)),
]


def operands(
    device: str,
    sizes: tuple[int, int, int, int, int, int, int],
    sets: int = 1,
    dtype: torch.dtype = torch.float32,
    sinks: bool = False,
    softcap: float = 0.0,
    power: float = 1.0,
    predicate: str = "",
    inputs: tuple[Tensor, ...] = (),
) -> list[Any]:
    b, h, hkv, s, t, d, dv = sizes
    q = torch.randn(b, h, s, d, device=device, dtype=dtype)
    k = torch.randn(b, hkv, t, d, device=device, dtype=dtype)
    v = torch.randn(b, hkv, t, dv, device=device, dtype=dtype)
    weight = torch.rand(sets, h, device=device)
    sink = torch.randn(h, device=device, dtype=dtype) if sinks else None
    bounds = mask_bounds_reference(q, None, inputs, h, t, predicate) if predicate else None
    return [q, k, v, weight, None, bounds, list(inputs), sink, d**-0.5, softcap, predicate, power]


def compare(run: Run, arguments: list[Any], variant: str = "decode") -> None:
    out, mass = run("attention_mass", variant, *arguments)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    exact_out, exact = attention_mass_reference(*wide)
    loose = 1e-5 if arguments[0].dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), exact_out, atol=loose, rtol=loose)
    assert mass.dtype == torch.float32
    assert mass.shape == exact.shape
    torch.testing.assert_close(mass.double(), exact.double(), atol=loose, rtol=max(loose, 1e-4))


@pytest.mark.parametrize(("sizes", "sets", "variant"), BOTH)
def test_mass_is_what_heads_looked_at(sizes: Any, sets: int, variant: str, device: str, run: Run) -> None:
    compare(run, operands(device, sizes, sets, power=1.0 if sets == 1 else 0.5), variant)


@pytest.mark.parametrize("variant", ["decode", "rows"])
@pytest.mark.parametrize("options", [{"sinks": True}, {"softcap": 3.0}, {"dtype": torch.float16}])
def test_sinks_softcaps_and_short_numbers(
    options: dict[str, Any], variant: str, device: str, run: Run
) -> None:
    compare(run, operands(device, SIZES[1], 2, power=0.5, **options), variant)


@pytest.mark.parametrize("sizes", MANY[:2])
def test_a_prompt_reads_what_is_before_it(sizes: Any, device: str, run: Run) -> None:
    """Tiles that no row of them may read are not computed, and forbidden all the same."""
    arguments = operands(device, sizes, 3, predicate="kv <= q")
    compare(run, arguments, "rows")
    mass = run("attention_mass", "rows", *arguments)[1]
    later = torch.ones(sizes[3], sizes[4], dtype=torch.bool, device=device).triu(1)
    assert torch.equal(mass == -torch.inf, later.expand_as(mass))
    # Bounds only save time.
    arguments[5] = None
    assert torch.equal(run("attention_mass", "rows", *arguments)[1], mass)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_heads_of_a_prompt_may_have_masks_of_their_own(kind: str, device: str, run: Run) -> None:
    """A token may be read where any head may; the last row may read nothing."""
    arguments = operands(device, MANY[1], 2)
    allowed = torch.rand(2, 3, 33, 70, device=device) > 0.7
    allowed[:, :, -1] = False
    bias = torch.randn(allowed.shape, device=device)
    arguments[4] = allowed if kind == "bool" else torch.where(allowed, bias, -torch.inf)
    compare(run, arguments, "rows")


@pytest.mark.parametrize("mask", ["", "bool", "additive", "predicate"])
def test_a_prompt_may_read_some_tokens_only(mask: str, device: str, run: Run) -> None:
    arguments = operands(device, MANY[1], 2, sinks=True, predicate="kv >= q" if mask == "predicate" else "")
    if mask in ("bool", "additive"):
        allowed = torch.rand(2, 1, 33, 70, device=device) > 0.5
        arguments[4] = allowed if mask == "bool" else torch.where(allowed, 0.5, -torch.inf)
    generator = torch.Generator().manual_seed(3)
    pools = torch.stack([torch.randperm(70, generator=generator)[:40].sort().values for _ in range(66)])
    pools[5, 20:] = -1
    pools = pools.view(2, 1, 33, 40).to(device, torch.int32)
    compare(run, [*arguments, pools], "rows")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(2, 24, 8, 700, 900, 128, 128), (1, 16, 1, 300, 4000, 576, 512)])
def test_prompts_on_the_chip(sizes: Any, run: Run) -> None:
    torch.manual_seed(0)
    arguments = operands("cuda", sizes, 3, torch.bfloat16, sinks=True, power=0.5, predicate="kv <= q + 200")
    compare(run, arguments, "rows")


@pytest.mark.parametrize("n", [mass_rows.MOST_SETS, mass_rows.MOST_SETS + 1])
def test_sets_are_summed_a_few_at_a_time(n: int, device: str, run: Run) -> None:
    compare(run, operands(device, MANY[0], n, predicate="kv <= q"), "rows")


def test_what_may_not_be_read_has_no_mass(device: str, run: Run) -> None:
    """The second sequence starts late; the third may read nothing at all."""
    start = torch.tensor([0, 40, 400], device=device)
    arguments = operands(
        device, (3, 4, 2, 2, 310, 16, 16), 2, predicate="(kv >= in0(b)) & (kv <= q + 300)", inputs=(start,)
    )
    compare(run, arguments)
    mass = run("attention_mass", "decode", *arguments)[1]
    assert (mass[2] == -torch.inf).all()
    assert (mass[1, :, :, :40] == -torch.inf).all()
    assert (mass[0, :, 0, 301:] == -torch.inf).all()


def test_what_is_far_below_the_best_may_still_be_read(device: str, run: Run) -> None:
    """Scores from -40000 to 40000: further apart than fp16 can say."""
    arguments = operands(device, (1, 2, 1, 1, 40, 16, 16), dtype=torch.float16)
    arguments[0][:], arguments[1][:] = 0.0, 0.0
    arguments[0][..., 0] = 200.0
    arguments[1][..., 0] = torch.linspace(200, -200, 40)
    arguments[8] = 1.0
    mass = run("attention_mass", "decode", *arguments)[1]
    assert torch.equal(mass, attention_mass_reference(*arguments)[1])
    assert mass.isfinite().all()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("options", [{}, {"sinks": True, "power": 0.5}, {"softcap": 3.0, "sets": 3}])
def test_a_pool_is_all_that_is_looked_at(sizes: Any, options: dict[str, Any], device: str, run: Run) -> None:
    """Rows may have fewer tokens than the pool holds; the last one here has none."""
    b, t, s = sizes[0], sizes[4], sizes[3]
    arguments = operands(device, sizes, **options)
    generator = torch.Generator().manual_seed(3)
    pools = torch.full((b, 1, s, 40), -1, dtype=torch.int32)
    for i, row in enumerate(pools.view(-1, 40)[:-1]):
        count = min(t, 40 - 7 * i)
        row[:count] = torch.randperm(t, generator=generator)[:count].sort().values
    compare(run, [*arguments, pools.to(device)], "pooled")


def test_a_pool_under_another_mask_is_read_under_both(device: str, run: Run) -> None:
    start = torch.tensor([0, 40], device=device)
    arguments = operands(device, SIZES[1], predicate="kv >= in0(b)", inputs=(start,))
    pool = torch.arange(20, 60, device=device, dtype=torch.int32).expand(2, 1, 3, 40).contiguous()
    compare(run, [*arguments, pool], "pooled")


@pytest.mark.parametrize(
    ("t", "topk", "first", "last"), [(300, 40, 4, 8), (5000, 64, 0, 0), (9000, 700, 0, 5), (50, 64, 4, 8)]
)
@pytest.mark.parametrize("sets", [1, 3])
def test_the_tokens_of_largest_mass_and_the_ends(
    t: int, topk: int, first: int, last: int, sets: int, device: str, run: Run
) -> None:
    mass = torch.rand(2, sets, 1, t, device=device).square()
    start, end = torch.tensor([0, 7], device=device), torch.tensor([t, t - 5], device=device)
    positions = torch.arange(t, device=device)
    inside = (positions >= start[:, None]) & (positions < end[:, None])
    mass = torch.where(inside[:, None, None], mass, -torch.inf)
    bounds = torch.stack((start, end), -1).to(torch.int32)[:, None]
    got = run("select_topk", "radix", mass, bounds, topk, first, last)
    assert torch.equal(got, select_topk_reference(mass, None, topk, first, last))
    whole = torch.rand(1, sets, 1, t, device=device)
    got = run("select_topk", "radix", whole, None, topk, first, last)
    assert torch.equal(got, select_topk_reference(whole, None, topk, first, last))


@pytest.mark.parametrize(("rows", "kept"), [(11, (3, 5)), (2, (0, 0))])
def test_tokens_of_many_rows_are_chosen_a_chunk_at_a_time(
    rows: int, kept: tuple[int, int], device: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "SCORE_BYTES", 2 * 2 * 4 * 4096 * 4)
    assert select.rows_at_once(2, 2, 11, 70) == 4
    mass = torch.randint(0, 9, (2, 2, rows, 70), device=device).float()
    last = torch.arange(rows, device=device) + 30
    mass = torch.where(torch.arange(70, device=device) < last[:, None], mass, -torch.inf)
    bounds = torch.stack((torch.zeros_like(last), last.clamp(max=70)), -1).to(torch.int32).expand(2, rows, 2)
    got = run("select_topk", "radix", mass, bounds, 20, *kept)
    assert torch.equal(got, select_topk_reference(mass, None, 20, *kept))


@pytest.mark.gpu  # the interpreter runs programs one after the other
def test_anchors_say_the_same_on_every_launch(run: Run, repeats: range) -> None:
    torch.manual_seed(0)
    arguments = operands("cuda", (2, 8, 2, 1, 3000, 64, 64), 2, power=0.5)
    results = [run("attention_mass", "decode", *arguments)[1] for _ in repeats]
    assert all(torch.equal(results[0], other) for other in results[1:])
