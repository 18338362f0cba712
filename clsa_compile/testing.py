"""Helpers for tests and for people who try clsa on a model of their own: tiny decoders, comparisons."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 16,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
# With few index heads, ReLU scores tie exactly at the k boundary and eager's own choice is arbitrary.
_DSA: dict[str, Any] = {**_MLA, "index_n_heads": 32, "index_head_dim": 16, "index_topk": 8}
_WINDOW: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}

TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "granite": {},
    "smollm3": {"pad_token_id": 0},
    "glm4": {"pad_token_id": 0},
    "mistral": {"sliding_window": 16},
    "gemma2": {**_WINDOW, "attn_logit_softcapping": 5.0},
    "gemma3_text": _WINDOW,
    "cohere2": _WINDOW,
    "gpt_oss": {**_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "deepseek_v3": {**_MLA, "first_k_dense_replace": 1},
    "deepseek_v32": {**_DSA, "first_k_dense_replace": 1},
    "glm_moe_dsa": {**_DSA, "mlp_layer_types": ["dense", "sparse"]},
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "intermediate_size": [128] * 5,
        "sliding_window": 16,
        "layer_types": [*_WINDOW["layer_types"], *_WINDOW["layer_types"], "full_attention"],
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 5,
    },
}  # fmt: skip


def load_script(path: Path) -> ModuleType:
    """Imports a script under its own name, which Dynamo asks for."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def tiny(model_type: str, attention: str = "sdpa", **changes: Any) -> nn.Module:
    """Returns a small Hugging Face decoder with random weights, in fp32 and eval mode.

    `model_type` is a transformers model type; `changes` override its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_BASE, **TINY.get(model_type, {}), **changes}
    config = AutoConfig.for_model(model_type, **settings)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.eval()


@dataclass(slots=True)
class Transcript:
    """What a run produced: the logits of each step on valid rows, and the cache at the end."""

    logits: list[Tensor] = field(default_factory=list)
    cache: Any = None


def generate_steps(
    model: Any,
    config: Any,
    *,
    cache: str = "static",
    steps: int = 8,
    prompt: int = 12,
    padding: int = 3,
    batch: int = 2,
    length: int = 48,
    seed: int = 1,
    prime: Any = None,
) -> Transcript:
    """Runs a prefill with left padding in the first row, then `steps` decode steps of given tokens.

    `cache` is "static", "dynamic" or "none" (then only the prefill runs). Logits of padding are zeroed.
    `prime` is an eager model that makes the cache's tensors beforehand, as `generate` does: made inside of a
    captured CUDA graph they would belong to it.
    """
    from transformers import DynamicCache, StaticCache

    kinds = {
        "static": lambda: StaticCache(config=config, max_cache_len=length),
        "dynamic": lambda: DynamicCache(config=config),
        "none": lambda: None,
    }
    past = kinds[cache]()
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    mask = torch.ones(batch, prompt, dtype=torch.long)
    mask[0, :padding] = 0
    vocabulary = config.vocab_size
    if prime is not None:
        with torch.no_grad():
            prime(torch.zeros(batch, 1, dtype=torch.long, device=device), past_key_values=past)
        past.reset()
    transcript = Transcript(cache=past)
    for step in range(steps + 1 if past is not None else 1):
        width = prompt if step == 0 else 1
        if step:
            mask = torch.cat([mask, torch.ones(batch, 1, dtype=torch.long)], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        ids = torch.randint(0, vocabulary, (batch, width), generator=generator)
        with torch.no_grad():
            logits = model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=past,
                use_cache=past is not None,
            ).logits
        valid = mask[:, -width:].to(device).bool().unsqueeze(-1)
        transcript.logits.append(torch.where(valid, logits, 0.0).clone())
    return transcript


def largest_difference(a: Transcript, b: Transcript) -> float:
    """Returns the largest absolute difference of logits over all steps."""
    steps = [(x.double() - y.double()).abs().max() for x, y in zip(a.logits, b.logits, strict=True)]
    return torch.stack(steps).max().nan_to_num(nan=torch.inf).item()


def cache_difference(a: Any, b: Any, valid: Tensor) -> float:
    """Returns the largest absolute difference between two caches' keys and values on valid slots.

    `valid` is boolean [B, T]; layers whose cache is shorter (a ring buffer) are compared whole.
    """
    worst = []
    for one, two in zip(a.layers, b.layers, strict=True):
        for x, y in ((one.keys, two.keys), (one.values, two.values)):
            difference = (x.double() - y.double()).abs()
            if valid.shape[1] >= x.shape[2]:
                difference = torch.where(valid[:, None, : x.shape[2], None], difference, 0.0)
            worst.append(difference.max())
    return torch.stack(worst).max().nan_to_num(nan=torch.inf).item()
