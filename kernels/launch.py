"""What the launches share: block and split sizes, and how masks reach a kernel.

Sizes may be SymInts while a graph is traced. They are passed on and multiplied, never compared:
where a choice depends on a size, `static` says whether it is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clsa_compile.ir.variants import Facts
from clsa_compile.kernels.render import kernel

Wrap: TypeAlias = Callable[[Any], Any]
Part: TypeAlias = tuple[int, int, bool]

# Shared memory that the loads in flight of one program may take, in bytes. With what else a program
# needs this fits sm_80 (163 KiB), sm_90 and sm_100 (227 KiB).
LOADS_IN_FLIGHT = 131072
# Sums (query rows by head width) that the registers of one program hold.
MOST_SUMS = 20480
MOST_ROWS = 128
MOST_WIDTH = 576
# Keys assumed where their number is not known while tracing.
ASSUMED_KEYS = 131072


def unsupported_dtype(dtype: torch.dtype) -> str:
    """Returns why a dtype cannot be computed with, or nothing."""
    known = (torch.float16, torch.bfloat16, torch.float32)
    return "" if dtype in known else f"{dtype} is not one of float16, bfloat16, float32"


def unsupported_operands(facts: Facts) -> str:
    """Returns why operands cannot be computed with, or nothing."""
    if 0 in (facts.B, facts.T):
        return "no sequence or no key"
    if facts.mixed:
        return "queries, keys and values are not of one dtype"
    return unsupported_dtype(facts.dtype)


def static(size: Any) -> bool:
    """Tells whether a size is known while the graph is traced."""
    return isinstance(size, int)


def ceil_div(size: Any, block: int) -> Any:
    """Returns size / block rounded up; works on SymInts."""
    return (size + block - 1) // block


def power_of_two(n: int) -> int:
    """Returns the smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def floor_power_of_two(n: int) -> int:
    """Returns the largest power of two that is at most n, and 1 for n < 1."""
    return 1 << (max(n, 1).bit_length() - 1)


def parts(width: int) -> tuple[Part, ...]:
    """Cuts a head width into one or two blocks (start, block width, padded?) for tl.arange.

    192 -> 128 + 64, 80 -> 64 + 16, 96 -> 64 + 32; 72 -> 64 + 16 with 8 unused; 112 -> 128 with 16 unused.
    """
    whole = max(16, power_of_two(width))
    if whole == width:
        return ((0, width, False),)
    first = floor_power_of_two(width)
    second = max(16, power_of_two(width - first))
    if first < 16 or first + second >= whole:
        return ((0, whole, True),)
    return ((0, first, False), (first, second, first + second != width))


def padded_width(width: int) -> int:
    """Returns how many columns the blocks of `parts` have together."""
    return sum(block for _, block, _ in parts(width))


def keys_per_step(row_bytes: int, stages: int, largest: int, query_bytes: int = 0) -> int:
    """Returns BLOCK_N so that `stages` - 1 steps of `row_bytes` a key fit into shared memory.

    `query_bytes` is what the queries take beside them.
    """
    fitting = (LOADS_IN_FLIGHT - query_bytes) // max(row_bytes * max(stages - 1, 1), 1)
    return max(16, min(largest, floor_power_of_two(fitting)))


def query_rows(rows: int) -> int:
    """Returns BLOCK_M of a tile of `rows` query rows: what tensor cores take, and a power of two."""
    return max(16, power_of_two(rows))


def unsupported_tile(facts: Facts, rows: int) -> str:
    """Returns why `rows` query rows of these heads cannot be one tile in registers, or nothing."""
    if reason := unsupported_operands(facts):
        return reason
    width = max(padded_width(facts.D), padded_width(facts.Dv))
    if rows <= MOST_ROWS and width <= MOST_WIDTH and query_rows(rows) * width <= MOST_SUMS:
        return ""
    return f"{rows} query rows a kv head with heads of {max(facts.D, facts.Dv)} do not fit into registers"


def heads_at_once(group: int, width: int) -> int:
    """Returns BLOCK_M: how many of `group` heads of a kv head one program takes, for heads of `width`."""
    fitting = min(MOST_ROWS, floor_power_of_two(MOST_SUMS // width))
    return min(query_rows(group), fitting)


def is_latent(k: Tensor, v: Tensor) -> bool:
    """Tells whether v is the first block of k's columns, as in MLA's latent cache [B, 1, T, 512 + 64].

    Of a paged cache too: [N, 1, P, 512 + 64].
    """
    return (
        parts(k.shape[3])[0] == (0, v.shape[3], False)
        and k.untyped_storage()._cdata == v.untyped_storage()._cdata
        and k.storage_offset() == v.storage_offset()
        and k.stride() == v.stride()
    )


def tile_plan(q: Tensor, k: Tensor, v: Tensor, rows: int, largest: int, stages: int) -> tuple[int, int, int]:
    """Returns (BLOCK_N, num_warps, num_stages) for `rows` query rows a tile, near what is asked for."""
    block_m = query_rows(rows)
    d, dv = padded_width(k.shape[3]), padded_width(v.shape[3])
    loaded = d if is_latent(k, v) else d + dv
    if q.dtype == torch.float32:
        # IEEE dots of fp32 keep their operands in registers.
        return (32 if block_m == 16 else 16), 8, 2
    # From 64 rows on, Hopper's dots read the queries from shared memory.
    query_bytes = block_m * d * q.element_size() if block_m >= 64 else 0
    block_n = keys_per_step(loaded * k.element_size(), stages, largest, query_bytes)
    return block_n, (8 if block_m * max(d, dv) > 4096 else 4), stages


def mask_context(
    mask: Tensor | None, mask_inputs: Sequence[Tensor], predicate: str, rows: tuple[int, ...]
) -> dict[str, Any]:
    """Returns what a template must know of the mask.

    `rows` are the dimensions of [B, H, S, T] that differ between the rows of one program's tile; a mask
    that is broadcast along all of them is read once for all rows.
    """
    kind = "" if mask is None else ("bool" if mask.dtype == torch.bool else "additive")
    sizes = () if mask is None else _four(mask.shape, 1)
    return {
        "mask": kind,
        "mask_rows": any(not (static(sizes[i]) and sizes[i] == 1) for i in rows) if sizes else False,
        "predicate": predicate,
        "inputs": tuple(x.dim() for x in mask_inputs),
    }


def mask_arguments(mask: Tensor | None, mask_inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Returns the kernel arguments of the mask tensor and the mask inputs, strides included."""
    args: dict[str, Any] = {}
    if mask is not None:
        args["mask_ptr"] = mask
        # The mask goes in as it is, not expanded: an expanded view may be copied on the way.
        strides = [
            0 if static(size) and size == 1 else stride
            for size, stride in zip(mask.shape, mask.stride(), strict=True)
        ]
        names = ("mask_sb", "mask_sh", "mask_sq", "mask_st")
        args.update(zip(names, _four(strides, 0), strict=True))
        if mask.dtype != torch.bool:
            args["MASK_MIN"] = torch.finfo(mask.dtype).min
    for slot, source in enumerate(mask_inputs):
        args[f"in{slot}"] = source
        args.update({f"in{slot}_s{axis}": stride for axis, stride in enumerate(source.stride())})
    return args


def _four(sizes: Sequence[Any], fill: int) -> tuple[Any, ...]:
    return (*([fill] * (4 - len(sizes))), *sizes)


def strides(prefix: str, names: str, x: Tensor) -> dict[str, Any]:
    """Returns {"k_sb": ..., "k_sh": ...} for prefix "k" and names "bh..", one letter a dimension."""
    return {f"{prefix}_s{name}": stride for name, stride in zip(names, x.stride(), strict=True)}


def page_arguments(k: Tensor, pages: Tensor | None) -> dict[str, Any]:
    """Returns the kernel arguments of the block table, if there is one.

    A kernel is made for the size of a page: where that is a SymInt, it becomes the number it has.
    """
    if pages is None:
        return {}
    return {"pages_ptr": pages, **strides("pages", "bm", pages), "N": k.shape[0], "PAGE": int(k.shape[2])}


def bounds_arguments(bounds: Tensor | None) -> dict[str, Any]:
    """Returns the kernel argument of the bounds, if there are any."""
    return {} if bounds is None else {"bounds_ptr": bounds.contiguous()}


def sinks_arguments(sinks: Tensor | None) -> dict[str, Any]:
    """Returns the kernel argument of the sinks [H], if there are any."""
    return {} if sinks is None else {"sinks_ptr": sinks.contiguous()}


def output(q: Tensor, dv: int) -> Tensor:
    """Returns an empty [B, S, H, Dv]: its transpose is what projections after attention read fastest."""
    b, h, s, _ = q.shape
    return q.new_empty((b, s, h, dv))


def split_scratch(q: Tensor, dv: int, splits: int) -> dict[str, Tensor]:
    """Returns empty fp32 scratch for what each split leaves to `combine`."""
    b, h, s, _ = q.shape
    rows = (b, h, s, splits)
    return {
        "part_ptr": q.new_empty((*rows, dv), dtype=torch.float32),
        "peak_ptr": q.new_empty(rows, dtype=torch.float32),
        "total_ptr": q.new_empty(rows, dtype=torch.float32),
    }


def combine(
    scratch: dict[str, Tensor], sinks: Tensor | None, out: Tensor, lse: Tensor | None, wrap: Wrap
) -> None:
    """Merges the splits in `scratch` into out [B, S, H, Dv] and lse [B, H, S]."""
    b, s, h, dv = out.shape
    splits = scratch["peak_ptr"].shape[-1]
    # One warp, so that nothing waits for other warps, and tiles of 1024 sums: 32 of them a thread.
    block = max(16, min(power_of_two(dv), 64, 1024 // splits))
    jit = kernel("combine", sinks=sinks is not None, with_lse=lse is not None)
    args: dict[str, Any] = {**scratch, **sinks_arguments(sinks)}
    if lse is not None:
        args["lse_ptr"] = lse
    wrap(jit)[(b * h * s, ceil_div(dv, block))](
        **args,
        out_ptr=out,
        S=s,
        H=h,
        DV=dv,
        NSPLIT=splits,
        BLOCK_E=block,
        num_warps=1,
        num_stages=1,
    )
