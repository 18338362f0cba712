"""Chooses a launch's shape: candidates that fit the device, by predicted cost.

Sizes are plain numbers here. A plan passes what it assumes of a size that is not known while tracing, so that
the choice is that of a long row whatever comes, and nothing is compared that could become a guard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from clsa_compile.kernels.cost import Shape, Sizes, microseconds, needs
from clsa_compile.kernels.device import Device
from clsa_compile.kernels.launch import LOADS_IN_FLIGHT, ceil_div, floor_power_of_two, power_of_two

# (BLOCK_N, warps, stages), in order of preference.
BLOCKS = {
    "attention_decode": ((128, 8, 4), (64, 8, 4), (64, 8, 3), (64, 4, 3), (64, 4, 2), (32, 4, 4)),
    "sparse_attention": ((64, 4, 2), (64, 4, 3), (32, 4, 3), (32, 4, 2)),
    "index_scan": ((64, 4, 4), (64, 4, 3), (128, 8, 3)),
    "index_scan_single": ((64, 8, 2), (64, 8, 3), (128, 8, 2)),
}
# Splits that were measured: the fewest where rows are long, and the most.
SPLITS = {"attention_decode": (4, 128), "sparse_attention": (8, 32)}
# Keys of a split where rows are short, and programs an SM where rows are many: about what was measured.
LEAST_KEYS = 256
PROGRAMS_AN_SM = 16
# A scan's programs stay for the whole launch: so many of them an SM.
SCANS_AN_SM = (1, 2, 4)
# Predictions that are nearer than this are equal: the model errs by 3% in the median, and by 11% for one
# measurement in ten. The order of BLOCKS decides then.
MARGIN = 0.05
# Registers of a thread, as the model estimates them. The estimate is rough, and above 255 a thread spills.
MOST_REGISTERS = 200
# Narrow heads, by the width of K and V together, for which the compiler was seen to spill on sm_90.
SPILLS = {"sparse_attention": (128, ((64, 4, 2), (64, 4, 3)))}
# Widths of K and V together up to which what was measured at 256 is extrapolated.
MOST_WIDTH = 512

Chooser = Callable[[str, Sizes, Device], Shape]


def modelled(dtype: torch.dtype, block_m: int, width: int) -> bool:
    """Tells whether the model may choose: it knows two-byte elements and tiles of 16 query rows.

    `width` is that of K and V together. Other plans are as they were measured by hand.
    """
    return dtype.itemsize == 2 and block_m == 16 and width <= MOST_WIDTH


def candidates(name: str, sizes: Sizes, device: Device) -> Iterator[tuple[int, Shape]]:
    """Yields (preference, shape) of what fits the device's shared memory and registers."""
    most = min(device.program_shared, device.shared)
    narrow, spilling = SPILLS.get(name, (0, ()))
    splits = list(_splits(name, sizes, device))
    for rank, block in enumerate(BLOCKS[name]):
        if sizes.D + sizes.Dv <= narrow and block in spilling:
            continue
        block_n, _, stages = block
        shared, registers = needs(name, sizes, Shape(*block, 1))
        in_flight = block_n * (sizes.D + sizes.Dv) * sizes.E * (stages - 1)
        if shared <= most and in_flight <= LOADS_IN_FLIGHT and registers <= MOST_REGISTERS:
            yield from ((rank, Shape(*block, count)) for count in splits)


def _splits(name: str, sizes: Sizes, device: Device) -> Iterator[int]:
    rows = sizes.B * sizes.Hkv
    if name not in SPLITS:
        yield from sorted({max(1, times * device.sms // rows) for times in SCANS_AN_SM})
        return
    fewest, most = SPLITS[name]
    last = min(
        most, floor_power_of_two(PROGRAMS_AN_SM * device.sms // rows), power_of_two(ceil_div(sizes.T, 64))
    )
    splits = min(fewest, last, floor_power_of_two(sizes.T // LEAST_KEYS))
    while splits <= last:
        yield splits
        splits *= 2


@functools.lru_cache(maxsize=4096)
def ranked(name: str, sizes: Sizes, device: Device) -> tuple[tuple[float, Shape], ...]:
    """Returns (microseconds, shape) of the candidates, best first; nothing where none fits."""
    found = [
        (microseconds(name, sizes, shape, device), rank, shape)
        for rank, shape in candidates(name, sizes, device)
    ]
    near = (1 + MARGIN) * min((us for us, *_ in found), default=0.0)
    found.sort(key=lambda entry: (entry[0] > near, entry[1] if entry[0] <= near else 0, entry[0]))
    return tuple((us, shape) for us, _, shape in found)


def predicted(name: str, sizes: Sizes, device: Device) -> Shape | None:
    """Returns the candidate with the least predicted time, or None where no candidate fits the device."""
    best = ranked(name, sizes, device)
    return best[0][1] if best else None


_CHOOSER: ContextVar[Chooser | None] = ContextVar("clsa_chooser", default=None)


@contextmanager
def choosing(chooser: Chooser) -> Iterator[None]:
    """Has `chooser` asked for every shape that is chosen inside, instead of the model."""
    token = _CHOOSER.set(chooser)
    try:
        yield
    finally:
        _CHOOSER.reset(token)


def choose(name: str, sizes: Sizes, device: Device) -> Shape | None:
    """Returns the shape of a launch, or None where no candidate fits the device."""
    chooser = _CHOOSER.get()
    if chooser is None or not ranked(name, sizes, device):
        return predicted(name, sizes, device)
    return chooser(name, sizes, device)
