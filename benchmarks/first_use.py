"""Measures how long a model's kernels take to be there: generated, compiled and loaded.

    python benchmarks/first_use.py

A fresh process calls the ops of a model once, on a short cache, and once more; the difference of the two
is what is reported. The first process starts with empty folders for our sources and Triton's binaries,
the later ones find both. Importing torch and Triton, and starting the CUDA device, is done before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clsa_compile.ir.scores import LIGHTNING

CHILD = Path(__file__).resolve()
T, TOPK = 16384, 2048
WARM_RUNS = 3

console = Console()


def normal(*sizes: int) -> Tensor:
    """Returns bfloat16 numbers of the normal distribution."""
    return torch.randn(sizes, device="cuda", dtype=torch.bfloat16)


def dense_step() -> None:
    """One layer of a Llama: dense decode over a static cache."""
    q, k, v = normal(1, 24, 1, 128), normal(1, 8, T, 128), normal(1, 8, T, 128)
    mask = torch.ones(1, 1, 1, T, dtype=torch.bool, device="cuda")
    torch.ops.clsa.attention(q, k, v, mask, None, [], None, 128**-0.5, 0.0, "")


def sparse_steps() -> None:
    """One layer of a model with an indexer: a prompt of 256 tokens, then one token."""
    k, v, keys = normal(1, 16, T, 192), normal(1, 16, T, 128), normal(1, 1, T, 128)
    for queries in (256, 1):
        q, iq = normal(1, 16, queries, 192), normal(1, 32, queries, 128)
        weight = torch.randn(1, 32, queries, device="cuda")
        last = torch.arange(T - queries, T, device="cuda", dtype=torch.int32) + 1
        bounds = torch.stack([torch.zeros_like(last), last], -1).unsqueeze(0)
        indices = torch.ops.clsa.index_topk(
            iq, keys, weight, None, None, bounds, [], TOPK, 128**-0.5, LIGHTNING.text, "", False
        )
        torch.ops.clsa.sparse_attention(q, k, v, indices, None, bounds, [], None, 192**-0.5, 0.0, "")


MODELS: dict[str, Callable[[], None]] = {"llama": dense_step, "glm_moe_dsa": sparse_steps}


@triton.jit
def _nothing(x_ptr, n: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    tl.store(x_ptr + tl.arange(0, n), tl.zeros([n], tl.float32))


def first_use(model: str) -> float:
    """Returns the seconds of a model's first calls, less those of the same calls again."""
    _nothing[(1,)](torch.empty(16, device="cuda"), 16)  # Triton's own start
    seconds = []
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        MODELS[model]()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds[0] - seconds[1]


def in_fresh_process(model: str, folder: str) -> float:
    """Runs `first_use` in a new process whose caches are in `folder`."""
    environment = {**os.environ, "TRITON_CACHE_DIR": f"{folder}/triton", "XDG_CACHE_HOME": f"{folder}/cache"}
    command = [sys.executable, str(CHILD), "--child", model]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    """Prints the table, or is a child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("kernels are compiled for a CUDA GPU, and there is none")
    if arguments.child:
        print(json.dumps(first_use(arguments.child)))
        return
    table = Table(title=f"seconds until kernels are there, {torch.cuda.get_device_name()}")
    table.add_column("model")
    for column in ("empty caches", f"warm, median of {WARM_RUNS}"):
        table.add_column(column, justify="right")
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            cold = in_fresh_process(model, folder)
            console.print(f"{model}: {cold:.2f} s with empty caches")
            warm = statistics.median(in_fresh_process(model, folder) for _ in range(WARM_RUNS))
        table.add_row(model, f"{cold:.2f}", f"{warm:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
