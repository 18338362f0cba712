"""Measures prompts and decode steps of the paper's 4B shape: a dense Transformer, YOCO, indexers, and CLSA.

Random weights, bfloat16, static caches filled with random numbers, one CUDA GPU:

    python benchmarks/headline.py --out docs/headline                   # everything, for hours
    python benchmarks/headline.py --out docs/headline --minutes 9       # goes on where the last call ended
    python benchmarks/headline.py --out docs/headline --jobs 6          # six processes compile, one measures
    python benchmarks/headline.py --out docs/headline --only decode/131072 --quick
    python benchmarks/headline.py --out docs/headline --report          # table and plots of what is there
    python benchmarks/headline.py --out /tmp/headline --tiny            # a trial run, also on a CPU

A cell is one measurement; each is written to OUT.json at once, and a call with the same OUT measures those
that are missing. The Transformer runs through Inductor with torch's flash attention, everything else through
clsa; decode steps are CUDA graphs in both. What does not fit is computed from two numbers of layers, and so
is everything with --quick. The exit code is 1 where a compiled decoder departs from the eager one, 2 where
time ran out. OUT.md says how each column is made.
"""

import argparse
import gc
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from beside import Turn, beside, one_turn
from decoders import (
    VARIANTS,
    Config,
    Variant,
    build,
    cache_formula,
    fill,
    weight_bytes,
    weight_count,
    without_attention,
)
from headline_report import Results, write_report
from results import write_text
from rich.console import Console
from timing import Timing, forget_compiled, measure, read_bandwidth, settled, synchronize
from torch import Tensor
from yoco_decoder import PRESETS, Cache, Decoder

GIB = 2**30
STEPS = 16  # back to back, for wall time
CHECK_BUDGET = 1e-3  # of the largest logit, in float32
SPARE = 0.06  # of the device's memory, for what steps allocate
# Lengths and batches, where none are asked for.
SIZES = [8192, 32768, 131072], [1, 4, 8, 16, 32]
TINY_SIZES = [256, 512], [1, 2]

console = Console(width=None if sys.stdout.isatty() else 150)  # a log wraps no table


@dataclass(frozen=True)
class Cell:
    """One measurement. kind: check, decode, prefill, or rest (a step without attention and selection)."""

    kind: str
    variant: str
    length: int = 0
    batch: int = 1

    @property
    def key(self) -> str:
        """Names the cell in the JSON file and for --only."""
        return f"{self.kind}/{self.length}/{self.batch}/{self.variant}"


@torch.library.custom_op("headline::wait_for_turn", mutates_args=())
def wait_for_turn(ids: Tensor, path: str) -> Tensor:
    """Waits where compiled code begins to run until it is this process' turn."""
    Turn(Path(path)).take()
    return ids.clone()


@wait_for_turn.register_fake
def _(ids: Tensor, path: str) -> Tensor:
    return torch.empty_like(ids)


def waiting(model: Decoder, turn: Turn) -> Callable[..., Tensor]:
    """Returns a decoder that runs when it is this process' turn."""
    path = str(turn.path)

    def run(ids: Tensor, *others: Any) -> Tensor:
        return model(wait_for_turn(ids, path), *others)

    return run


@dataclass(frozen=True)
class Bench:
    """The sizes, and the machine, which several processes may use in turn."""

    config: Config
    device: torch.device
    repeats: int
    quick: bool
    turn: Turn = field(default_factory=Turn)

    @property
    def dtype(self) -> torch.dtype:
        """Gives the type of weights and caches."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def sized(self, variant: Variant, layers: int | None = None) -> Config:
        """Returns a variant's configuration, of all layers or of so many."""
        return replace(self.config, attention=variant.attention, layers=layers or self.config.layers)

    def fits(self, config: Config, batch: int, length: int) -> bool:
        """Tells whether weights and cache fit on the device, with something to spare."""
        return self.need(config, batch, length) + 2 * GIB < self.room

    @property
    def room(self) -> float:
        """Gives the bytes that may be used of the device's memory; a CPU's are not counted."""
        if self.device.type != "cuda":
            return math.inf
        return (1 - SPARE) * torch.cuda.get_device_properties(self.device).total_memory

    def need(self, config: Config, batch: int, length: int) -> int:
        """Counts the bytes of weights and cache."""
        item = self.dtype.itemsize
        return weight_count(config) * item + cache_formula(config, batch, length, item)

    def compile(self, model: Decoder, variant: Variant, *, replay: bool) -> Callable[..., Any]:
        """Compiles a decoder; `replay` asks for CUDA graphs, which only a GPU has.

        From now on it is another process' turn. What compiles waits for it before it runs, but for steps: a
        CUDA graph cannot wait, and their first run takes no time.
        """
        forget_compiled(self.device)
        self.turn.give()
        runs = waiting(model, self.turn) if self.turn.path and not replay else model
        mode = "reduce-overhead" if replay and self.device.type == "cuda" else None
        if variant.backend != "clsa":
            return torch.compile(runs, backend=variant.backend, mode=mode, dynamic=False)
        options = variant.options | ({"mode": mode} if mode else {})
        return torch.compile(runs, backend="clsa", options=options or None, dynamic=False)


def by_layers(bench: Bench, variant: Variant, batch: int, length: int, run: Callable[..., dict]) -> dict:
    """Measures the whole decoder, or where it does not fit two smaller ones that give the time of a layer."""
    layers = bench.config.layers
    small, large = variant.depths
    whole = bench.fits(bench.sized(variant), batch, length)
    if (whole and not bench.quick) or layers <= large:
        return run(bench.sized(variant)) | {"computed_from": None}
    if not bench.fits(bench.sized(variant, large), batch, length):
        return {"error": f"{large} layers do not fit"}
    times = [run(bench.sized(variant, depth)) for depth in (small, large)]
    found = dict(times[1])
    for name in ("ms", "wall_ms"):
        slope = (times[1][name] - times[0][name]) / (large - small)
        found[name] = times[1][name] + slope * (layers - large)
    found["spread"] = max(part["spread"] for part in times)
    return found | {"computed_from": [small, large], "fits": whole}


@torch.no_grad()
def call(forward: Callable[..., Any], cache: Cache, ids: Tensor, positions: Tensor) -> Tensor:
    """Runs a forward as if nothing had been run before; the last token's logits."""
    cache.seen = 0
    torch.compiler.cudagraph_mark_step_begin()
    return forward(ids, positions, cache, 1)


def tokens(bench: Bench, batch: int, count: int, seed: int = 1) -> Tensor:
    """Makes token ids [batch, count], the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(bench.config.vocabulary, (batch, count), generator=generator)
    return ids.to(bench.device)


def decode(bench: Bench, variant: Variant, batch: int, length: int, config: Config) -> dict[str, Any]:
    """Measures one step at the last slot of a full cache."""
    model = build(config, bench.device, bench.dtype)
    before = allocated(bench.device)
    cache = model.new_cache(batch, length)
    held = allocated(bench.device) - before if bench.device.type == "cuda" else sum_bytes(cache)
    fill(cache)
    forward = bench.compile(model, variant, replay=True)
    found = timed_step(bench, model, cache, forward, batch, length)
    item = bench.dtype.itemsize
    return found | {
        "cache_bytes": held,
        "cache_formula": cache_formula(config, batch, length, item),
        "weight_bytes": weight_bytes(model),
    }


def rest(bench: Bench, variant: Variant, batch: int, config: Config) -> dict[str, Any]:
    """Measures a step whose attention and selection are left out."""
    model = build(config, bench.device, bench.dtype)
    cache = model.new_cache(batch, config.window)
    with without_attention():
        forward = bench.compile(model, Variant(variant.attention, backend="inductor"), replay=True)
        return timed_step(bench, model, cache, forward, batch, config.window)


def timed_step(
    bench: Bench, model: Decoder, cache: Cache, forward: Callable[..., Any], batch: int, length: int
) -> dict[str, Any]:
    """Times a step at the last slot; the peak is of all that the device held meanwhile."""
    ids, position = tokens(bench, batch, 1), torch.tensor([length - 1], device=bench.device)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    begin = time.perf_counter()
    call(forward, cache, ids, position)
    synchronize(bench.device)
    compiled = time.perf_counter() - begin
    bench.turn.take()
    step = partial(call, forward, cache, ids, position)
    once = partial(measure, step, lambda: None, bench.device, steps=STEPS, repeats=bench.repeats)
    found = settled(once)
    return {
        "ms": found.timing.device,
        "wall_ms": found.timing.wall,
        "spread": found.spread,
        "peak_bytes": peak(bench.device),
        "compile_s": compiled,
        "layers": model.config.layers,
    }


def prefill(bench: Bench, variant: Variant, length: int, config: Config) -> dict[str, Any]:
    """Measures a prompt of one sequence, in one piece, up to its last token's logits."""
    model = build(config, bench.device, bench.dtype)
    cache = model.new_cache(1, length)
    forward = bench.compile(model, variant, replay=False)
    ids, positions = tokens(bench, 1, length), torch.arange(length, device=bench.device)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)

    def once() -> Timing:
        synchronize(bench.device)
        begin = time.perf_counter()
        call(forward, cache, ids, positions)
        synchronize(bench.device)
        milliseconds = 1e3 * (time.perf_counter() - begin)
        return Timing(milliseconds, milliseconds)

    first = once()  # compiles
    once()
    found = settled(once)
    return {
        "ms": found.timing.wall,
        "wall_ms": found.timing.wall,
        "spread": found.spread,
        "peak_bytes": peak(bench.device),
        "compile_s": 1e-3 * first.wall,
        "layers": config.layers,
    }


def check(bench: Bench, variant: Variant, length: int) -> dict[str, Any]:
    """Compares compiled with the example's own eager decoder: a prompt, and a step after it, in float32."""
    config = bench.sized(variant, min(variant.depths[0], bench.config.layers))
    model = build(config, bench.device, torch.float32)
    plain = Decoder(config).to(bench.device).eval()
    plain.load_state_dict(model.state_dict())
    found = {}
    for name, runs in (("eager", plain), ("compiled", model)):
        forward = runs if name == "eager" else bench.compile(model, variant, replay=False)
        found[name] = check_logits(bench, runs, forward, length)
    distances = [(a - b).abs().max().item() for a, b in zip(*found.values(), strict=True)]
    largest = max(logits.abs().max().item() for logits in found["eager"])
    return {
        "difference": max(distances),
        "budget": CHECK_BUDGET * largest,
        "layers": config.layers,
        "passed": max(distances) <= CHECK_BUDGET * largest,
    }


def check_logits(bench: Bench, model: Decoder, forward: Callable[..., Any], length: int) -> list[Tensor]:
    """Gives the last logits of a prompt, and of a step into the last slot, as decode() measures it."""
    ids, positions = tokens(bench, 2, length), torch.arange(length, device=bench.device)
    cache = model.new_cache(2, length)
    parts = (slice(0, length - 1), slice(length - 1, length))
    return [call(forward, cache, ids[:, part], positions[part]).float().clone() for part in parts]


def allocated(device: torch.device) -> int:
    """Gives the bytes that tensors hold on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def sum_bytes(cache: Cache) -> int:
    """Counts a cache's bytes where the device does not say."""
    return sum(store.data.nbytes for store in cache.stores)


def peak(device: torch.device) -> int | None:
    """Gives the most bytes that tensors held on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Measures one cell; what does not fit says so."""
    variant = VARIANTS[cell.variant]
    jobs: dict[str, Callable[..., dict[str, Any]]] = {
        "decode": partial(decode, bench, variant, cell.batch, cell.length),
        "rest": partial(rest, bench, variant, cell.batch),
        "prefill": partial(prefill, bench, variant, cell.length),
    }
    bench.turn.take()
    try:
        if cell.kind == "check":
            return check(bench, variant, cell.length)
        return by_layers(bench, variant, cell.batch, cell.length, jobs[cell.kind])
    except torch.OutOfMemoryError as error:
        return {"error": "out of memory: " + str(error).partition(". GPU")[0]}
    finally:
        gc.collect()
        forget_compiled(bench.device)
        bench.turn.give()


def cells(names: list[str], lengths: list[int], batches: list[int], topk: int) -> Iterator[Cell]:
    """Yields all cells, those first that the paper's own figures are compared with."""
    for name in names:
        if VARIANTS[name].exact:
            yield Cell("check", name, 2 * topk, 2)
    middle_first = sorted(batches, key=lambda b: (b != 8, -b))
    for length in sorted(lengths, reverse=True):
        yield from (Cell("prefill", name, length) for name in names)
        for batch in middle_first:
            yield from (Cell("decode", name, length, batch) for name in names)
            if length == max(lengths):
                yield from (Cell("rest", name, 0, batch) for name in names)


# -- results -------------------------------------------------------------------------------------


def environment(bench: Bench) -> dict[str, Any]:
    """Says what cells that stand in one file have in common."""
    on_gpu = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device) if on_gpu else "CPU (no GPU numbers)",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "config": {**vars(bench.config), "attention": None},
    }


def load(path: Path, bench: Bench) -> Results:
    """Reads what an earlier call measured; SystemExit where that was something else."""
    now = environment(bench)
    if not path.exists():
        return Results(now, [], {})
    stored = json.loads(path.read_text())
    for name, value in now.items():
        if stored["environment"][name] != value:
            raise SystemExit(
                f"{path} holds cells of another {name} ({stored['environment'][name]}, now {value}): "
                "times of both do not compare. Give another --out, or remove the file."
            )
    return Results(**stored)


def save(path: Path, results: Results) -> None:
    """Writes the JSON file, whole or not at all."""
    write_text(path, json.dumps(vars(results), indent=1) + "\n")


def run(arguments: argparse.Namespace, bench: Bench, results: Results, path: Path) -> bool:
    """Measures what is missing; returns False when time ran out."""
    begin = time.monotonic()
    sizes = arguments.variants, arguments.lengths, arguments.batches
    asked = [c for c in cells(*sizes, bench.config.topk) if wanted(c, arguments)]
    missing = [c for c in asked if arguments.again or c.key not in results.cells]
    if missing:
        results.bandwidth.append(read_bandwidth(bench.device))
        console.print(f"{len(missing)} cells; the device reads {results.bandwidth[-1] / 1e12:.2f} TB/s")
    longest, left = 0.0, len(missing)

    def more() -> bool:
        spent = time.monotonic() - begin
        return arguments.minutes is None or spent + longest <= 60 * arguments.minutes

    for cell, found, seconds in measured(missing, bench, arguments.jobs, more):
        results.cells[cell.key] = found
        save(path, results)
        longest, left = max(longest, seconds), left - 1
        console.print(f"{len(missing) - left}/{len(missing)} {cell.key}: {in_words(found)}", markup=False)
    if left:
        console.print(f"time is up: {left} cells are left; the same call goes on")
    return not left


def measured(
    missing: list[Cell], bench: Bench, jobs: int, more: Callable[[], bool]
) -> Iterator[tuple[Cell, dict[str, Any], float]]:
    """Yields cells with what was found and the seconds it took, from one process or several."""
    alone = [] if jobs > 1 else missing
    if jobs > 1:
        with one_turn() as turn:
            work = {cell: memory(bench, cell) for cell in missing}
            room = bench.room - jobs * GIB  # what a process takes that has done its work
            measure_cell = partial(timed_cell, replace(bench, turn=turn))
            for cell, (found, seconds) in beside(work, measure_cell, processes=jobs, room=room, more=more):
                if out_of_memory(found):
                    alone.append(cell)  # perhaps it was the others'
                else:
                    yield cell, found, seconds
    for cell in alone:
        if more():
            yield cell, *timed_cell(bench, cell)


def memory(bench: Bench, cell: Cell) -> int:
    """Estimates the bytes that a cell needs: weights, cache, activations, what the libraries reserve."""
    variant = VARIANTS[cell.variant]
    config = bench.sized(variant)
    if not bench.fits(config, cell.batch, cell.length):
        config = bench.sized(variant, variant.depths[1])
    tokens = cell.length * cell.batch if cell.kind in ("check", "prefill") else cell.batch
    activations = 32 * config.hidden * tokens * bench.dtype.itemsize
    return bench.need(config, cell.batch, max(cell.length, config.window)) + activations + 3 * GIB


def out_of_memory(found: dict[str, Any]) -> bool:
    """Tells whether a cell failed for lack of memory while it ran."""
    return found.get("error", "").startswith("out of memory")


def timed_cell(bench: Bench, cell: Cell) -> tuple[dict[str, Any], float]:
    """Measures a cell, and how long that took."""
    begin = time.monotonic()
    return run_cell(bench, cell), time.monotonic() - begin


def wanted(cell: Cell, arguments: argparse.Namespace) -> bool:
    """Tells whether --only asks for a cell."""
    return not arguments.only or any(cell.key.startswith(prefix) for prefix in arguments.only)


def in_words(found: dict[str, Any]) -> str:
    """Describes a cell in a line."""
    if "error" in found:
        return found["error"]
    if "difference" in found:
        verdict = "equal" if found["passed"] else "DIFFERS"
        return f"{verdict}: {found['difference']:.2g} of {found['budget']:.2g}"
    source = found["computed_from"]
    how = "{} layers".format(found["layers"]) if source is None else "from {} and {} layers".format(*source)
    return f"{found['ms']:.3f} ms ({how}; compiled in {found['compile_s']:.0f} s)"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="path without an ending: .json, .md, .png")
    parser.add_argument(
        "--only", nargs="+", default=[], help="cells whose names begin so, as decode/131072/8"
    )
    parser.add_argument("--minutes", type=float, help="begin no cell that would likely end later")
    parser.add_argument("--quick", action="store_true", help="compute all from two numbers of layers")
    parser.add_argument("--again", action="store_true", help="also measure what is there, as after a change")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--lengths", type=int, nargs="+", help="8192, 32768, 131072")
    parser.add_argument("--batches", type=int, nargs="+", help="1, 4, 8, 16, 32")
    parser.add_argument("--layers", type=int, help="other than the preset's")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=1, help="processes; all compile, one measures")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args(arguments)
    lengths, batches = TINY_SIZES if chosen.tiny else SIZES
    chosen.lengths, chosen.batches = chosen.lengths or lengths, chosen.batches or batches
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; see the module for the exit code."""
    chosen = parse_arguments(arguments)
    device = torch.device(chosen.device)
    if device.type != "cuda" and not chosen.report:
        console.print("No CUDA device: these are no GPU numbers, and CUDA graphs are off.")
    config = PRESETS["small" if chosen.tiny else "4b"]
    config = replace(config, layers=chosen.layers or config.layers)
    path = chosen.out.with_name(chosen.out.name + ".json")
    bench = Bench(config, device, chosen.repeats, chosen.quick)
    if chosen.report:
        results, finished = Results(**json.loads(path.read_text())), True
    else:
        results = load(path, bench)
        finished = run(chosen, bench, results, path)
    planned = cells(list(VARIANTS), *(TINY_SIZES if chosen.tiny else SIZES), config.topk)
    console.print(write_report(results, [cell.key for cell in planned], chosen.out))
    if any(not found.get("passed", True) for found in results.cells.values()):
        return 1
    return 0 if finished else 2


if __name__ == "__main__":
    sys.exit(main())
