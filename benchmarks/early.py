"""What a prompt takes with and without the pass that computes only what its last position needs.

    python benchmarks/early.py                                   # float32 on a CPU, bfloat16 on a GPU
    python benchmarks/early.py --tiny --tokens 64 --repeats 1    # a trial run

Random weights in published widths and a few layers, `logits_to_keep=1`, a static cache that the prompt fills:
Llama 3B, where the pass frees the last layer's queries and network, and gemma3n E4B, of whose layers three in
seven read keys and values of earlier ones. Both are clsa compiled through Inductor. Times are medians by the
clock, calls with and without in turn; the logits of both are compared in the same run, and so are the caches.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from results import write_text
from rich.console import Console
from rich.table import Table
from shapes import build_model, llama_config
from timing import forget_compiled, synchronize
from torch import Tensor
from transformers import Gemma3nTextConfig, PreTrainedConfig, StaticCache

WITHOUT = {"skip": "early"}


@dataclass(frozen=True)
class Row:
    """Seconds of a prompt, and the largest difference that the pass makes, by the largest value."""

    model: str
    layers: int
    tokens: int
    without: float
    early: float
    difference: float


def gemma3n_config(layers: int, tokens: int, tiny: bool) -> Gemma3nTextConfig:
    """gemma3n E4B's widths, which are the defaults; three layers in seven share keys and values, as there."""
    sizes: dict[str, Any] = {"intermediate_size": [16384] * layers}
    if tiny:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": [128] * layers,
            "num_attention_heads": 4,
            "head_dim": 16,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
        }
    vocabulary = 512 if tiny else 32768
    return Gemma3nTextConfig(
        **sizes,
        num_hidden_layers=layers,
        num_kv_shared_layers=layers * 3 // 7,
        layer_types=["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(layers)],
        activation_sparsity_pattern=[0.0] * layers,
        vocab_size=vocabulary,
        vocab_size_per_layer_input=vocabulary,
        max_position_embeddings=tokens,
    )


def prompt(forward: Callable[..., Any], ids: Tensor, cache: StaticCache) -> Callable[[], Tensor]:
    """Returns the call that runs a prompt into an empty cache; it gives the last logits."""

    def call() -> Tensor:
        out = forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits
        return logits

    return call


def seconds(call: Callable[[], Tensor], cache: StaticCache, device: torch.device) -> float:
    """Gives the seconds of one call by the clock, with the cache emptied before."""
    cache.reset()
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Gives the largest difference by the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def measure(name: str, config: PreTrainedConfig, tokens: int, repeats: int, device: torch.device) -> Row:
    """Times one model's prompt both ways."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(config, device, dtype)
    ids = torch.randint(config.vocab_size, (1, tokens), device=device)
    caches = [StaticCache(config=config, max_cache_len=tokens) for _ in range(2)]
    for cache in caches:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)  # allocates, eagerly
    compiled = [torch.compile(model, backend="clsa", dynamic=False, options=given) for given in (WITHOUT, {})]
    calls = [prompt(forward, ids, cache) for forward, cache in zip(compiled, caches, strict=True)]
    for cache in caches:
        cache.reset()
    logits = [call().float() for call in calls]
    apart = [difference(logits[1], logits[0])]
    for layer, other in zip(caches[1].layers, caches[0].layers, strict=True):
        apart += [difference(layer.keys, other.keys), difference(layer.values, other.values)]
    both = tuple(zip(calls, caches, strict=True))
    times = [[seconds(call, cache, device) for call, cache in both] for _ in range(repeats + 1)][1:]
    without, early = map(statistics.median, zip(*times, strict=True))
    forget_compiled(device)
    return Row(name, config.num_hidden_layers, tokens, without, early, max(apart))


def main() -> int:
    """Runs both; returns 1 where a result differs by more than rounding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=7, help="layers of each model, a multiple of seven")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="small widths, to try the script out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    device = torch.device(given.device)
    configs = {
        "Llama 3B": llama_config(given.layers, given.tokens, given.tiny),
        "gemma3n E4B": gemma3n_config(given.layers, given.tokens, given.tiny),
    }
    rows = [measure(name, config, given.tokens, given.repeats, device) for name, config in configs.items()]
    table = Table("model", "layers", "tokens", "without, ms", "early, ms", "ratio", "difference")
    for row in rows:
        ratio = f"{row.without / row.early:.2f}x"
        cells = (f"{1e3 * row.without:.1f}", f"{1e3 * row.early:.1f}", ratio, f"{row.difference:.1e}")
        table.add_row(row.model, str(row.layers), str(row.tokens), *cells)
    Console(width=100).print(table)
    if given.out:
        machine = {"device": given.device, "torch": torch.__version__, "python": platform.python_version()}
        write_text(
            given.out, json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1)
        )
    budget = 1e-4 if device.type == "cpu" else 2e-2
    return int(any(not row.difference <= budget for row in rows))


if __name__ == "__main__":
    sys.exit(main())
