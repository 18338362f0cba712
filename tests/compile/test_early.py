"""Prompts whose last logits alone are wanted: equal to eager, and what is not needed is not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.testing import cache_difference, tiny

PROMPT, LENGTH, TOLERANCE = 12, 24, 1e-4
linear = torch.ops.aten.linear.default


@torch.no_grad()
def prompt(forward: Any, config: Any, cache: str, keep: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    from transformers import DynamicCache, StaticCache

    static = cache == "static"
    past = StaticCache(config=config, max_cache_len=LENGTH) if static else DynamicCache(config=config)
    ids = torch.randint(1, 128, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :3] = 0
    out = forward(
        ids, attention_mask=mask, past_key_values=past, use_cache=True, logits_to_keep=keep, **kwargs
    )
    return out.logits, past


def check(model: Any, passes: Any, cache: str, keep: Any, *, dynamic: bool | None = None) -> list[Any]:
    """Compares logits and caches with eager; returns the rows that each projection computes."""
    logits, past = prompt(model, model.config, cache, keep)
    ours, filled = prompt(torch.compile(model, backend=passes, dynamic=dynamic), model.config, cache, keep)
    torch.testing.assert_close(ours, logits, atol=TOLERANCE, rtol=0)
    valid = torch.zeros(2, LENGTH, dtype=torch.bool)
    valid[:, :PROMPT] = True
    valid[0, :3] = False
    assert cache_difference(past, filled, valid) < TOLERANCE
    (module,) = passes.modules
    return [n.meta["val"].shape[1] for n in module.graph.nodes if n.target is linear]


# Queries, keys and values of the last layer, its output and its network, and the head.
LAST_LAYER = [1, PROMPT, PROMPT, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_the_last_layer_of_llama_runs_for_the_last_row(cache: str, attention: str, passes: Any) -> None:
    assert check(tiny("llama", attention), passes, cache, 1) == [PROMPT] * 7 + LAST_LAYER


def test_positions_in_a_tensor(passes: Any) -> None:
    rows = check(tiny("llama"), passes, "static", torch.tensor([5, 11]))
    assert rows == [PROMPT] * 7 + [2 if r == 1 else r for r in LAST_LAYER]


def test_a_prompt_of_unknown_length_needs_no_other_graph(passes: Any) -> None:
    rows = check(tiny("llama"), passes, "dynamic", 1, dynamic=True)
    assert [isinstance(r, int) for r in rows] == [False] * 7 + [r == 1 for r in LAST_LAYER]


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3n_text", "glm_moe_dsa"])
def test_other_families_equal_eager(name: str, passes: Any) -> None:
    rows = check(tiny(name, "eager"), passes, "static", 1)
    assert rows[-1] == 1


@torch.no_grad()
def test_hidden_states_that_are_returned_are_computed(passes: Any) -> None:
    model = tiny("llama")

    def forward(ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model.model(ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[:, -1:]), hidden

    ids = torch.arange(PROMPT).view(1, PROMPT)
    ours = torch.compile(forward, backend=passes)(ids)
    torch.testing.assert_close(ours, forward(ids), atol=TOLERANCE, rtol=0)
    (module,) = passes.modules
    assert [n.meta["val"].shape[1] for n in module.graph.nodes if n.target is linear] == [PROMPT] * 14 + [1]
