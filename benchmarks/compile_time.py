"""Measures how long compiling takes: a deep, narrow Llama, cold and from Inductor's caches.

Each measurement is a process of its own with cache folders of its own. A trivial function is
compiled first, so that importing the compiler is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from shapes import Case, build_model, filled_cache, llama_config
from timing import synchronize

CHILD = Path(__file__).resolve()


@dataclass(frozen=True)
class CompileTime:
    """Seconds until the first result: with empty caches, and in a second process."""

    backend: str
    cold: float
    warm: float


def first_call(backend: str, layers: int, device: torch.device) -> float:
    """Compiles one decode step and gives the seconds of its first call, less those of a later."""
    case = Case("compile", llama_config(layers, cache=128, tiny=True), 1, cache=128, filled=100)
    model = build_model(case.config, device, torch.float32)
    cache = filled_cache(model, case)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    torch.compile(torch.sin, backend=backend)(torch.ones(2, device=device))
    forward = torch.compile(model, backend=backend, dynamic=False)
    seconds = []
    with torch.no_grad():
        for _ in range(3):
            begin = time.perf_counter()
            forward(input_ids=ids, past_key_values=cache, use_cache=True)
            synchronize(device)
            seconds.append(time.perf_counter() - begin)
    return seconds[0] - seconds[-1]


def in_fresh_process(backend: str, layers: int, device: torch.device, folder: str) -> float:
    """Runs `first_call` in a new process whose compiler caches are in `folder`."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": folder,
        "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
    }
    command = [sys.executable, str(CHILD), backend, str(layers), str(device)]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1])["seconds"])


def measure_compile(backend: str, layers: int, device: torch.device) -> CompileTime:
    """Measures one backend cold and warm."""
    with tempfile.TemporaryDirectory() as folder:
        cold = in_fresh_process(backend, layers, device, folder)
        warm = in_fresh_process(backend, layers, device, folder)
    return CompileTime(backend, cold, warm)


def main() -> None:
    """Is the fresh process: prints the seconds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend")
    parser.add_argument("layers", type=int)
    parser.add_argument("device", type=torch.device)
    arguments = parser.parse_args()
    seconds = first_call(arguments.backend, arguments.layers, arguments.device)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
