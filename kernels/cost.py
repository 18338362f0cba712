"""How long a kernel takes, as a sympy expression of sizes, of its shape and of the device.

A launch is a grid of programs; an SM holds some of them at a time, so they run in waves. In a wave three
things go on at once, and the slowest counts most:

- the *chain* of one program: steps one after another, each as long as its arithmetic, or as the wait for
  loads that too few stages leave uncovered;
- the *memory*: the bytes of all programs of the wave;
- the *issue* of instructions, which the warps of all programs on an SM share.

Constants are fitted by `python benchmarks/fit_cost.py` to what was measured on an H100
(benchmarks/measured/h100_shapes.json), with heads of 128 in bfloat16. Other widths are extrapolated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import sympy
from sympy import Max, Min, ceiling, floor
from sympy.printing.pycode import PythonCodePrinter

from clsa_compile.kernels.device import Device

SIZES = (*sympy.symbols("B Hkv G T D Dv E", positive=True), sympy.Symbol("streamed", nonnegative=True))
SHAPE = sympy.symbols("block_n warps stages splits", positive=True)
CHIP = sympy.symbols("sms bandwidth shared registers launch", positive=True)
RESIDENT = sympy.Symbol("resident", positive=True)
B, HKV, G, T, D, DV, E, STREAMED = SIZES
BLOCK_N, WARPS, STAGES, SPLITS = SHAPE
SMS, BANDWIDTH, SHARED, REGISTERS, LAUNCH = CHIP

# Arithmetic is counted in tiles of 64 keys of 128 columns of two bytes.
TILE_BYTES = 64 * 128 * 2
# What overlaps adds up in this norm: a sum would be 1, a plain maximum infinity.
NORM = 3
# Shared memory of each program that the hardware keeps for itself, in bytes.
SHARED_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a launch is given: the dimension letters of `ir/ops.py`.

    B counts sequences, or sequences by query rows where each row has keys of its own; G is query rows a kv
    head; T keys, or selected tokens; Dv is 0 for an index; E is bytes an element. `streamed` counts the rows
    of queries that an index scan loads with each step of keys, 0 where they stay on the chip.
    """

    B: int
    Hkv: int
    G: int
    T: int
    D: int
    Dv: int
    E: int
    streamed: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """What a plan chooses: keys a step, warps, stages, and programs that share the keys of a row."""

    block_n: int
    warps: int
    stages: int
    splits: int


@dataclass(frozen=True, slots=True)
class Constants:
    """What was fitted. Microseconds, but for `reached`, the share of the bandwidth, and `merged`.

    ramp: the chip filling and emptying. start: a program before its first step; fill: more for each stage.
    latency: from asking for a tile to having it. step: one step beside its tile; tile, tile_warp: the
    arithmetic of a tile, the second part shared by the warps (of 4). issue: how long the SM is busy with a
    step, for 4 warps. merged: how often the bytes of the partial sums count.
    """

    ramp: float = 0.0
    start: float = 0.0
    fill: float = 0.0
    latency: float = 0.0
    step: float = 0.0
    tile: float = 0.0
    tile_warp: float = 0.0
    issue: float = 0.0
    reached: float = 1.0
    merged: float = 0.0


@dataclass(frozen=True, slots=True)
class Family:
    """What tells one kernel from another.

    key_bytes: read and written a key. ahead: steps over which a load's latency is spread. merges: a second
    launch merges the splits. shared: bytes of shared memory of a program; registers: of a thread, both as the
    compiler reports them for sm_90 (`python -m clsa_compile.kernels.offline`), roughly.
    """

    name: str
    key_bytes: Any
    ahead: Any
    merges: bool
    shared: Any
    registers: Any
    constants: Constants


# The keys, and values, of one step: bytes, and their part of a thread in 32-bit registers.
STEP = BLOCK_N * (D + DV) * E
HELD = STEP / (4 * 32 * WARPS)
# Triton keeps `stages` - 1 steps in flight for the operands of a dot.
DOT_AHEAD = Max(STAGES - 1, 1)

FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="attention_decode",
            key_bytes=(D + DV) * E,
            ahead=DOT_AHEAD,
            merges=True,
            shared=STEP * (STAGES - 1) + 6144,
            registers=60 + 0.3 * HELD,
            constants=Constants(
                ramp=9.2922, start=1.1273, latency=0.361, step=0.5989, tile=0.2565, tile_warp=0.3037,
                issue=0.2513, reached=0.9709, merged=2.5527,
            ),
        ),
        Family(
            name="sparse_attention",
            key_bytes=(D + DV) * E,
            ahead=DOT_AHEAD,
            merges=True,
            shared=STEP * (STAGES - 1) + 6144,
            registers=50 + 0.75 * HELD,
            constants=Constants(
                start=0.5461, fill=0.4631, latency=0.3457, tile=0.3991, tile_warp=0.1864, issue=0.3757,
                reached=0.7652, merged=1.0372,
            ),
        ),
        Family(
            name="index_scan",
            key_bytes=D * E + 4,
            ahead=DOT_AHEAD,
            merges=False,
            # 64 rows of queries stay, or those of each step are in flight with its keys, with a weight each;
            # and scores pass through.
            shared=STEP * STAGES + Max(64, STAGES * STREAMED) * D * E + STAGES * STREAMED * 4 + 256,
            registers=28 + 1.1 * HELD,
            constants=Constants(
                ramp=1.4317, start=1.1413, latency=0.7, tile=0.2837, issue=0.0858, reached=0.8689
            ),
        ),
        Family(
            name="index_scan_single",
            key_bytes=D * E + 4,
            # One head takes no dot, so a step is in flight to registers too.
            ahead=STAGES,
            merges=False,
            shared=STEP * (STAGES - 1) + 256,
            registers=32 + 0.5 * HELD,
            constants=Constants(ramp=1.1082, latency=1.5652, tile=0.21, tile_warp=0.3337, reached=0.865),
        ),
    )
}  # fmt: skip


@functools.cache
def definitions(name: str) -> dict[str, Any]:
    """Returns the named parts of a family's time, in terms of sizes, shape, chip and constants."""
    with sympy.evaluate(False):
        return _definitions(FAMILIES[name])


def _definitions(family: Family) -> dict[str, Any]:
    c = {field.name: constant(field.name) for field in fields(Constants)}
    work = STEP / TILE_BYTES
    arithmetic = c["step"] + work * (c["tile"] + c["tile_warp"] * 4 / WARPS)
    steps = ceiling(T / (BLOCK_N * SPLITS))
    chain = (
        c["start"]
        + c["fill"] * (STAGES - 1)
        + steps * Max(arithmetic, (c["latency"] + arithmetic) / family.ahead)
    )
    slots = SMS * RESIDENT
    # Programs beyond the number of tiles have nothing to do.
    sharing = Min(SPLITS, ceiling(T / BLOCK_N))
    programs = B * HKV * sharing
    waves = floor(programs / slots)
    left = programs - waves * slots
    peak = c["reached"] * BANDWIDTH * sympy.Rational(1, 10**6)  # bytes a microsecond
    program_bytes = T * family.key_bytes / sharing

    def wave(count: Any) -> Any:
        busy = steps * c["issue"] * WARPS / 4 * ceiling(count / SMS)
        parts = (chain, count * program_bytes / peak, busy)
        return sum(part**NORM for part in parts) ** sympy.Rational(1, NORM)

    # Written once and read once, in float32, with the largest score and the sum of each row.
    merged = 8 * B * HKV * G * SPLITS * (DV + 2) / peak if family.merges else sympy.Integer(0)
    launches = 1 + (Min(SPLITS - 1, 1) if family.merges else 0)
    return {
        "resident": resident(family),
        "full_wave": wave(slots),
        "last_wave": wave(left),
        "time": LAUNCH * launches
        + c["ramp"]
        + waves * wave(slots)
        + Min(left, 1) * wave(left)
        + c["merged"] * Min(SPLITS - 1, 1) * merged,
    }


def resident(family: Family) -> Any:
    """Returns how many programs an SM holds at a time; 64 warps is the hardware's limit."""
    by_shared = floor(SHARED / (family.shared + SHARED_KEPT))
    by_registers = floor(REGISTERS / (32 * WARPS * family.registers))
    return Max(1, Min(by_shared, by_registers, floor(64 / WARPS)))


def constant(name: str) -> Any:
    """Returns the symbol of one of `Constants`."""
    return sympy.Symbol(name, nonnegative=True)


def expression(name: str, fitted: bool = True) -> Any:
    """Returns a family's time in microseconds; its free symbols are SIZES, SHAPE and CHIP.

    Without `fitted` the constants are symbols too.
    """
    parts = {key: part.doit() for key, part in definitions(name).items()}
    time = parts["time"].subs(RESIDENT, parts["resident"])
    if not fitted:
        return time
    constants = FAMILIES[name].constants
    return time.subs({constant(f.name): getattr(constants, f.name) for f in fields(Constants)})


# Terms stay in the order that they were written in: to sort them takes longer than to print them.
_PRINTER = PythonCodePrinter({"order": "none"})


@functools.cache
def _functions(name: str) -> tuple[Callable[..., int], Callable[..., float]]:
    """Returns `resident` and `time` of a family as Python functions; made once a process.

    Nothing is substituted, because sympy would simplify what comes out, which takes most of a second.
    """
    parts = definitions(name)
    known = (*SIZES, *SHAPE, *CHIP)
    constants = [constant(f.name) for f in fields(Constants)]
    return _compiled(known, parts["resident"]), _compiled((*known, RESIDENT, *constants), parts["time"])


def _compiled(arguments: Sequence[Any], expression: Any) -> Callable[..., Any]:
    """Returns an expression as a Python function. `sympy.lambdify` also writes a sorted docstring, slowly."""
    text = f"lambda {', '.join(map(str, arguments))}: {_PRINTER.doprint(expression)}"
    return eval(text, {"math": math})


@functools.cache
def _needs(name: str) -> Callable[..., tuple[float, float]]:
    family = FAMILIES[name]
    shared, registers = (_compiled((*SIZES, *SHAPE), e) for e in (family.shared, family.registers))
    return lambda *known: (shared(*known), registers(*known))


def microseconds(name: str, sizes: Sizes, shape: Shape, device: Device) -> float:
    """Returns the predicted time of a launch, with the launch that merges its splits if there is one."""
    chip = (device.sms, device.bandwidth, device.shared, device.registers, device.launch_us)
    known = (*_values(sizes), *_values(shape), *chip)
    held, time = _functions(name)
    return time(*known, held(*known), *_values(FAMILIES[name].constants))


def needs(name: str, sizes: Sizes, shape: Shape) -> tuple[float, float]:
    """Returns (bytes of shared memory a program, registers a thread), estimated."""
    return _needs(name)(*_values(sizes), *_values(shape))


def _values(record: Sizes | Shape | Constants) -> tuple[Any, ...]:
    return tuple(getattr(record, field.name) for field in fields(record))
