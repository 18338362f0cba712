"""The helpers that other tests trust: they must notice differences."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from clsa_compile.testing import (
    TINY,
    Transcript,
    cache_difference,
    generate_steps,
    largest_difference,
    tiny,
)


def test_models_are_the_same_every_time_and_ready_to_run() -> None:
    one, two = tiny("llama"), tiny("llama")
    assert not one.training
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b), name


def test_changes_override_the_configuration() -> None:
    model = tiny("llama", "eager", num_hidden_layers=3)
    assert model.config.num_hidden_layers == 3
    assert model.config._attn_implementation == "eager"


def test_selecting_models_select_fewer_tokens_than_a_prompt_has() -> None:
    for name in ("deepseek_v32", "glm_moe_dsa"):
        assert TINY[name]["index_topk"] < 12


@pytest.mark.parametrize(("cache", "steps"), [("static", 3), ("dynamic", 3), ("none", 1)])
def test_transcripts_hold_a_prefill_and_every_step(cache: str, steps: int) -> None:
    model = tiny("llama")
    transcript = generate_steps(model, model.config, cache=cache, steps=2, prompt=7, padding=2)
    assert len(transcript.logits) == steps
    assert transcript.logits[0].shape[:2] == (2, 7)
    assert not transcript.logits[0][0, :2].any(), "padding is zeroed"
    assert transcript.logits[0][0, 2:].abs().amax(-1).min() > 0
    assert transcript.logits[0][1].abs().amax(-1).min() > 0
    assert (transcript.cache is None) == (cache == "none")
    if cache != "none":
        assert transcript.cache.get_seq_length() == 9


def test_caches_agree_with_each_other_and_with_no_cache() -> None:
    model = tiny("llama")
    static, dynamic, none = (
        generate_steps(model, model.config, cache=c, steps=3) for c in ("static", "dynamic", "none")
    )
    assert largest_difference(static, dynamic) < 1e-5
    assert (static.logits[0] - none.logits[0]).abs().max() < 1e-5


def test_differences_are_seen_in_every_step() -> None:
    a = Transcript([torch.zeros(2), torch.zeros(2)])
    assert largest_difference(a, Transcript([torch.zeros(2), torch.tensor([0.0, 0.5])])) == 0.5
    assert largest_difference(a, Transcript([torch.tensor([-2.0, 0.0]), torch.zeros(2)])) == 2.0
    with pytest.raises(ValueError, match="shorter"):
        largest_difference(a, Transcript([torch.zeros(2)]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_differences(bad: float) -> None:
    a, b = Transcript([torch.zeros(3)]), Transcript([torch.tensor([0.0, bad, 0.0])])
    assert not largest_difference(a, b) < 1e-4
    assert not largest_difference(Transcript([torch.zeros(1), torch.full((1,), bad)]),
                                  Transcript([torch.zeros(1), torch.zeros(1)])) < 1e-4  # fmt: skip


def caches(value: float, at: int) -> tuple[SimpleNamespace, SimpleNamespace]:
    def cache(*layers: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(layers=[SimpleNamespace(keys=x, values=x.clone()) for x in layers])

    a = torch.zeros(1, 2, 6, 3)
    b = a.clone()
    b[:, 1, at] = value
    return cache(a, a), cache(a, b)


def test_cache_differences_count_on_valid_slots_alone() -> None:
    valid = torch.tensor([[False, True, True, True, False, False]])
    assert cache_difference(*caches(0.7, at=2), valid) == pytest.approx(0.7)
    assert cache_difference(*caches(0.7, at=0), valid) == 0.0
    assert cache_difference(*caches(0.7, at=5), valid) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cache_values_that_are_no_numbers_are_differences_on_valid_slots(bad: float) -> None:
    valid = torch.tensor([[False, True, True, True, False, False]])
    assert not cache_difference(*caches(bad, at=2), valid) < 1e-4
    assert cache_difference(*caches(bad, at=0), valid) == 0.0


def test_shorter_layers_are_compared_whole() -> None:
    assert cache_difference(*caches(0.7, at=0), torch.zeros(1, 4).bool()) == pytest.approx(0.7)
