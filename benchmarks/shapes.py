"""The decoders the benchmarks run: random weights in published shapes, with a filled cache."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clsa_compile import SharingPlan

# A file here is called kernels.py: the package of that name, which transformers looks for, goes first.
if sys.path[0] == str(Path(__file__).parent):
    sys.path.append(sys.path.pop(0))

from transformers import (
    AutoModelForCausalLM,
    GlmMoeDsaConfig,
    LlamaConfig,
    PreTrainedConfig,
    StaticCache,
)

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A decoder with a static cache of `cache` tokens, `filled` of them in use."""

    name: str
    config: PreTrainedConfig
    batch: int
    cache: int
    filled: int

    @property
    def has_indexer(self) -> bool:
        """Tells whether the model selects its own tokens."""
        return hasattr(self.config, "index_topk")


def llama_config(layers: int, cache: int, tiny: bool = False) -> LlamaConfig:
    """Llama 3B's shape: grouped heads (24 / 8 of 128), tied embeddings."""
    sizes: dict[str, Any] = {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    }
    if tiny:
        sizes |= {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 512,
        }
    return LlamaConfig(
        **sizes,
        num_hidden_layers=layers,
        max_position_embeddings=cache,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
    )


def dsa_config(layers: int, cache: int, tiny: bool = False) -> GlmMoeDsaConfig:
    """GLM-MoE-DSA with dense MLPs: latent attention and an index of 32 heads in every layer."""
    sizes: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "kv_lora_rank": 512,
        "q_lora_rank": 1024,
        "index_n_heads": 32,
        "index_head_dim": 128,
        "index_topk": 2048,
        "vocab_size": 32768,
    }
    if tiny:
        sizes |= {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "index_head_dim": 16,
            "index_topk": max(cache // 4, 1),
            "vocab_size": 512,
        }
    return GlmMoeDsaConfig(
        **sizes,
        num_hidden_layers=layers,
        max_position_embeddings=cache,
        mlp_layer_types=["dense"] * layers,
        indexer_types=["full"] * layers,
    )


def build_model(config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Builds the model with random weights, directly on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, module in model.named_modules():
        # Checkpoints are loaded so: the model keeps these in float32.
        if name.endswith("indexer.weights_proj"):
            module.float()
    return model


def counters(cache: StaticCache) -> Iterator[Tensor]:
    """Yields the length counters of every layer, those of index keys included."""
    for layer in cache.layers:
        yield layer.cumulative_length
        if getattr(layer, "is_indexer_initialized", False):
            yield layer.indexer_cumulative_length


def rewind(cache: StaticCache, length: int) -> None:
    """Sets every layer's length to `length` tokens, in place: compiled code holds the addresses."""
    for counter in counters(cache):
        counter.fill_(length)


@torch.no_grad()
def filled_cache(model: Any, case: Case) -> StaticCache:
    """Makes the case's static cache and fills all of it with normal random numbers.

    Slots past `case.filled` are random too, so that reading one shows in the result.
    """
    cache = StaticCache(config=model.config, max_cache_len=case.cache)
    ids = torch.zeros(case.batch, 1, dtype=torch.long, device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)  # allocates, eagerly
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        if getattr(layer, "is_indexer_initialized", False):
            layer.indexer_keys.normal_()
    rewind(cache, case.filled)
    return cache


def weight_bytes(model: Any) -> int:
    """Counts the bytes of weights that one decode step must read.

    An embedding of its own is looked up, not read; a tied one is read as the output layer.
    """
    total = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not output:
        total -= embedding.numel() * embedding.element_size()
    return total


def cache_bytes(case: Case, cache: StaticCache, share: int = 1, topk: int | None = None) -> int:
    """Counts the bytes of cache that one decode step must read.

    One layer in `share` selects: it scans its index keys, or, in a dense model made sparse by
    `topk`, all it has. The others read `topk` tokens; without one a dense model reads everything.
    """
    selecting = -(-len(cache.layers) // share)
    total = 0
    for number, layer in enumerate(cache.layers):
        selects = number < selecting
        if case.has_indexer:
            kept = min(case.config.index_topk, case.filled)
            index_keys = cache.layers[0].indexer_keys
            total += selects * case.filled * index_keys.shape[-1] * index_keys.itemsize
        else:
            kept = case.filled if selects or topk is None else min(topk, case.filled)
        row = layer.keys.shape[-1] + layer.values.shape[-1]
        total += kept * layer.keys.shape[1] * row * layer.keys.itemsize
    return case.batch * total


def index_plan(config: PreTrainedConfig, groups: int, topk: int, key_heads: int | None) -> SharingPlan:
    """Makes a plan of `groups` indices with random weights, as `clsa_compile.distill` trains them."""
    layers, heads, kv_heads = (
        getattr(config, f"num_{name}") for name in ("hidden_layers", "attention_heads", "key_value_heads")
    )
    hidden, width = config.hidden_size, config.head_dim
    count = key_heads or kv_heads
    layer = {"heads": heads, "kv_heads": kv_heads, "width": width, "value_width": width}
    starts = [i * layers // groups for i in range(groups)]
    pools, tensors = [], {}
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], layers], strict=True)):
        index = {"name": str(number), "score": "sum: exp(dot + weight)", "first_head": 0, "kv_heads": count}
        members = list(range(start, end))
        pools.append({"anchor": start, "members": members, "sources": {}, "rows": {}, "index": index})
        used = count * heads // kv_heads
        for name, shape in (("query", (heads * width, hidden)), ("head", (used, hidden)), ("bias", (used,))):
            tensors[f"{number}.{name}"] = torch.randn(shape) * 0.02
    plan = {
        "format": "clsa sharing plan",
        "version": 3,
        "kind": "distilled",
        "topk": topk,
        "layers": [{"path": "", "scale": width**-0.5, "softcap": 0.0, **layer}] * layers,
        "pools": pools,
        "keep_first": 0,
        "keep_last": 0,
        "scope": "layer",
        "power": 1.0,
        "model": None,
        "data": "",
        "quality": {},
        "weights": "",
    }
    return SharingPlan.from_dict(plan, tensors)


def index_bytes(case: Case, cache: StaticCache, groups: int, topk: int, key_heads: int | None) -> int:
    """Counts the bytes of cache that a step must read with so many indices over borrowed keys."""
    layer = cache.layers[0]
    heads, row = layer.keys.shape[1], layer.keys.shape[-1] + layer.values.shape[-1]
    attended = len(cache.layers) * heads * min(topk, case.filled) * row
    scanned = groups * (key_heads or heads) * case.filled * layer.keys.shape[-1]
    return case.batch * (attended + scanned) * layer.keys.itemsize


def score_bytes(case: Case, queries: int) -> int:
    """Counts the bytes of the index scores [B, S, H, T] in float32 that eager DSA makes."""
    return 4 * case.batch * queries * case.config.index_n_heads * case.cache
