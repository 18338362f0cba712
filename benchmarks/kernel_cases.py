"""The cases of kernel_times.py beyond decode steps with plain caches: mass, latent rows, pages and prompts.

Ours are the contract ops as anyone can call them, where kernel_times.py has no call of its own.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from kernel_times import (
    COLD_BYTES,
    CUDA,
    HKV,
    LAUNCH,
    TOPK,
    Chip,
    D,
    H,
    Part,
    Result,
    Shape,
    attend,
    graph_time,
    in_order,
    index_of,
    normal,
    random_indices,
    relative,
    scans,
    sets_for,
    straight,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SCALE = D**-0.5
# MLA: heads that share one row of the cache in a decode step and in a prompt, its width, and its values'.
LATENT_HEADS, LATENT_PROMPT_HEADS, LATENT, LATENT_VALUES = 128, 16, 576, 512
PAGE = 64
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
# Of the largest value; and row by row, where rounding to bfloat16 alone may take 2**-8.
BUDGET, ROW_BUDGET = 2**-7, 2**-6

Operands = tuple[Tensor, Tensor, Tensor]


def operands(shape: Shape) -> Operands:
    """Returns queries, keys and values of a dense layer."""
    q = normal(shape.B, H, shape.queries, D)
    return q, normal(shape.B, HKV, shape.T, D), normal(shape.B, HKV, shape.T, D)


def latent_operands(shape: Shape, heads: int) -> Operands:
    """Returns queries and rows of MLA's latent cache; values are the first columns of the keys."""
    k = normal(shape.B, 1, shape.T, LATENT)
    return normal(shape.B, heads, shape.queries, LATENT), k, k[..., :LATENT_VALUES]


def readable(shape: Shape) -> tuple[str, Tensor | None]:
    """Returns what a prompt's queries may read, for the ops and as [S, T]; a decode step reads all."""
    if shape.queries == 1:
        return "", None
    shift = shape.T - shape.queries
    kv = torch.arange(shape.T, device=CUDA)
    last = torch.arange(shift, shape.T, device=CUDA).view(-1, 1)
    if not shape.window:
        return f"kv <= q + {shift}", kv <= last
    text = f"(kv <= q + {shift}) & (kv > q - {shape.window - shift})"
    return text, (kv <= last) & (kv > last - shape.window)


def work_of(args: Operands, mask: Tensor | None) -> tuple[float, float]:
    """Returns the bytes that attention must read, and its flops where the mask [S, T] lets it look."""
    q, k, v = args
    # Latent values begin where the keys do, and are read with them.
    reads = sum({x.data_ptr(): x.nbytes for x in (v, k, q)}.values())
    pairs = k.shape[2] if mask is None else int(mask.sum())
    return float(reads), 2.0 * q.shape[0] * q.shape[1] * pairs * (k.shape[3] + v.shape[3])


def by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns attention, and its probabilities float32 [B, H, S, T]: matmul, softmax, matmul."""
    (b, h, s, d), hkv = q.shape, k.shape[1]
    scores = (q.reshape(b, hkv, h // hkv * s, d) @ k.mT).float().view(b, h, s, -1) * SCALE
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    seen = scores.softmax(-1)
    return (seen.to(v.dtype).view(b, hkv, h // hkv * s, -1) @ v).view(b, h, s, -1), seen


def mass_by_torch(
    weight: Tensor, mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns attention, and its heads' probabilities summed with weight [N, H]; -inf where none look."""
    out, seen = by_torch(q, k, v, mask)
    mass = torch.einsum("nh,bhst->bnst", weight, seen)
    return out, mass if mask is None else mass.masked_fill(~mask, -math.inf)


def row_error(got: Tensor, exact: Tensor) -> float:
    """Returns the largest difference by the largest value of its own row: rows of prompts differ in size."""
    gap = torch.where(got == exact, 0.0, (got.float() - exact).abs())
    return float((gap.amax(-1) / exact.nan_to_num(neginf=0.0).abs().amax(-1)).max())


def mass(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """Attention and the mass of its heads, pooled, in decode also head by head; torch writes its scores."""
    text, mask = readable(shape)
    first = operands(shape)
    work = work_of(first, mask)
    sets = [first, *(operands(shape) for _ in range(sets_for(int(work[0])) - 1))]
    bounds = None if mask is None else torch.ops.clsa.mask_bounds(first[0], None, [], H, shape.T, text)
    pooled, each = torch.ones(1, H, device=CUDA), torch.eye(H, device=CUDA)
    for weight in (pooled, each) if mask is None else (pooled,):

        def ours(q: Tensor, k: Tensor, v: Tensor, weight: Tensor = weight) -> tuple[Tensor, Tensor]:
            given = (None, bounds, [], None, SCALE, 0.0, text, 1.0)
            result: tuple[Tensor, Tensor] = torch.ops.clsa.attention_mass(q, k, v, weight, *given)
            return result

        theirs = partial(mass_by_torch, weight, mask)
        took = graph_time([partial(ours, *s) for s in sets], repeats)
        other = graph_time([partial(theirs, *s) for s in sets], repeats)
        error = max(map(row_error, ours(*first), theirs(*(x.float() for x in first))))
        name = f"{shape} {'pooled' if weight is pooled else 'each head'}"
        yield chip.result("attention and mass", name, (took, other), work, error, ROW_BUDGET)


def choose(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """The selection of a prompt's rows of mass, against torch.topk (unsorted); see `topk`."""
    seen = torch.rand(shape.B, 1, shape.queries, shape.T, device=CUDA)
    select = partial(torch.ops.clsa.select_topk, seen, None, TOPK, 0, 0)
    took = graph_time([select], repeats)
    other = graph_time([lambda: seen.topk(TOPK, sorted=False)], repeats)
    chosen = seen.gather(-1, select().long()).sort(-1, descending=True).values
    error = relative(chosen, seen.topk(TOPK).values)
    work = (seen.nbytes, float(seen.numel()))
    yield chip.result("top-k of mass", f"{shape} k={TOPK}", (took, other), work, error, 0.0)


def latent(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """Attention over 2048 random rows of a latent cache, against gathering them with torch, and matmuls."""
    q, k, v = latent_operands(shape, LATENT_HEADS)
    bytes_read = 2 * shape.B * TOPK * LATENT
    # One cache, whose rows are few a call: enough calls to read more than the L2 cache holds.
    sets = [random_indices(shape, seed) for seed in range(math.ceil(COLD_BYTES / bytes_read))]

    def near(indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = k.gather(2, indices.long().view(shape.B, 1, TOPK, 1).expand(-1, -1, -1, LATENT))
        return rows, rows[..., :LATENT_VALUES]

    def theirs(indices: Tensor) -> Tensor:
        return by_torch(q, *near(indices))[0]

    took = graph_time([partial(attend, q, k, v, s) for s in sets], repeats)
    other = graph_time([partial(theirs, s) for s in sets], repeats)
    exact, _ = by_torch(q.float(), *(x.float() for x in near(sets[0])))
    error = relative(attend(q, k, v, sets[0]), exact)
    work = (bytes_read, 2.0 * shape.B * LATENT_HEADS * TOPK * (LATENT + LATENT_VALUES))
    name = f"{shape} {LATENT_HEADS} heads k={TOPK}"
    yield chip.result("sparse attention, latent", name, (took, other), work, error, BUDGET)


def latent_prompt(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """A prompt over latent rows, against matmuls and softmax: no SDPA that stays on the chip is as wide."""
    _, mask = readable(shape)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_torch(q, k, v, mask)[0]

    first = latent_operands(shape, LATENT_PROMPT_HEADS)
    count = sets_for(int(work_of(first, mask)[0]))
    sets = [first, *(latent_operands(shape, LATENT_PROMPT_HEADS) for _ in range(count - 1))]
    took, work, error = prompt(shape, sets, repeats)
    other = graph_time([partial(theirs, *s) for s in sets], repeats)
    name = f"{shape} {LATENT_PROMPT_HEADS} heads"
    yield chip.result("attention rows, latent", name, (took, other), work, error, ROW_BUDGET)


def rows(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """A dense prompt, against flash SDPA, which knows no windows: there it is causal, and does more."""

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    first = operands(shape)
    sets = [first, *(operands(shape) for _ in range(sets_for(sum(x.nbytes for x in first)) - 1))]
    took, work, error = prompt(shape, sets, repeats)
    other = graph_time([partial(flash, *s) for s in sets], repeats)
    yield chip.result("attention rows", str(shape), (took, other), work, error, ROW_BUDGET)


def prompt(shape: Shape, sets: Sequence[Operands], repeats: int) -> tuple[float, tuple[float, float], float]:
    """Returns what our kernel for prompts takes, its bytes and flops, and its error."""
    text, mask = readable(shape)
    q, k, v = sets[0]
    bounds = torch.ops.clsa.mask_bounds(q, None, [], q.shape[1], shape.T, text)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Asked for its lse, the op takes the kernel of ours.
        out: Tensor = torch.ops.clsa.attention(q, k, v, None, bounds, [], None, SCALE, 0.0, text)[0]
        return out

    took = graph_time([partial(ours, *s) for s in sets], repeats)
    # One key head after the other: the scores of all heads take too much in float32.
    heads = zip(*(x.float().chunk(k.shape[1], 1) for x in (q, k, v)), strict=True)
    exact = torch.cat([by_torch(*head, mask)[0] for head in heads], 1)
    return took, work_of(sets[0], mask), row_error(ours(q, k, v), exact)


@dataclass(frozen=True)
class Heads:
    """Heads of a layer, those of its cache, and their widths."""

    count: int = H
    kv: int = HKV
    d: int = D
    dv: int = D


def sparse_prompt(heads: Heads, shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """A prompt whose rows select 2048 tokens each, in blocks of rows and row by row, against dense SDPA.

    Neighbouring rows share most of their tokens, or next to none.
    """
    q = normal(1, heads.count, shape.queries, heads.d)
    k, v = normal(1, heads.kv, shape.T, heads.d), normal(1, heads.kv, shape.T, heads.dv)
    scale = heads.d**-0.5

    def sdpa() -> Tensor:
        with sdpa_kernel(FUSED):
            return scaled_dot_product_attention(q, k, v, enable_gqa=heads.kv < heads.count)

    dense = graph_time([sdpa], max(3, repeats // 10))
    some = torch.arange(0, shape.queries, shape.queries // 4, device=CUDA)
    for spread in (0.005, 100.0):
        indices = rows_of_tokens(shape, spread)
        pairs = zip(indices[0, 0, 0:64:2].tolist(), indices[0, 0, 1:64:2].tolist(), strict=True)
        shared = [len({*one} & {*other}) / TOPK for one, other in pairs]
        name = f"{shape} {heads.count}/{heads.kv} heads, {sum(shared) / len(shared):.0%} shared"
        given = (indices, None, None, [], None, scale, 0.0, "")
        exact = torch.cat([one_row(q[:, :, i : i + 1], k, v, indices[0, 0, i], scale) for i in some], 2)
        for way, variant in (("blocks of rows", "rows"), ("row by row", "gather")):
            launch = partial(LAUNCH["sparse_attention", variant], q, k, v, *given, wrap=straight)
            took = graph_time([launch], max(3, repeats // 10))
            error = row_error(launch()[:, :, some], exact)
            work = (
                float(k.nbytes + v.nbytes),
                2.0 * heads.count * shape.queries * TOPK * (heads.d + heads.dv),
            )
            yield chip.result(f"sparse prompt, {way}", name, (took, dense), work, error, ROW_BUDGET)


def rows_of_tokens(shape: Shape, spread: float) -> Tensor:
    """Returns indices [1, 1, S, TOPK]: each row has its own order of tokens, `spread` from a common one."""
    common = torch.rand(shape.T, device=CUDA)
    chosen = [
        (common + spread * torch.rand(256, shape.T, device=CUDA)).topk(TOPK).indices.sort(-1).values
        for _ in range(shape.queries // 256)
    ]
    return torch.cat(chosen).to(torch.int32).view(1, 1, shape.queries, TOPK)


def one_row(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """Returns attention of one query row over its tokens, in float32."""
    keys, values = (x[:, :, tokens.long()].float() for x in (k, v))
    grouped = q.float().view(1, k.shape[1], -1, q.shape[3])
    return ((grouped @ keys.mT * scale).softmax(-1) @ values).view(1, q.shape[1], 1, -1)


def pool(shape: Shape, heads: int) -> Tensor:
    """Returns an engine's pages [N, P, heads, D], transposed as the ops take them."""
    return normal(shape.B * shape.T // PAGE, PAGE, heads, D).transpose(1, 2)


def block_table(shape: Shape) -> Tensor:
    """Returns int32 [B, M]: pages in no order."""
    return torch.randperm(shape.B * shape.T // PAGE, device=CUDA).to(torch.int32).view(shape.B, -1)


def paged_dense(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """Dense decode over pages, against copying them in order and flash SDPA."""
    q, k, v, pages = normal(shape.B, H, 1, D), pool(shape, HKV), pool(shape, HKV), block_table(shape)
    lengths = torch.full((shape.B,), shape.T, device=CUDA, dtype=torch.int32)
    bounds = torch.stack((torch.zeros_like(lengths), lengths), -1).unsqueeze(1)

    def ours() -> Tensor:
        given = (None, bounds, [lengths], None, SCALE, 0.0, "kv < in0(b)", pages)
        out: Tensor = torch.ops.clsa.attention(q, k, v, *given)[0]
        return out

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, in_order(k, pages), in_order(v, pages), enable_gqa=True)

    times = graph_time([ours], repeats), graph_time([flash], repeats)
    exact, _ = by_torch(q[:1].float(), *(in_order(x, pages[:1]).float() for x in (k, v)))
    error = relative(ours()[:1], exact)
    work = (k.nbytes + v.nbytes, 4.0 * shape.B * H * shape.T * D)
    yield chip.result("attention decode, paged", str(shape), times, work, error, BUDGET)


def paged_sparse(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """Attention over 2048 random tokens in pages, against gathering them with torch and SDPA."""
    q, k, v, pages = normal(shape.B, H, 1, D), pool(shape, HKV), pool(shape, HKV), block_table(shape)
    bytes_read = 4 * shape.B * HKV * TOPK * D
    sets = [random_indices(shape, seed) for seed in range(sets_for(bytes_read))]

    def near(indices: Tensor) -> list[Tensor]:
        token = indices.long().view(shape.B, TOPK)
        page, slot = pages.gather(1, token // PAGE).long(), token % PAGE
        return [x.transpose(1, 2)[page, slot].transpose(1, 2) for x in (k, v)]

    def theirs(indices: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, *near(indices), scale=SCALE, enable_gqa=True)

    took = graph_time([partial(attend, q, k, v, s, pages) for s in sets], repeats)
    other = graph_time([partial(theirs, s) for s in sets], repeats)
    exact, _ = by_torch(q.float(), *(x.float() for x in near(sets[0])))
    error = relative(attend(q, k, v, sets[0], pages), exact)
    work = (bytes_read, 4.0 * shape.B * H * TOPK * D)
    yield chip.result("sparse attention, paged", f"{shape} k={TOPK}", (took, other), work, error, BUDGET)


def paged_scan(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """The scan of 64 index heads over pages, against copying them in order and torch's scan."""
    index = replace(index_of(shape.B, 64), pages=block_table(shape))
    sets = [pool(shape, 1) for _ in range(sets_for(2 * shape.B * shape.T * D))]
    yield from scans(shape, index, sets, chip, repeats)


def causal(queries: int, keys: int = 0, window: int = 0) -> Shape:
    """Returns the last `queries` rows of a prompt of `keys`; all of it where `keys` is 0."""
    return Shape(1, keys or queries, queries=queries, window=window)


CASES: dict[str, tuple[Part, ...]] = {
    "mass": (
        (mass, (Shape(1, 131072), Shape(4, 131072), causal(2048), causal(4096))),
        (choose, (causal(512, 16384),)),
    ),
    "latent": (
        (latent, (Shape(1, 131072), Shape(32, 32768))),
        (latent_prompt, (causal(1024), causal(1024, 4096))),
    ),
    "paged": (
        (paged_dense, (Shape(4, 131072),)),
        (paged_sparse, (Shape(4, 131072),)),
        (paged_scan, (Shape(8, 131072),)),
    ),
    "rows": (
        (rows, (causal(4096), causal(8192, window=512))),
        (partial(sparse_prompt, Heads()), (causal(4096, 131072),)),
        (partial(sparse_prompt, Heads(16, 16, 192, 128)), (causal(4096, 131072),)),
    ),
}
