"""Prompts whose last logits alone are wanted: equal to eager, and what is not needed is not computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.config import Options
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


# Without the pass the head alone runs for one row; in glm_moe_dsa two products of 1 x 1 are beside it.
@pytest.mark.parametrize(
    ("name", "whole", "alone"),
    [
        ("qwen3", 9, 6),
        ("gemma2", 9, 6),
        pytest.param("gemma3n_text", 38, 41, marks=pytest.mark.slow),
        pytest.param("glm_moe_dsa", 17, 6, marks=pytest.mark.slow),
    ],
)
def test_other_families_equal_eager(name: str, whole: int, alone: int, passes: Any) -> None:
    rows = check(tiny(name, "eager"), passes, "static", 1)
    assert (rows.count(PROMPT), rows.count(1)) == (whole, alone)


@pytest.mark.slow
def test_layers_that_share_keys_and_values_run_for_the_last_row(
    passes: Any, make_passes: Any, traced: Any
) -> None:
    """gemma3n: its last two layers do, and all add to slices of their hidden states in place."""
    model = tiny("gemma3n_text")
    without = make_passes(options=Options.read({"skip": "early"}))
    expected, kept = prompt(traced(model, without), model.config, "static", 1)
    ours, filled = prompt(traced(model, passes), model.config, "static", 1)
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)
    assert cache_difference(kept, filled, torch.ones(2, LENGTH, dtype=torch.bool)) == 0
    queries = [
        [q.meta["val"].shape[2] for _, (q, *_) in calls] for p in (without, passes) for calls in p.calls
    ]
    assert queries == [[PROMPT] * 5, [PROMPT, PROMPT, 1, 1, 1]]


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
