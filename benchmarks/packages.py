"""Measures packages: their size, how long they take to build and to start, and a step of them.

    python benchmarks/packages.py --out packages.json                 # one GPU, some minutes
    python benchmarks/packages.py --only smollm2 --parts build load   # a part of it
    python benchmarks/packages.py --tiny --device cpu                 # tries it out, one minute

Weights are random, and lie in files. Each number is from a process of its own, counted from before it is
started: `load` reads a package, with caches of compilers that are empty and stay so, and with Triton out of
reach; `cold` compiles through `torch.compile(backend="clsa")` with empty caches, `warm` the same with the
caches that `cold` left. `eager` and `inductor` are there to compare with. The first token is that of a
prompt, the second that of the first single step, which is another graph.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import write_text

CHILD = Path(__file__).resolve()
PROMPT, STEPS, REPEATS = 128, 20, 5
LLAMA = {"rms_norm_eps": 1e-5, "attention_bias": False}
MODELS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
        "cache": 8192, "weights": "inside",
    },
    "3b": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": True,
        "cache": 131072, "weights": "outside",
    },
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "cache": 256}
PARTS = ("build", "load", "eager", "cold", "warm", "graphs", "inductor")
# Where compilers keep what they made; a process that finds all of them empty must compile.
CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "xdg"}


def settings(name: str, tiny: bool) -> dict[str, Any]:
    """Returns what a model is made of, and the length of its cache."""
    return {**LLAMA, **MODELS[name], **(TINY if tiny else {})}


def first_ids(made: dict[str, Any], device: str) -> torch.Tensor:
    """Returns the prompt that every process gets."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, made["vocab_size"], (1, PROMPT), generator=generator).to(device)


def since() -> float:
    """Returns the seconds since the parent started this process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time() - float(os.environ["STARTED"])


def step_times(step: Callable[[], Any], back: Callable[[], Any]) -> dict[str, float]:
    """Returns the median milliseconds of a step by the clock, several of them back to back."""
    times = []
    for repeat in range(REPEATS + 1):
        back()
        begin = since()
        for _ in range(STEPS):
            step()
        if repeat:
            times.append(1e3 * (since() - begin) / STEPS)
    return {"ms": statistics.median(times), "least": min(times), "most": max(times)}


# --- in a process of its own ---


def build(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Makes the model, writes its weights and its package, and keeps eager's logits, also in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    import clsa_compile

    made = settings(name, options.tiny)
    length, weights = made.pop("cache"), made.pop("weights")
    config = LlamaConfig(**made, max_position_embeddings=length)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(options.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "model")
    ids = first_ids(made, options.device)

    @torch.no_grad()
    def logits() -> torch.Tensor:
        cache = StaticCache(config=config, max_cache_len=min(length, 1024))
        return model(ids, past_key_values=cache).logits[:, -1].float().cpu()

    eager = logits()
    if options.sizes == "fixed":
        shapes: Any = {"batch": 1, "cache": length, "prompt": (2, min(length, 4096))}
    else:
        shapes = {"batch": (1, 64), "cache": (256, length), "prompt": (2, min(length, 4096))}
    package = clsa_compile.export(
        model, (ids,), path=folder / "model.pt2", dynamic_shapes=shapes, weights=weights
    )
    (folder / "digest").write_text(package.digest)
    print(package.report, flush=True)
    model.float()
    torch.save((eager, logits()), folder / "logits.pt")
    size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    return {
        "bytes": package.size,
        "weights_bytes": size,
        "weights": weights,
        "seconds": dict(package.seconds),
    }


def hide(*packages: str) -> None:
    """Makes packages look as if they were not installed."""

    class Others:
        def __init__(self, finder: Any) -> None:
            self._finder = finder

        def find_spec(self, name: str, *more: Any) -> Any:
            return None if name.split(".")[0] in packages else self._finder.find_spec(name, *more)

    sys.meta_path[:] = [Others(finder) for finder in sys.meta_path]


def load(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Starts from the package: first token, second token, a step, and what was compiled: nothing."""

    hide("triton", "transformers")
    imported = since()
    import clsa_compile

    made = settings(name, options.tiny)
    outside = {} if made["weights"] == "inside" else {"weights": folder / "model"}
    package = clsa_compile.load(folder / "model.pt2", digest=(folder / "digest").read_text(), **outside)
    loaded = since()
    caches = package.caches(1, made["cache"])
    logits = package.step(first_ids(made, options.device), caches)
    token = logits.argmax(-1, keepdim=True)
    first = since()
    package.step(token, caches)
    second = since()
    eager, expected = torch.load(folder / "logits.pt")
    near_end = made["cache"] - 2 * STEPS

    def back() -> None:
        caches.used = near_end
        caches.length.fill_(near_end)

    found = {
        "imported": imported,
        "loaded": loaded,
        "first_token": first,
        "second_token": second,
        "step": step_times(lambda: package.step(token, caches), back),
        "difference": float((logits.float().cpu() - expected).abs().max()),
        "difference_of_eager": float((eager - expected).abs().max()),
        "largest": float(expected.abs().max()),
    }
    if options.device == "cuda":
        back()
        replay = package.graphed(caches)
        found["graph_step"] = step_times(lambda: replay(token), back)
        found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    modules = ("torch._inductor", "torch._dynamo", "triton", "transformers")
    found["imported_modules"] = [module for module in modules if module in sys.modules]
    roots = [Path(os.environ[variable]) for variable in CACHES]
    made_files = [file for root in roots if root.exists() for file in root.rglob("*") if file.is_file()]
    found["files_of_compilers"] = [file.name for file in made_files]
    return found


def compiled(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Starts from the model: first token, second token and a step of what `torch.compile` makes of it."""
    from transformers import LlamaForCausalLM, StaticCache

    made = settings(name, options.tiny)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=dtype).to(options.device).eval()
    forward: Any = model
    backend, mode = options.backend, options.mode
    if backend == "clsa":
        forward = torch.compile(model, backend="clsa", options={"mode": mode}, dynamic=False)
    elif backend == "inductor":
        forward = torch.compile(model, mode=mode, dynamic=False)
    loaded = since()
    ids = first_ids(made, options.device)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=made["cache"])
        model(ids[:, :1], past_key_values=cache)  # as `generate` does: caches have their tensors before
        cache.reset()
        logits = forward(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        token = logits.argmax(-1, keepdim=True).clone()
        first = since()
        forward(token, past_key_values=cache, logits_to_keep=1)
        second = since()
        near_end = made["cache"] - 2 * STEPS

        def back() -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(near_end)

        step = step_times(lambda: forward(token, past_key_values=cache, logits_to_keep=1), back)
    return {"loaded": loaded, "first_token": first, "second_token": second, "step": step}


# --- the parent ---


def run_child(job: str, name: str, folder: Path, caches: Path, options: Any, **more: str) -> dict[str, Any]:
    """Runs a job in a process of its own; returns what it found, or the error."""
    environment = {**os.environ, **{key: str(caches / sub) for key, sub in CACHES.items()}}
    command = [sys.executable, str(CHILD), "--child", job, "--only", name, "--folder", str(folder)]
    command += ["--device", options.device, "--sizes", options.sizes, *(["--tiny"] * options.tiny)]
    command += [part for key, value in more.items() for part in (f"--{key}", value)]
    begin = time.time()
    environment["STARTED"] = repr(begin)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    *lines, last = done.stdout.splitlines() or [""]
    print("\n".join(lines), flush=True)
    try:
        found = json.loads(last)
    except json.JSONDecodeError:
        found = {"error": f"exit code {done.returncode}: {last}"}
    found["process"] = time.time() - begin
    print(f"  {job} {more or ''}: {json.dumps(found)}", flush=True)
    return found


def measure(name: str, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Runs the parts of one model, and notes what each found as it goes."""
    folder = Path(options.folder or tempfile.mkdtemp(prefix="clsa_packages_")) / name
    folder.mkdir(parents=True, exist_ok=True)
    caches = folder / "caches"
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "build": lambda: run_child("build", name, folder, folder / "build", options),
        "load": lambda: loads(name, folder, options),
        "eager": lambda: run_child("compiled", name, folder, caches, options, backend="eager"),
        "cold": lambda: run_child("compiled", name, folder, caches, options, backend="clsa"),
        "warm": lambda: run_child("compiled", name, folder, caches, options, backend="clsa"),
        "graphs": lambda: run_child(
            "compiled", name, folder, caches, options, backend="clsa", mode="reduce-overhead"
        ),
        "inductor": lambda: run_child(
            "compiled", name, folder, folder / "other", options, backend="inductor"
        ),
    }
    for part in options.parts:
        print(f"== {name}: {part}", flush=True)
        if part == "cold":
            shutil.rmtree(caches, ignore_errors=True)
        found[part] = jobs[part]()
        save(options)
    summary = compare(found)
    found["compared"] = summary
    print(f"== {name}: {json.dumps(summary, indent=1)}", flush=True)
    if not options.folder:
        shutil.rmtree(folder.parent, ignore_errors=True)


def loads(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Loads twice, with nothing left of compilers in between; the second finds the file in memory."""
    runs = []
    for number in range(2):
        caches = folder / f"empty_{number}"
        shutil.rmtree(caches, ignore_errors=True)
        runs.append(run_child("load", name, folder, caches, options))
    return {"first": runs[0], **runs[1]}


def compare(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the ratios that say what a package is worth."""

    def ratio(part: str, key: str) -> float | None:
        try:
            return round(found[part][key] / found["load"][key], 2)
        except (KeyError, TypeError, ZeroDivisionError):
            return None

    def step(part: str, key: str) -> float | None:
        try:
            return round(found["load"][key]["ms"] / found[part]["step"]["ms"], 4)
        except (KeyError, TypeError, ZeroDivisionError):
            return None

    loaded = found.get("load", {})
    return {
        "first token, cold / package": ratio("cold", "first_token"),
        "first token, warm / package": ratio("warm", "first_token"),
        "second token, cold / package": ratio("cold", "second_token"),
        "second token, warm / package": ratio("warm", "second_token"),
        "step, package / torch.compile": step("warm", "step"),
        "step, package's graph / torch.compile's": step("graphs", "graph_step"),
        "nothing was compiled": not (loaded.get("files_of_compilers") or loaded.get("imported_modules")),
    }


RESULTS: dict[str, Any] = {}


def save(options: argparse.Namespace) -> None:
    """Writes what was found so far."""
    if options.out is not None:
        write_text(options.out, json.dumps(RESULTS, indent=1) + "\n")


def main() -> None:
    """Measures, or is one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", choices=("fixed", "dynamic"), default="fixed", help="of batch and cache")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, help="keeps models and packages there")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="clsa", help=argparse.SUPPRESS)
    parser.add_argument("--mode", default="default", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        job = {"build": build, "load": load, "compiled": compiled}[options.child]
        try:
            print(json.dumps(job(options.only[0], options.folder, options)))
        except Exception as error:
            traceback.print_exc()
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
            raise SystemExit(1) from error
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    RESULTS.update(device=name, torch=torch.__version__, sizes=options.sizes)
    for model in options.only:
        RESULTS[model] = {}
        measure(model, options, RESULTS[model])
        save(options)


if __name__ == "__main__":
    main()
