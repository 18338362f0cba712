"""Every kernel over a paged cache, against the references over the same keys in a cache that is not."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.ir.references import index_topk_reference, mask_bounds_reference
from clsa_compile.ir.scores import DOT_PRODUCT, LIGHTNING
from clsa_compile.ir.variants import Facts, select
from clsa_compile.kernels.catalog import VARIANTS
from clsa_compile.kernels.launch import is_latent

Run = Callable[..., Any]
PAGES = [1, 7, 16, 64]
# Of no page: below all, above all, and far enough to leave the address space.
NONSENSE = (-1, 2**31 - 1, -(2**31), 10**6)


@dataclass
class Pool:
    """Where the tokens of sequences of some lengths lie: shuffled pages, among others that nobody owns."""

    lengths: Tensor
    page: int
    table: Tensor
    count: int

    @classmethod
    def of(cls, device: str, lengths: tuple[int, ...], page: int) -> "Pool":
        used = [-(-length // page) for length in lengths]
        # One entry a row is beyond even the longest sequence.
        table = torch.empty(len(lengths), max(used) + 1, dtype=torch.int64)
        count = sum(used) + 3
        free = torch.randperm(count).tolist()
        stale = free[-1]
        for row, pages in zip(table, used, strict=True):
            for entry in range(len(row)):
                junk = stale if entry % 2 else NONSENSE[entry // 2 % len(NONSENSE)]
                row[entry] = free.pop() if entry < pages else junk
        # A transposed table, as it may be a view of something larger.
        held = table.to(device, torch.int32).T.contiguous().T
        return cls(torch.tensor(lengths, device=device, dtype=torch.int32), page, held, count)

    @property
    def slots(self) -> int:
        return self.table.shape[1] * self.page

    def fill(self, x: Tensor, rest: float) -> Tensor:
        """Returns x [B, Hkv, T, D] as an engine's pool, transposed; `rest` where no token lies."""
        _, hkv, _, d = x.shape
        pool = torch.full((self.count, self.page, hkv, d), rest, device=x.device, dtype=x.dtype)
        for b, length in enumerate(self.lengths.tolist()):
            at = torch.arange(length, device=x.device)
            pool[self.table[b, at // self.page].long(), at % self.page] = x[b, :, :length].transpose(0, 1)
        return pool.transpose(1, 2)


@dataclass
class Case:
    """One call, over a cache as it is and over a paged one."""

    plain: tuple[Any, ...]
    paged: tuple[Any, ...]


LENGTHS = (70, 1, 129)


def attention_case(
    device: str,
    page: int,
    s: int = 1,
    sizes: tuple[int, int, int, int] = (4, 2, 32, 16),
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, ...] = LENGTHS,
    rest: float = math.nan,
    bounds: bool = True,
    latent: bool = False,
) -> Case:
    h, hkv, d, dv = sizes
    pool = Pool.of(device, lengths, page)
    b, t = len(lengths), pool.slots
    q = torch.randn(b, h, s, d, device=device, dtype=dtype)
    k = torch.randn(b, hkv, t, d, device=device, dtype=dtype)
    v = k[..., :dv] if latent else torch.randn(b, hkv, t, dv, device=device, dtype=dtype)
    predicate, inputs = "kv <= q + in0(b)", [pool.lengths - s]
    around = mask_bounds_reference(q, None, inputs, 1, t, predicate) if bounds else None
    tail = (None, around, inputs, None, d**-0.5, 0.0, predicate)
    keys = pool.fill(k, rest)
    values = keys[..., :dv] if latent else pool.fill(v, rest)
    assert is_latent(keys, values) == latent
    return Case((q, k, v, *tail), (q, keys, values, *tail, pool.table))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("variant", ["decode", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention(device: str, run: Run, judge: Any, variant: str, page: int, dtype: torch.dtype) -> None:
    # NaN where no token lies: nothing there is read into a result.
    case = attention_case(device, page, 1, dtype=dtype)
    judge("attention")(run("attention", variant, *case.paged), case.plain)


@pytest.mark.parametrize("page", PAGES)
def test_attention_of_several_rows(device: str, run: Run, judge: Any, page: int) -> None:
    case = attention_case(device, page, 3, lengths=(70, 3, 129))
    judge("attention")(run("attention", "decode", *case.paged), case.plain)


@pytest.mark.parametrize("page", PAGES)
def test_prompts(device: str, run: Run, judge: Any, page: int) -> None:
    case = attention_case(device, page, 40, (4, 2, 80, 48), lengths=(70, 40, 129))
    judge("attention")(run("attention", "rows", *case.paged), case.plain)


@pytest.mark.parametrize("variant", ["decode", "rows"])
def test_without_bounds_the_whole_table_is_walked(device: str, run: Run, judge: Any, variant: str) -> None:
    case = attention_case(device, 16, rest=100.0, bounds=False)
    result = run("attention", variant, *case.paged)
    judge("attention")(result, case.plain)
    # The same bits, whatever the pool holds where no token of these sequences lies.
    torch.manual_seed(0)
    changed = attention_case(device, 16, rest=-7.0, bounds=False)
    again = run("attention", variant, *changed.paged)
    assert all(torch.equal(x, y) for x, y in zip(result, again, strict=True))


@pytest.mark.parametrize("page", [7, 64])
@pytest.mark.parametrize("heads", [3, 40])
def test_attention_over_latent_rows(device: str, run: Run, judge: Any, page: int, heads: int) -> None:
    case = attention_case(
        device, page, sizes=(heads, 1, 576, 512), dtype=torch.float16, lengths=(90, 20), latent=True
    )
    judge("attention")(run("attention", "decode", *case.paged), case.plain)


# -- selected tokens ---------------------------------------------------------------------------------


def sparse_case(
    device: str,
    page: int,
    topk: int,
    s: int = 1,
    heads: int = 1,
    sizes: tuple[int, int, int, int] = (4, 2, 32, 16),
    **options: Any,
) -> Case:
    """Returns `attention_case` over indices that name tokens of each sequence, and -1."""
    dense = attention_case(device, page, s, sizes, **options)
    b, t = dense.plain[0].shape[0], dense.plain[1].shape[2]
    last = dense.plain[5][0] + s  # the lengths
    order = torch.rand(b, heads, s, t, device=device).argsort(-1)[..., :topk]
    order = torch.where(order < last.view(b, 1, 1, 1), order, t).sort(-1).values
    indices = torch.where(order < t, order, -1).to(torch.int32)
    return Case(*((*args[:3], indices, *args[3:]) for args in (dense.plain, dense.paged)))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sparse_attention(device: str, run: Run, judge: Any, page: int, dtype: torch.dtype) -> None:
    case = sparse_case(device, page, 60, dtype=dtype)
    judge("sparse_attention")(run("sparse_attention", "gather", *case.paged), case.plain)


def test_sparse_attention_with_a_set_per_kv_head_split(device: str, run: Run, judge: Any) -> None:
    case = sparse_case(device, 7, 300, 2, heads=2, lengths=(310, 2, 200))
    judge("sparse_attention")(run("sparse_attention", "gather", *case.paged), case.plain)


@pytest.mark.parametrize("page", [7, 64])
def test_sparse_attention_over_latent_rows(device: str, run: Run, judge: Any, page: int) -> None:
    case = sparse_case(
        device, page, 50, sizes=(40, 1, 576, 512), dtype=torch.float16, lengths=(90, 20), latent=True
    )
    judge("sparse_attention")(run("sparse_attention", "gather", *case.paged), case.plain)


# -- the index ---------------------------------------------------------------------------------------


def index_case(
    device: str,
    page: int,
    s: int,
    score: str,
    sizes: tuple[int, int, int] = (4, 2, 32),
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, ...] = LENGTHS,
    topk: int = 40,
    bounds: bool = True,
    per_kv_head: bool = False,
) -> Case:
    """Returns a call over whole numbers: every sum is exact, so selections are equal."""
    h, hkv, d = sizes
    pool = Pool.of(device, lengths, page)
    b, t = len(lengths), pool.slots

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, device=device).to(dtype)

    q, k, weight = draw(b, h, s, d), draw(b, hkv, t, d), draw(b, h, s)
    predicate, inputs = "kv <= q + in0(b)", [pool.lengths - s]
    around = mask_bounds_reference(q, None, inputs, 1, t, predicate) if bounds else None
    tail = (weight, None, None, around, inputs, topk, 0.5, score, predicate, per_kv_head)
    return Case((q, k, *tail), (q, pool.fill(k, math.nan), *tail, pool.table))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("variant", ["decode", "rows"])
@pytest.mark.parametrize("bounds", [False, True])
def test_index(device: str, run: Run, variant: str, page: int, bounds: bool) -> None:
    case = index_case(device, page, 1, LIGHTNING.text, bounds=bounds)
    assert torch.equal(run("index_topk", variant, *case.paged), index_topk_reference(*case.plain))


@pytest.mark.parametrize(("variant", "s"), [("decode", 3), ("rows", 3), ("rows", 40)])
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_index_of_several_rows(device: str, run: Run, variant: str, per_kv_head: bool, s: int) -> None:
    case = index_case(device, 7, s, DOT_PRODUCT.text, lengths=(70, s, 129), per_kv_head=per_kv_head)
    assert torch.equal(run("index_topk", variant, *case.paged), index_topk_reference(*case.plain))


@pytest.mark.parametrize("variant", ["decode", "rows"])
def test_index_of_one_head_and_padded_width(device: str, run: Run, variant: str) -> None:
    case = index_case(device, 16, 1, DOT_PRODUCT.text, (1, 1, 24))
    assert torch.equal(run("index_topk", variant, *case.paged), index_topk_reference(*case.plain))


# -- the choice --------------------------------------------------------------------------------------


def test_prompts_over_pages_do_not_go_to_torch() -> None:
    facts = Facts(
        op="attention", device="cuda", dtype=torch.bfloat16, B=1, H=8, Hkv=2, S=512, T=None, D=64, Dv=64,
        topk=0, softcap=False, sinks=False, additive=False, lse_used=False, paged=True,
    )  # fmt: skip
    variant, reasons = select(VARIANTS, facts)
    assert variant is not None
    assert variant.name == "rows"
    assert "sdpa: torch's attention reads no paged cache" in reasons


# -- on the chip only --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("page", [1, 16, 48, 64])
@pytest.mark.parametrize(("s", "variant"), [(1, "decode"), (4, "decode"), (300, "rows")])
def test_attention_on_the_chip(run: Run, judge: Any, page: int, s: int, variant: str) -> None:
    torch.manual_seed(0)
    case = attention_case("cuda", page, s, (24, 8, 128, 128), torch.bfloat16, (4099, 301, 8192))
    judge("attention")(run("attention", variant, *case.paged), case.plain)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(9000,), (5000, 1, 3001) * 11])
def test_latent_rows_on_the_chip(run: Run, judge: Any, lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    sizes, options = (128, 1, 576, 512), {"dtype": torch.bfloat16, "lengths": lengths, "latent": True}
    case = attention_case("cuda", 64, 1, sizes, **options)
    judge("attention")(run("attention", "decode", *case.paged), case.plain)
    case = sparse_case("cuda", 64, 2048, sizes=sizes, **options)
    judge("sparse_attention")(run("sparse_attention", "gather", *case.paged), case.plain)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [1, 16, 48, 64])
@pytest.mark.parametrize("s", [1, 8, 33])
def test_sparse_attention_on_the_chip(run: Run, judge: Any, page: int, s: int) -> None:
    torch.manual_seed(0)
    options = {"dtype": torch.bfloat16, "lengths": (4099, 301, 8192)}
    case = sparse_case("cuda", page, 2048, s, sizes=(24, 8, 128, 128), **options)
    judge("sparse_attention")(run("sparse_attention", "gather", *case.paged), case.plain)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [1, 16, 48, 64])
@pytest.mark.parametrize(("s", "variant"), [(1, "decode"), (2, "decode"), (300, "rows")])
def test_index_on_the_chip(run: Run, page: int, s: int, variant: str) -> None:
    torch.manual_seed(0)
    options = {"dtype": torch.bfloat16, "lengths": (4099, 301, 20001), "topk": 2048}
    case = index_case("cuda", page, s, LIGHTNING.text, (16, 1, 128), **options)
    expected = index_topk_reference(*case.plain)
    for _ in range(5):
        assert torch.equal(run("index_topk", variant, *case.paged), expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits(run: Run, judge: Any) -> None:
    """The only sequence lies in the last pages of a pool of more than 2**31 numbers."""
    torch.manual_seed(0)
    page, t, d, count = 64, 4096, 128, 300_000
    pool = torch.empty(count, page, 1, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    assert pool.numel() > 2**31
    table = torch.arange(count - t // page, count, device="cuda", dtype=torch.int32).flip(0).view(1, -1)
    # Whole numbers: scores of the index are exact, and selections equal.
    k = torch.randint(-2, 3, (1, 1, t, d), device="cuda").to(torch.bfloat16)
    q = torch.randint(-2, 3, (1, 8, 1, d), device="cuda").to(torch.bfloat16)
    pool[table[0].long()] = k.view(1, t // page, page, d).transpose(0, 1)
    plain, paged = (q, k, k[..., :64]), (q, pool, pool[..., :64])
    tail = (None, None, [], None, d**-0.5, 0.0, "")
    judge("attention")(run("attention", "decode", *paged, *tail, table), (*plain, *tail))
    judge("attention")(run("attention", "rows", *paged, *tail, table), (*plain, *tail))
    indices = torch.arange(0, t, 5, device="cuda", dtype=torch.int32).view(1, 1, 1, -1)
    result = run("sparse_attention", "gather", *paged, indices, *tail, table)
    judge("sparse_attention")(result, (*plain, indices, *tail))
    args = (None, None, None, None, [], 100, 1.0, DOT_PRODUCT.text, "", False)
    for variant in ("decode", "rows"):
        assert torch.equal(
            run("index_topk", variant, q, pool, *args, table), index_topk_reference(q, k, *args)
        )
