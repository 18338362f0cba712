"""Serves a decoder from a package: compiled once, loaded in a moment, streaming tokens.

    python examples/serve_package.py                          # SmolLM2-135M: builds the package, then serves
    python examples/serve_package.py --package smollm2.pt2    # serves what is there already
    python examples/serve_package.py --tiny                   # a decoder with random weights; a minute

The package is served in a process of its own, which imports neither a compiler nor transformers. The tokens
are compared with the eager model's; the exit code is 1 if one departs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import clsa_compile

PROMPT = "Explain in three sentences why attention in a long text can be sparse."


def serve(path: Path, digest: str, ids: list[int], steps: int) -> None:
    """Loads a package and streams tokens, a line of JSON each; this is the whole server."""
    begin = time.perf_counter()
    package = clsa_compile.load(path, digest=digest)
    print(json.dumps({"loaded": time.perf_counter() - begin}), flush=True)
    prompt = torch.tensor([ids], device=package.device)
    caches = package.caches(batch=1, size=len(ids) + steps)
    for token in package.generate(prompt, caches, steps):
        print(json.dumps({"token": int(token), "at": time.perf_counter() - begin}), flush=True)


def model_and_prompt(tiny: bool, device: torch.device) -> tuple[Any, Any, list[int]]:
    """Returns a model, its tokenizer (None for one with random weights) and the tokens of a prompt."""
    if tiny:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 128}
        config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
        return LlamaForCausalLM(config).eval().to(device), None, [3, 14, 15, 92, 65]
    from generate_smollm2 import load

    tokenizer, model = load(device)
    chat = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    return model, tokenizer, list(ids)


def build(model: Any, path: Path) -> str:
    """Writes the package of a model; returns its digest, which is kept beside it."""
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    made = clsa_compile.export(model, (ids,), path=path, dynamic_shapes={"batch": 1})
    print(made)
    path.with_suffix(".digest").write_text(made.digest)
    return made.digest


@torch.no_grad()
def eager(model: Any, ids: list[int], steps: int) -> list[int]:
    """Returns the likeliest tokens by the model as it is."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=len(ids) + steps)
    given, tokens = torch.tensor([ids], device=model.device), []
    for _ in range(steps):
        given = model(given, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(given))
    return tokens


def main() -> int:
    """Builds a package where there is none, serves it in another process, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, help="a package, or where one is to be written")
    parser.add_argument("--digest", help="the package's digest (default: what lies beside it)")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.package, options.digest, options.serve, options.tokens)
        return 0
    model, tokenizer, ids = model_and_prompt(options.tiny, torch.device(options.device))
    with tempfile.TemporaryDirectory() as folder:
        path = options.package or Path(folder) / "decoder.pt2"
        if path.exists():
            digest = options.digest or path.with_suffix(".digest").read_text()
        else:
            digest = build(model, path)
        tokens = stream(path, digest, ids, options.tokens, tokenizer)
    same = tokens == eager(model, ids, options.tokens)
    print(f"tokens equal eager's: {same}")
    return 0 if same else 1


def stream(path: Path, digest: str, ids: list[int], steps: int, tokenizer: Any) -> list[int]:
    """Starts the server and prints what it says as it comes; returns its tokens."""
    command = [sys.executable, __file__, "--package", str(path), "--digest", digest]
    command += ["--tokens", str(steps), "--serve", json.dumps(ids)]
    begin = time.perf_counter()
    tokens, first = [], 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as server:
        assert server.stdout is not None
        for line in server.stdout:
            said = json.loads(line)
            if "token" not in said:
                continue
            first = first or time.perf_counter() - begin
            tokens.append(said["token"])
            text = str(tokens[-1]) + " " if tokenizer is None else tokenizer.decode(tokens[-1:])
            print(text, end="", flush=True)
    seconds = time.perf_counter() - begin
    print(
        f"\nfirst token {first:.2f} s after the process was started, all {len(tokens)} after {seconds:.2f} s"
    )
    return tokens


if __name__ == "__main__":
    sys.exit(main())
