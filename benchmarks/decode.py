"""Measures decode steps and a prefill chunk against a long cache: Inductor and clsa.

Random weights, bfloat16, a static cache of 131072 tokens, one CUDA GPU:

    python benchmarks/decode.py --out decode.json
    python benchmarks/decode.py --only dsa --share 4
    python benchmarks/decode.py --compile-time                                  # also on a CPU
    python benchmarks/decode.py --tiny --layers 2 --cache 256 --device cpu      # a trial run

Times are medians. "device" is between two CUDA events with the host out of the way, "wall" is by
the clock with steps back to back. The floor is the bytes a step must read, by the bandwidth of a
plain sum on this device. The budget of a difference is twice Inductor's own distance from eager
plus one rounding of the largest logit.
"""

import argparse
import itertools
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from compile_time import measure_compile
from results import write_text
from rich.console import Console
from rich.table import Table
from shapes import (
    GIB,
    Case,
    build_model,
    cache_bytes,
    dsa_config,
    filled_cache,
    index_bytes,
    index_plan,
    llama_config,
    rewind,
    score_bytes,
    weight_bytes,
)
from timing import Timing, extra_memory, forget_compiled, measure, read_bandwidth
from torch import Tensor
from transformers import StaticCache

BASELINE = "inductor"
STEPS = 16  # back to back, for wall time
PREFILL_SCALE = 16  # Inductor is also measured on a chunk this many times shorter

console = Console(width=None if sys.stdout.isatty() else 150)  # a log wraps no table


@dataclass(frozen=True)
class Setting:
    """What is compared with the baseline: a backend, its options, and whether it is exact."""

    backend: str
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True
    groups: int | None = None
    key_heads: int | None = None

    @property
    def label(self) -> str:
        """Names the setting in a table."""
        if self.groups:
            read = f" over {self.key_heads} key heads" if self.key_heads else ""
            return f"{self.backend} {self.groups} indices{read}"
        parts = [f"{key}={value}" for key, value in self.options.items()]
        return " ".join([self.backend, *parts])


@dataclass(frozen=True)
class Difference:
    """How far two sets of logits are apart; `budget` is None where there is no yardstick."""

    maximum: float
    relative: float
    same_argmax: float
    budget: float | None

    @property
    def within_budget(self) -> bool:
        """Tells whether the difference is what rounding explains."""
        return self.budget is None or self.maximum <= self.budget


@dataclass(frozen=True)
class DecodeRow:
    """One line of the decode table; times in milliseconds."""

    model: str
    setting: str
    exact: bool
    batch: int
    cache: int
    layers: int
    baseline: Timing
    timing: Timing
    floor: float
    difference: Difference


@dataclass(frozen=True)
class PrefillRow:
    """One line of the prefill table; memory in bytes beyond weights and cache."""

    setting: str
    queries: int
    milliseconds: float | None
    extra: int | None
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """A model with its filled cache, on a device."""

    case: Case
    model: Any
    cache: StaticCache
    device: torch.device

    def rewind(self, length: int | None = None) -> None:
        """Puts the cache's length back; to where the case starts, unless told otherwise."""
        rewind(self.cache, self.case.filled if length is None else length)

    def step(self, forward: Callable[..., Any], ids: Tensor, keep: int = 1) -> Tensor:
        """Runs the model over `ids` [B, S] after the cache; the last `keep` logits."""
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            output = forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=keep)
        return output.logits

    def ids(self, queries: int) -> Tensor:
        """Makes token ids [B, queries], the same on every call."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.case.batch, queries)
        high = self.case.config.vocab_size
        return torch.randint(high, shape, generator=generator).to(self.device)

    def compile(self, setting: Setting, *, replay: bool) -> Callable[..., Any]:
        """Compiles the model; `replay` asks for CUDA graphs, which only a GPU has."""
        forget_compiled(self.device)
        mode = "reduce-overhead" if replay and self.device.type == "cuda" else None
        if setting.backend != "clsa":
            is_inductor = setting.backend == BASELINE
            return torch.compile(
                self.model,
                backend=setting.backend,
                mode=mode if is_inductor else None,
                dynamic=False,
            )
        options = setting.options | ({"mode": mode} if mode else {})
        return torch.compile(self.model, backend="clsa", options=options or None, dynamic=False)


def make_bench(case: Case, device: torch.device) -> Bench:
    """Builds a case's model and fills its cache."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(case.config, device, dtype)
    return Bench(case, model, filled_cache(model, case), device)


def compare(actual: Tensor, baseline: Tensor, eager: Tensor | None, eps: float) -> Difference:
    """Compares logits [B, S, V] with the baseline's; see the module for the budget."""
    distance = (actual - baseline).abs().max().item()
    budget = None
    if eager is not None:
        rounding = eps * baseline.abs().max().item()
        budget = 2 * (baseline - eager).abs().max().item() + rounding
    same = (actual.argmax(-1) == baseline.argmax(-1)).float().mean().item()
    relative = ((actual - baseline).norm() / baseline.norm()).item()
    return Difference(distance, relative, same, budget)


def logits_of(bench: Bench, forward: Callable[..., Any], ids: Tensor, keep: int = 1) -> Tensor:
    """Gives one step's logits in float32, apart from the memory that CUDA graphs reuse."""
    bench.rewind()
    return bench.step(forward, ids, keep).float().clone()


def eager_logits(bench: Bench, ids: Tensor) -> Tensor | None:
    """Gives the eager model's logits, or None where its copies of the cache do not fit."""
    try:
        return logits_of(bench, bench.model, ids)
    except torch.OutOfMemoryError:
        return None


def decode_rows(bench: Bench, settings: list[Setting], bandwidth: float, repeats: int) -> list[DecodeRow]:
    """Measures the baseline and every setting on one decode step."""
    ids, case = bench.ids(1), bench.case
    eager = eager_logits(bench, ids)

    def timed(setting: Setting) -> tuple[Tensor, Timing]:
        console.print(f"{case.name}: {setting.label} ...")
        forward = bench.compile(setting, replay=True)
        logits = logits_of(bench, forward, ids)
        timing = measure(
            lambda: bench.step(forward, ids),
            bench.rewind,
            bench.device,
            steps=STEPS,
            repeats=repeats,
        )
        return logits, timing

    baseline_logits, baseline = timed(Setting(BASELINE))
    rows = []
    for setting in settings:
        logits, timing = timed(setting)
        rows.append(
            DecodeRow(
                model=case.name,
                setting=setting.label,
                exact=setting.exact,
                batch=case.batch,
                cache=case.cache,
                layers=case.config.num_hidden_layers,
                baseline=baseline,
                timing=timing,
                floor=1e3 * floor_bytes(bench, setting) / bandwidth,
                difference=compare(logits, baseline_logits, eager, torch.finfo(bench.model.dtype).eps),
            )
        )
    return rows


def floor_bytes(bench: Bench, setting: Setting) -> int:
    """Counts the bytes a step must read: weights, attended tokens, and one index a group."""
    if setting.groups:
        topk = setting.options["share"].topk
        return weight_bytes(bench.model) + index_bytes(
            bench.case, bench.cache, setting.groups, topk, setting.key_heads
        )
    share, topk = setting.options.get("share", 1), setting.options.get("topk")
    return weight_bytes(bench.model) + cache_bytes(bench.case, bench.cache, share, topk)


def prefill_row(bench: Bench, setting: Setting, queries: int) -> tuple[PrefillRow, Tensor | None]:
    """Measures one chunk of `queries` tokens at the end of the cache, after a first call."""
    ids = bench.ids(queries)
    start = bench.case.filled - queries
    forward = bench.compile(setting, replay=False)
    console.print(f"prefill of {queries}: {setting.label} ...")

    def chunk() -> Tensor:
        return bench.step(forward, ids, keep=min(queries, 8))

    try:
        bench.rewind(start)
        logits = chunk().float()
        bench.rewind(start)
        extra = extra_memory(chunk, bench.device)
        timing = measure(chunk, lambda: bench.rewind(start), bench.device, repeats=5)
    except torch.OutOfMemoryError:
        total = torch.cuda.get_device_properties(bench.device).total_memory
        scores = score_bytes(bench.case, queries) / GIB
        note = (
            f"out of memory on {total / GIB:.0f} GiB; "
            f"one [B, S, H, T] float32 score tensor is {scores:.1f} GiB"
        )
        console.print(f"  {note}")
        return PrefillRow(setting.label, queries, None, None, note), None
    console.print(f"  {timing.device:.1f} ms, {extra / GIB:.2f} GiB of extra memory at the peak")
    return PrefillRow(setting.label, queries, timing.device, extra), logits


def prefill_rows(
    bench: Bench, settings: list[Setting], queries: int
) -> tuple[list[PrefillRow], Difference | None]:
    """Measures settings on the whole chunk, and all on a shorter one that Inductor can hold."""
    short = max(queries // PREFILL_SCALE, 1)
    base_row, base_logits = prefill_row(bench, Setting(BASELINE), short)
    rows, difference = [base_row], None
    if base_row.extra is not None:
        note = f"{queries} / {short} times the line above, not measured"
        rows.append(PrefillRow(BASELINE, queries, None, base_row.extra * queries // short, note))
    for setting in settings:
        row, logits = prefill_row(bench, setting, short)
        rows.append(row)
        if setting.exact and logits is not None and base_logits is not None:
            difference = compare(logits, base_logits, None, 0.0)
        rows.append(prefill_row(bench, setting, queries)[0])
    # Last: this one is expected to fail on a GPU of 80 GB.
    rows.append(prefill_row(bench, Setting(BASELINE), queries)[0])
    return rows, difference


def show_decode(rows: list[DecodeRow], device: torch.device) -> None:
    """Prints the decode table."""
    table = Table(title=f"one decode step, {device_name(device)}; ms, median")
    for column in ("model", "compared"):
        table.add_column(column)
    for column in ("inductor", "clsa", "ratio", "floor", "wall", "max diff / budget", "rel. error"):
        table.add_column(column, justify="right")
    table.add_column("same argmax", justify="right")
    for row in rows:
        difference = row.difference
        budget = "-" if difference.budget is None else f"{difference.budget:.2g}"
        table.add_row(
            f"{row.model} B={row.batch} T={row.cache} L={row.layers}",
            row.setting + ("" if row.exact else " (changes results)"),
            f"{row.baseline.device:.3f}",
            f"{row.timing.device:.3f}",
            f"{row.baseline.device / row.timing.device:.2f}x",
            f"{row.floor:.3f}",
            f"{row.baseline.wall:.3f} / {row.timing.wall:.3f}",
            f"{difference.maximum:.2g} / {budget}",
            f"{difference.relative:.1e}",
            f"{difference.same_argmax:.0%}",
        )
    console.print(table)


def show_prefill(rows: list[PrefillRow], difference: Difference | None, bench: Bench) -> None:
    """Prints the prefill table."""
    case = bench.case
    layers = case.config.num_hidden_layers
    title = f"prefill chunk, {case.name} B={case.batch} T={case.cache} L={layers}"
    table = Table(title=f"{title}, {device_name(bench.device)}")
    table.add_column("compared")
    for column in ("queries", "ms", "extra GiB at the peak"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for row in rows:
        table.add_row(
            row.setting,
            str(row.queries),
            "-" if row.milliseconds is None else f"{row.milliseconds:.1f}",
            "-" if row.extra is None else f"{row.extra / GIB:.2f}",
            row.note,
        )
    console.print(table)
    if difference is not None:
        console.print(f"relative error of the short chunk's logits: {difference.relative:.1e}")


def show_compile_times(backend: str, layers: int, device: torch.device) -> dict[str, Any]:
    """Measures and prints compile seconds, cold and warm, and what `backend` adds."""
    times = [measure_compile(name, layers, device) for name in (BASELINE, backend)]
    title = f"compile a decode step, Llama of {layers} narrow layers, {device_name(device)}"
    table = Table(title=f"{title}; seconds")
    table.add_column("backend")
    for column in ("cold", "overhead", "warm", "overhead "):
        table.add_column(column, justify="right")
    base = times[0]
    for item in times:
        cold, warm = (
            "-" if item is base else f"{100 * (mine / its - 1):+.0f}%"
            for mine, its in ((item.cold, base.cold), (item.warm, base.warm))
        )
        table.add_row(item.backend, f"{item.cold:.1f}", cold, f"{item.warm:.1f}", warm)
    console.print(table)
    return {"layers": layers, "seconds": [asdict(item) for item in times]}


def device_name(device: torch.device) -> str:
    """Names the device in a title."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (no GPU numbers)"


def make_cases(arguments: argparse.Namespace) -> dict[str, Case]:
    """Builds the cases, with the sizes that the command line overrides."""
    cache = arguments.cache
    filled = cache - max(STEPS + 1, 72 * cache // 131072)
    llama = llama_config(arguments.layers or 28, cache, arguments.tiny)
    dsa = dsa_config(arguments.layers or 4, cache, arguments.tiny)
    return {
        "llama": Case("llama 3B", llama, arguments.batch, cache, filled),
        "dsa": Case("glm_moe_dsa", dsa, arguments.batch, cache, filled),
        "prefill": Case("glm_moe_dsa", dsa, arguments.batch, cache, filled),
    }


def make_settings(arguments: argparse.Namespace, case: Case) -> list[Setting]:
    """Lists what to compare: exact always, and what --share and --topk ask for."""
    settings = [Setting(arguments.backend)]
    changed = {"share": arguments.share} if arguments.share else {}
    if arguments.topk and not case.has_indexer:
        changed["topk"] = arguments.topk
    elif not case.has_indexer:
        changed = {}  # a dense model shares nothing without topk
    if changed:
        settings.append(Setting(arguments.backend, changed, exact=False))
    if arguments.groups and not case.has_indexer:
        for groups, heads in itertools.product(arguments.groups, arguments.key_heads or [None]):
            plan = index_plan(case.config, groups, arguments.topk or 2048, heads)
            settings.append(Setting(arguments.backend, {"share": plan}, False, groups, heads))
    return settings


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("llama", "dsa", "prefill"))
    parser.add_argument("--layers", type=int, help="layers; 28 of llama and 4 of dsa by default")
    parser.add_argument("--cache", type=int, default=131072, help="tokens the cache holds")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--queries", type=int, default=4096, help="tokens of the prefill chunk")
    parser.add_argument("--share", type=int, help="also measure one index for every n layers")
    parser.add_argument("--topk", type=int, help="also measure llama made sparse")
    parser.add_argument("--groups", type=int, nargs="+", help="also llama with so many random indices")
    parser.add_argument(
        "--key-heads", type=int, nargs="+", help="key heads that such an index reads (default: all)"
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--bandwidth", type=float, help="TB/s for the floor; measured by default")
    parser.add_argument("--tiny", action="store_true", help="small widths, to try the script out")
    parser.add_argument("--compile-time", action="store_true", help="measure compiling instead")
    parser.add_argument("--backend", default="clsa", help="what is compared with Inductor")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


def run_cases(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Runs the chosen cases one after the other; returns what they measured."""
    bandwidth = 1e12 * arguments.bandwidth if arguments.bandwidth else read_bandwidth(device)
    results: dict[str, Any] = {"bandwidth": bandwidth, "decode": [], "prefill": []}
    for name, case in make_cases(arguments).items():
        if arguments.only not in (None, name):
            continue
        bench = make_bench(case, device)
        settings = make_settings(arguments, case)
        if name == "prefill":
            queries = min(arguments.queries, case.filled)
            rows, difference = prefill_rows(bench, settings, queries)
            show_prefill(rows, difference, bench)
            results["prefill"] += rows
        else:
            decoded = decode_rows(bench, settings, bandwidth, arguments.repeats)
            show_decode(decoded, device)
            results["decode"] += decoded
        del bench
        forget_compiled(device)
    return results


def write_json(path: Path, results: dict[str, Any], device: torch.device) -> None:
    """Writes results with what they were measured on."""
    results["environment"] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_text(path, json.dumps(results, indent=2, default=asdict) + "\n")


def main() -> int:
    """Runs the benchmark; returns 1 when an exact setting is off by more than its budget."""
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    if device.type != "cuda":
        console.print("No CUDA device: these are no GPU numbers, and CUDA graphs are off.")
    if arguments.compile_time:
        results = {"compile": show_compile_times(arguments.backend, arguments.layers or 32, device)}
    else:
        results = run_cases(arguments, device)
    if arguments.out:
        write_json(arguments.out, results, device)
    rows: list[DecodeRow] = results.get("decode", [])
    # A selection may differ where scores tie to rounding, so only dense models are judged.
    dense = [row for row in rows if row.exact and "dsa" not in row.model]
    return int(not all(row.difference.within_budget for row in dense))


if __name__ == "__main__":
    sys.exit(main())
