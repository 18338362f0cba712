"""How long an operation takes, as a straight line over the number of keys: for reports, not for choices.

The cost model of `kernels/cost.py` is a step function of waves and chains; for long rows it lies within a few
percent of the line through two of its values (`test_estimate.py`), and a line can be read. What it does not
know is fitted to `benchmarks/NOTES.md` (H100), and scaled by bandwidth elsewhere: selection, attention mass,
prompts, and dense attention over few keys, which the model says takes twice as long as it does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from clsa_compile.kernels.choice import ranked
from clsa_compile.kernels.cost import Sizes
from clsa_compile.kernels.device import H100, Device
from clsa_compile.kernels.launch import ceil_div, padded_width

# Lengths that the line of a kernel over all keys goes through.
NEAR, FAR = 4096, 131072
# Dense attention of a step over no keys at all, beside its two launches.
NO_KEYS = 1.0
# Shares of the data sheet that were measured: products with weights (bytes, flops); a prompt's attention by
# torch, without a mask or a triangle, by torch with a mask written out, and by the kernel that skips blocks;
# the scan of a prompt's index; a gather by many rows.
PRODUCT_REACHED, PRODUCT_RATE = 0.82, 0.7
FLASH_RATE, MASKED_RATE, ROWS_RATE = 0.55, 0.25, 0.27
SCAN_RATE = 0.5
# Query rows of a program where keys are not split; and keys that the kernel that skips blocks goes through
# beyond those of a row, at each end of them.
ROWS_BLOCK, ROWS_EDGE = 128, 96
GATHER_REACHED = 0.9
# Microseconds of a selection: two launches, then per key of its longest row and per key of all further rows.
SELECT_FIXED, SELECT_ROW, SELECT_ROWS = 9.9, 2.9 / 131072, 0.57 / 131072
# Mass from stored scores: beside its bytes; and what storing them costs the pass, as a factor.
MASS_FIXED, STORED = 4.5, 1.08
# Products of float32 beside those of bfloat16.
FLOAT32_RATE = 1 / 16


@dataclass(frozen=True, slots=True)
class Line:
    """Microseconds: `fixed` plus `slope` for each key."""

    fixed: float
    slope: float


def attention(sizes: Sizes, device: Device, stored: bool = False) -> Line:
    """Returns the time of dense attention of a few query rows; `stored`: its scores are kept for mass."""
    far = _through("attention_decode", sizes, device, NEAR, FAR)
    fixed = 2 * device.launch_us + NO_KEYS
    slope = far.slope + (far.fixed - fixed) / FAR
    return Line(fixed, slope * STORED if stored else slope)


def sparse(sizes: Sizes, device: Device) -> Line:
    """Returns the time of attention to `sizes.T` selected tokens, over the number of tokens."""
    return _through("sparse_attention", sizes, device, max(sizes.T // 4, 1), max(sizes.T, 2))


def scan(sizes: Sizes, device: Device) -> Line:
    """Returns the time of scoring index keys for a few query rows."""
    name = "index_scan_single" if sizes.G == 1 else "index_scan"
    return _through(name, sizes, device, NEAR, FAR)


def flash(sizes: Sizes, device: Device) -> Line:
    """Returns the time of torch's attention of `sizes.G` query rows a kv head, to all keys or a triangle."""
    return _roofline(sizes, device, FLASH_RATE)


def masked(sizes: Sizes, rows: int, device: Device) -> Line:
    """Returns the time of torch's attention of `rows` queries a sequence where a mask is written out."""
    return _tiled(sizes, rows, device, MASKED_RATE)


def skipping(sizes: Sizes, rows: int, device: Device) -> Line:
    """Returns the time of the kernel that skips blocks, over the keys in a row's blocks."""
    return _tiled(sizes, rows, device, ROWS_RATE)


def prompt_scan(sizes: Sizes, device: Device) -> Line:
    """Returns the time of scoring index keys for many query rows."""
    return _roofline(sizes, device, SCAN_RATE)


def select(rows: int, device: Device) -> Line:
    """Returns the time of choosing the best keys of `rows` rows."""
    slope = (SELECT_ROW + SELECT_ROWS * (rows - 1)) * H100.bandwidth / device.bandwidth
    return Line(SELECT_FIXED, slope)


def mass(rows: int, heads: int, sets: int, device: Device) -> Line:
    """Returns the time of making `sets` rows of mass for each query row from the stored scores of `heads`."""
    return Line(device.launch_us + MASS_FIXED, 1e6 * rows * (2 * heads + 4 * sets) / device.bandwidth)


def product(size: float, flops: float, itemsize: int, device: Device) -> float:
    """Returns the microseconds of a product with `size` bytes of weights."""
    busy = max(size / (PRODUCT_REACHED * device.bandwidth), flops / (PRODUCT_RATE * rate(itemsize, device)))
    return device.launch_us + 1e6 * busy


def rate(itemsize: int, device: Device) -> float:
    """Returns flops a second for elements of so many bytes."""
    return device.rate if itemsize <= 2 else device.rate * FLOAT32_RATE


def _tiled(sizes: Sizes, rows: int, device: Device, reached: float) -> Line:
    """Returns the time of programs that go through all keys, each for one head and a block of query rows.

    Fewer of them than there are processors leave some idle: keys are not split.
    """
    heads = sizes.B * sizes.Hkv * sizes.G // rows
    programs = max(heads * ceil_div(rows, ROWS_BLOCK), device.sms)
    flops = 2 * programs * ROWS_BLOCK * (sizes.D + sizes.Dv)
    return Line(2 * device.launch_us, 1e6 * flops / (reached * rate(sizes.E, device)))


def _roofline(sizes: Sizes, device: Device, reached: float) -> Line:
    rows = sizes.B * sizes.Hkv
    width = sizes.D + sizes.Dv
    read = rows * width * sizes.E / device.bandwidth
    computed = 2 * rows * sizes.G * width / (reached * rate(sizes.E, device))
    return Line(2 * device.launch_us, 1e6 * max(read, computed))


def _through(name: str, sizes: Sizes, device: Device, near: int, far: int) -> Line:
    padded = replace(sizes, D=padded_width(sizes.D), Dv=padded_width(sizes.Dv) if sizes.Dv else 0)
    times = []
    for keys in (near, far):
        best = ranked(name, replace(padded, T=keys), device)
        if not best:  # wide heads, which the model has no shape for
            read = sizes.B * sizes.Hkv * (sizes.D + sizes.Dv) * sizes.E
            return Line(2 * device.launch_us, 1e6 * read / (GATHER_REACHED * device.bandwidth))
        # Near ones are equal to the model, so its own order is not asked for.
        times.append(min(us for us, _ in best))
    slope = (times[1] - times[0]) / (far - near)
    return Line(times[0] - slope * near, slope)


__all__ = [
    "Line", "attention", "flash", "masked", "mass", "product", "prompt_scan", "scan", "select", "skipping",
]  # fmt: skip
