"""Measures what looking costs: `clsa inspect` of published configurations, and dumps and traces that are off.

    python benchmarks/inspecting.py                          # all of it, on an idle machine, some 6 minutes
    python benchmarks/inspecting.py --only llama_70b --pairs 0
    python benchmarks/inspecting.py --only --pairs 40        # what is off alone

Each configuration of tests/configs is inspected by a process of its own, both graphs, on the meta device: the
clock, and the most memory that it and its children held at a time (Linux). The limits are 60 s and 8 GiB.

What is off: a Llama of a few layers is compiled again and again in one process, with Inductor's caches warm
so that our part weighs more, by turns *bare* (nothing is told of a graph, the hooks are gone) and *off* (as
it is delivered), each first as often as second; at the end, for comparison, *on*, with a dump. Seconds are
those of the first call less those of a later one; steps are those of the compiled model. What is off must
cost less than bare runs differ among each other, in the median.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from results import write_text
from rich.console import Console
from rich.table import Table
from shapes import Case, build_model, filled_cache, llama_config, rewind

CONFIGS = Path(__file__).resolve().parents[1] / "tests" / "configs"
GIB = 2**30
MOST_SECONDS, MOST_BYTES = 60.0, 8 * GIB
LOOK_EVERY = 0.1  # seconds between two looks at a process's memory
STEPS, FILLED = 50, 100
WITH_DUMP = 3  # compiles that only say what a dump costs
SIDES = ("bare", "off", "on")
# All that is told of a graph goes through these.
WATCH = "clsa_compile.watch.Watch"
HOOKS = ("stage", "decision", "choices", "stopped", "transformed", "left", "done")

console = Console(width=None if sys.stdout.isatty() else 150)


@dataclass(frozen=True)
class Inspection:
    """One configuration: seconds by the clock, and the most bytes at a time of all its processes."""

    name: str
    parameters: int
    layers: int
    seconds: float
    bytes: int

    @property
    def holds(self) -> bool:
        """Tells whether both limits are kept."""
        return self.seconds < MOST_SECONDS and self.bytes < MOST_BYTES


def inspect(name: str) -> Inspection:
    """Runs `clsa inspect` on a published configuration."""
    command = [sys.executable, "-m", "clsa_compile", "inspect", "--config", str(CONFIGS / name), "--json"]
    with tempfile.TemporaryFile("w+") as out:
        begin, most = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=out)
        while process.poll() is None:
            most = max(most, resident(process.pid))
            time.sleep(LOOK_EVERY)
        seconds = time.perf_counter() - begin
        if process.returncode:
            raise SystemExit(f"clsa inspect of {name} ended with {process.returncode}")
        out.seek(0)
        report = json.load(out)
    return Inspection(name, report["parameters"], report["decode"]["counts"]["sites"], seconds, most)


def resident(pid: int) -> int:
    """Returns the bytes in memory of a process and all below it; pages that they share count once each."""
    folder = Path("/proc") / str(pid)
    try:
        pages = int((folder / "statm").read_text().split()[1])
        tasks = [task / "children" for task in (folder / "task").iterdir()]
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except (OSError, IndexError):  # it is gone by now
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(resident, children))


def nothing(*_: Any) -> None:
    """Stands for a hook: is told of a graph and does nothing."""


@dataclass(frozen=True)
class Compile:
    """One compile of the small model: seconds of it, and the median milliseconds of a step afterwards."""

    seconds: float
    step_ms: float


class Small:
    """A Llama of some narrow layers, and a filled cache."""

    def __init__(self, layers: int) -> None:
        device = torch.device("cpu")
        length = FILLED + 2 * STEPS
        config = llama_config(layers, cache=length, tiny=True)
        case = Case("off", config, 1, cache=length, filled=FILLED)
        self._model = build_model(case.config, device, torch.float32)
        self._cache = filled_cache(self._model, case)
        self._ids = torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def compile(self, side: str, folder: str = "") -> Compile:
        """Compiles and runs the model, bare, as it is delivered, or with a dump."""
        torch.compiler.reset()
        gc.collect()
        rewind(self._cache, FILLED)
        hooks: AbstractContextManager[Any] = nullcontext()
        if side == "bare":
            hooks = patch.multiple(WATCH, **dict.fromkeys(HOOKS, nothing))
        options = {"dump": folder} if side == "on" else {}
        forward = torch.compile(self._model, backend="clsa", dynamic=False, options=options)
        seconds = []
        with hooks:
            for _ in range(STEPS + 1):
                begin = time.perf_counter()
                forward(input_ids=self._ids, past_key_values=self._cache, use_cache=True)
                seconds.append(time.perf_counter() - begin)
        step = statistics.median(seconds[1:])
        return Compile(seconds[0] - step, 1e3 * step)


def compare(layers: int, pairs: int) -> dict[str, list[Compile]]:
    """Compiles a model by turns in each way, after a round that fills the caches and is thrown away."""
    small = Small(layers)
    found: dict[str, list[Compile]] = {side: [] for side in SIDES}
    for turn in range(pairs + 1):
        # The other one begins each time: what one leaves behind slows down the next.
        for side in ("off", "bare") if turn % 2 else ("bare", "off"):
            measured = small.compile(side)
            if turn:
                found[side].append(measured)
    with tempfile.TemporaryDirectory() as folder:
        found["on"] = [small.compile("on", folder) for _ in range(WITH_DUMP)]
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the first quartile, the median and the third."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def show_inspections(found: Sequence[Inspection]) -> None:
    """Prints a row for each configuration."""
    table = Table(title=f"clsa inspect, both graphs; limits {MOST_SECONDS:.0f} s and {MOST_BYTES // GIB} GiB")
    for column in ("configuration", "parameters", "layers", "s", "GiB", "within"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for one in found:
        within = "yes" if one.holds else "NO"
        size = f"{one.bytes / GIB:.2f}"
        table.add_row(one.name, f"{one.parameters:.3g}", str(one.layers), f"{one.seconds:.1f}", size, within)
    console.print(table)


def show_sides(found: dict[str, list[Compile]]) -> bool:
    """Prints a row for each way of compiling; tells whether what is off costs nothing that can be seen."""
    table = Table(title=f"what is told of a graph, {len(found['bare'])} compiles each: median (quartiles)")
    for column in ("", "compile s", "more than bare, ms", "step ms", "more than bare, us"):
        table.add_column(column, justify="right")
    free = True
    for side in SIDES:
        row = [side]
        for name, unit in (("seconds", 1e3), ("step_ms", 1e3)):
            values = [getattr(one, name) for one in found[side]]
            bare = [getattr(one, name) for one in found["bare"]]
            more = quartiles([unit * (a - b) for a, b in zip(values, bare, strict=False)])
            # The noise of one pair of runs: how far bare runs are from the one before them.
            noise = quartiles([unit * abs(a - b) for a, b in zip(bare[1:], bare, strict=False)])[1]
            low, median, high = quartiles(values)
            row += [f"{median:.4f} ({low:.4f} to {high:.4f})"]
            row += ["" if side == "bare" else f"{more[1]:+.2f} (noise {noise:.2f})"]
            free = free and (side != "off" or more[1] <= noise)
        table.add_row(*row)
    console.print(table)
    return free


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    names = sorted(path.name for path in CONFIGS.iterdir())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="these configurations")
    parser.add_argument("--pairs", type=int, default=20, help="compiles of each kind, 3 or more, or 0")
    parser.add_argument("--layers", type=int, default=4, help="of the model that is compiled")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if 0 < arguments.pairs < 3:
        parser.error("fewer than 3 compiles say nothing of noise")
    return arguments


def main() -> int:
    """Runs what was asked for; returns 0 when every limit is kept and what is off costs nothing."""
    arguments = parse_arguments()
    warnings.simplefilter("ignore")
    load = os.getloadavg()[0]
    console.print(f"{os.cpu_count()} cores, load {load:.2f}, torch {torch.__version__}")
    inspections = [inspect(name) for name in arguments.only]
    if inspections:
        show_inspections(inspections)
    kept = all(one.holds for one in inspections)
    sides = compare(arguments.layers, arguments.pairs) if arguments.pairs else {}
    if sides:
        kept = show_sides(sides) and kept
    if arguments.out is not None:
        result = {
            "load": load,
            "torch": torch.__version__,
            "inspections": [asdict(one) for one in inspections],
            "off": {side: [asdict(one) for one in runs] for side, runs in sides.items()},
        }
        write_text(arguments.out, json.dumps(result, indent=1) + "\n")
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
