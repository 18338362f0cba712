"""Medians of device time and of wall time; memory; what the machine can read in a second."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 5  # calls: compile, warm up, record the CUDA graph, replay twice
# The device spins this long before a timed step, so that the host is done launching it: events
# then bracket the device's work alone. 1e7 cycles are about 6 ms.
SPIN_CYCLES = 10_000_000
SPREAD = 0.01  # two measurements that differ by no more agree


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step: on the device alone, and by the clock, steps back to back."""

    device: float
    wall: float


def synchronize(device: torch.device) -> None:
    """Waits for the device; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_time(step: Callable[[], object], before: Callable[[], object], repeats: int) -> float:
    """Gives the median milliseconds of a step between two CUDA events."""
    pairs = []
    for _ in range(repeats):
        before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        step()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def wall_time(
    step: Callable[[], object],
    before: Callable[[], object],
    device: torch.device,
    steps: int,
    repeats: int,
) -> float:
    """Gives the median milliseconds of a step by the clock, `steps` of them back to back."""
    times = []
    for _ in range(repeats):
        before()
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin) / steps)
    return statistics.median(times)


def measure(
    step: Callable[[], object],
    before: Callable[[], object],
    device: torch.device,
    *,
    steps: int = 1,
    repeats: int = 30,
) -> Timing:
    """Times a compiled step; `before` puts the cache back to where the step starts from."""
    for _ in range(WARM_UP):
        before()
        step()
    wall = wall_time(step, before, device, steps, max(repeats // 5, 3))
    on_device = device_time(step, before, repeats) if device.type == "cuda" else wall
    return Timing(on_device, wall)


@dataclass(frozen=True)
class Settled:
    """What two measurements agree on, and by how much the two differ, as a share of the smaller."""

    timing: Timing
    spread: float


def settled(once: Callable[[], Timing], most: int = 8) -> Settled:
    """Measures until the two shortest device times agree, so often at most; gives the longer of the two.

    What else uses the device meanwhile, as other processes that compile and try their kernels, only ever adds
    time. SPREAD says what agrees.
    """
    found = sorted((once(), once()), key=lambda timing: timing.device)
    while found[1].device > (1 + SPREAD) * found[0].device and len(found) < most:
        found = sorted((*found, once()), key=lambda timing: timing.device)
    return Settled(found[1], found[1].device / found[0].device - 1)


def extra_memory(step: Callable[[], object], device: torch.device) -> int | None:
    """Gives the bytes that a step allocates at its peak beyond what was there; None on a CPU."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def read_bandwidth(device: torch.device) -> float:
    """Measures how many bytes a second the device reads: the sum of a large tensor."""
    size = 2**30 if device.type == "cuda" else 2**26
    data = torch.ones(size, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(20):  # the first may find a GPU's clocks down
        synchronize(device)
        begin = time.perf_counter()
        data.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return data.numel() * data.element_size() / best


def forget_compiled(device: torch.device) -> None:
    """Drops all compiled code and gives the memory it held back."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
