"""Decoders of every family: prefill and decode steps equal eager's, and every attention acted on."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import clsa_compile
from clsa_compile.backend import clsa
from clsa_compile.testing import (
    TINY,
    Transcript,
    cache_difference,
    generate_steps,
    largest_difference,
    tiny,
)

NAMED = ("llama", "qwen3", "deepseek_v32", "glm_moe_dsa", "gemma3n_text")
SELECTING = ("deepseek_v32", "glm_moe_dsa")
OTHERS = tuple(name for name in TINY if name not in NAMED)
PROMPT, PADDING, STEPS, LENGTH, TOLERANCE = 12, 3, 8, 48, 1e-4


def run(model: Any, config: Any, cache: str) -> Transcript:
    return generate_steps(
        model, config, cache=cache, steps=STEPS, prompt=PROMPT, padding=PADDING, batch=2, length=LENGTH
    )


def valid_slots() -> torch.Tensor:
    """The cache slots that hold a token of a sequence, [B, T]."""
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[0, :PADDING] = False
    valid[:, PROMPT + STEPS :] = False
    return valid


def check(model: Any, passes: Any, cache: str) -> tuple[Transcript, Transcript]:
    """Runs eager and compiled, and compares logits, caches and what was done."""
    eager = run(model, model.config, cache)
    ours = run(torch.compile(model, backend=passes), model.config, cache)
    assert len(eager.logits) == (1 if cache == "none" else 1 + STEPS)
    assert largest_difference(eager, ours) < TOLERANCE
    if cache != "none":
        assert cache_difference(eager.cache, ours.cache, valid_slots()) < TOLERANCE
    assert passes.count("left") == 0, passes.reasons
    layers = model.config.num_hidden_layers
    for plan in passes.plans:
        assert len(plan.sites) in (0, layers)
        assert [site.layer for site in plan.sites] == list(range(len(plan.sites)))
    assert passes.count("attention") + passes.count("sparse") >= layers
    return eager, ours


# A growing cache takes seven graphs to grow past gemma3n's window; three layers, one of each kind, will do.
FEW = {
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "activation_sparsity_pattern": [0.0] * 3,
}


def marks(name: str, attention: str, cache: str) -> Any:
    """Graphs of gemma3n take half a minute; how attention is spelled means nothing to a growing cache.

    What is eager in gemma3n is compared in test_early.py, and its caches here with sdpa.
    """
    if (name, attention) == ("gemma3n_text", "eager"):
        return pytest.mark.exhaustive
    twice = (attention, cache) == ("eager", "dynamic") or (name, cache) == ("deepseek_v32", "dynamic")
    return pytest.mark.slow if twice or name == "gemma3n_text" else ()


@pytest.mark.parametrize(
    ("name", "attention", "cache"),
    [
        pytest.param(*case, marks=marks(*case))
        for case in product(NAMED, ("sdpa", "eager"), ("static", "dynamic"))
    ],
)
def test_named_families_equal_eager(name: str, attention: str, cache: str, passes: Any) -> None:
    is_short = name == "gemma3n_text" and cache == "dynamic"
    model = tiny(name, attention, **(FEW if is_short else {}))
    check(model, passes, cache)
    if name in SELECTING:
        # Every graph sees more keys than the 8 that are selected.
        assert passes.count("attention") == 0, passes.reasons
        for plan in passes.plans:
            assert {site.topk for site in plan.sites} <= {model.config.index_topk}
    else:
        assert passes.count("sparse") == 0
    if name == "gemma3n_text":
        for plan in passes.plans:
            pairs = [g.members for g in plan.groups if g.kind == "kv"]
            # Of five, layers 3 and 4 read the keys and values of layer 1, the last full one before them.
            assert pairs == [(1, 2) if is_short else (1, 3, 4)]


@pytest.mark.parametrize("name", NAMED)
def test_named_families_equal_eager_without_a_cache(name: str, passes: Any) -> None:
    check(tiny(name), passes, "none")


@pytest.mark.exhaustive
@pytest.mark.parametrize("cache", ["static", "dynamic", "none"])
@pytest.mark.parametrize(
    ("name", "attention"),
    # Hugging Face's gpt_oss has eager attention only, because of its sinks.
    [(n, a) for n in OTHERS for a in ("sdpa", "eager") if (n, a) != ("gpt_oss", "sdpa")],
)
def test_other_families_equal_eager(name: str, attention: str, cache: str, passes: Any) -> None:
    check(tiny(name, attention), passes, cache)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_softcaps_windows_and_sinks_equal_eager(name: str, passes: Any) -> None:
    check(tiny(name, "eager"), passes, "static")
    (first, *_) = passes.plans
    if name == "gemma2":
        assert {site.softcap for site in first.sites} == {5.0}
        assert len({site.mask for site in first.sites}) == 2, "one layer in two has a window"


@pytest.mark.parametrize(
    ("types", "indices"),
    [
        pytest.param(["full", "full", "full"], [(0,), (1,), (2,)], marks=pytest.mark.slow),
        pytest.param(["full", "shared", "shared"], [(0, 1, 2)], marks=pytest.mark.slow),
        (["full", "shared", "full"], [(0, 1), (2,)]),
    ],
)
def test_layers_that_share_an_indexer_share_one_index(
    types: list[str], indices: list[tuple[int, ...]], passes: Any
) -> None:
    model = tiny(
        "glm_moe_dsa",
        num_hidden_layers=3,
        indexer_types=types,
        mlp_layer_types=["dense", "dense", "sparse"],
    )
    check(model, passes, "static")
    for plan in passes.plans:
        assert [g.members for g in plan.groups if g.kind == "index"] == indices
        assert plan.count("sparse") == 3


def test_a_prompt_shorter_than_the_selection_is_read_densely(passes: Any) -> None:
    model = tiny("glm_moe_dsa")
    eager = generate_steps(model, model.config, cache="none", prompt=6, padding=0)
    ours = generate_steps(
        torch.compile(model, backend=passes), model.config, cache="none", prompt=6, padding=0
    )
    assert largest_difference(eager, ours) < TOLERANCE
    assert passes.count("attention") == 2
    assert passes.count("sparse") == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "glm_moe_dsa"])
def test_families_equal_eager_through_inductor(name: str) -> None:
    # Experts are Inductor's alone, and half of its work.
    changes = {"mlp_layer_types": ["dense"] * 2} if name in SELECTING else {}
    model = tiny(name, **changes)
    eager = run(model, model.config, "static")
    ours = run(torch.compile(model, backend=clsa), model.config, "static")
    assert largest_difference(eager, ours) < TOLERANCE
    assert cache_difference(eager.cache, ours.cache, valid_slots()) < TOLERANCE
    counted = counters["clsa"]
    assert counted["left"] == 0
    action = "sparse_attention" if name in SELECTING else "attention"
    assert counted[action] == counted["sites"] == 4, "two layers in a prefill and a decode graph"
    assert clsa_compile.__version__
