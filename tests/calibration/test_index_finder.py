"""calibration/index_finder.py: which indexers of a model need to run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clsa_compile
from clsa_compile.calibration import judging
from clsa_compile.calibration.finding import Found
from clsa_compile.calibration.searching import Asked, find
from clsa_compile.errors import OptionError, PlanError
from clsa_compile.testing import tiny

ASKED = Asked(anchors=2)


@pytest.fixture(scope="module")
def searched(selecting: Any, tokens: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Found:
    return find(selecting, tokens, ASKED, tmp_path_factory.mktemp("index"), progress=False)


def loss(model: Any, ids: Tensor, backend: Any) -> float:
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        logits = compiled(input_ids=ids, use_cache=False).logits[0, 24:-1]
    return nn.functional.cross_entropy(logits, ids[0, 25:]).item()


@pytest.mark.slow
def test_a_plan_names_the_indexers_that_run(searched: Found, selecting: Any) -> None:
    plan = searched.plan
    assert plan.kind == "index"
    assert plan.topk == selecting.config.index_topk
    assert plan.pattern().count("F") == 2
    assert plan.pattern() == searched.quality.schedule
    assert plan.quality["tokens"] == searched.quality.tokens
    kept = [layer.recovered for layer in searched.quality.layers]
    assert all((k is None) == (role == "F") for k, role in zip(kept, plan.pattern(), strict=True))


def test_what_compiles_is_what_was_judged(
    searched: Found, selecting: Any, tokens: list[Tensor], tmp_path: Path, passes: Any
) -> None:
    searched.plan.save(tmp_path / "plan.json")
    ids = tokens[1][1:]
    options = {"share": tmp_path / "plan.json", "strict": True}
    assert abs(loss(selecting, ids, passes(**options)) - searched.quality.loss) < 1e-5
    assert abs(searched.quality.loss - searched.quality.dense_loss) > 1e-4
    by_hand = clsa_compile.evaluate(selecting, {"share": searched.plan.pattern()}, ids)
    assert abs(by_hand.loss - searched.quality.loss) < 1e-6


@pytest.mark.slow
def test_moves_of_anchors_follow_the_divergence(
    selecting: Any, tokens: list[Tensor], only_layer_3_matters: None
) -> None:
    """An anchor gets to layer 3 from any start."""
    assert find(selecting, tokens, ASKED, progress=False).plan.pattern()[3] == "F"


@pytest.mark.slow
def test_layers_without_an_indexer_follow_the_one_that_they_follow_in_the_model(
    glm: Any, tokens: list[Tensor]
) -> None:
    given = glm(indexer_types=["full", "shared", "full", "full", "shared"])
    made = find(given, tokens, ASKED, progress=False)
    pattern = made.plan.pattern()
    assert pattern[1] == pattern[4] == "S"
    reads = {m: pool.anchor for pool in made.plan.pools for m in pool.members}
    assert reads[1] == 0
    assert reads[4] == reads.get(3, 3)
    with pytest.raises(OptionError, match="anchors=4, but only 3 layers can share"):
        find(given, tokens, Asked(anchors=4), progress=False)


@pytest.mark.slow
def test_the_same_plan_again_and_nothing_judged_twice(
    searched: Found, selecting: Any, tokens: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find(selecting, tokens, ASKED, tmp_path, progress=False).plan == searched.plan
    monkeypatch.setattr(judging.Judge, "_run", lambda *_: pytest.fail("judged again"))
    assert find(selecting, tokens, ASKED, tmp_path, progress=False).plan == searched.plan


def test_a_plan_of_another_model_is_an_error(
    searched: Found, tokens: list[Tensor], model: Any, glm: Any
) -> None:
    for other in (glm(num_key_value_heads=4, num_attention_heads=4, qk_nope_head_dim=24), model):
        with pytest.raises(PlanError, match="the plan is for another model"):
            clsa_compile.evaluate(other, searched.plan, tokens)
    ids = torch.ones(1, 32, dtype=torch.long)
    unnamed = replace(searched.plan, model=None)
    for plan, message in (
        (searched.plan, "its weights are others"),
        (unnamed, "for 5 layers with an index"),
    ):
        with pytest.raises(Exception, match=message):
            clsa_compile.inspect(tiny("glm_moe_dsa"), input_ids=ids, use_cache=False, options={"share": plan})


@pytest.mark.slow
def test_what_cannot_be_shared_is_not_reported_as_shared(
    uneven: Any, tokens: list[Tensor], passes: Any
) -> None:
    quality = clsa_compile.evaluate(uneven, {"share": "FSSSS"}, tokens[1][1:])
    assert quality.schedule == "FSFSS"
    assert [layer.anchor for layer in quality.layers] == [None, 0, None, 0, 0]
    assert [layer.recovered is None for layer in quality.layers] == [True, False, True, False, False]
    assert abs(loss(uneven, tokens[1][1:], passes(share="FSSSS")) - quality.loss) < 1e-5


@pytest.mark.slow
def test_a_search_counts_no_savings_that_do_not_happen(uneven: Any, tokens: list[Tensor]) -> None:
    """Layer 2 cannot read the index of layer 1, nor layer 3 that of layer 2."""
    with pytest.raises(
        OptionError,
        match=r"anchors=2, but layers 0, 2, 3 have to choose: .* Layer 2 keeps its own index: "
        r"it selects 4 tokens, layer model.layers.1.self_attn 8. Give 3 at least",
    ):
        find(uneven, tokens, Asked(anchors=2), progress=False)
    made = find(uneven, tokens, Asked(budget=1e9), progress=False)
    assert made.plan.pattern() == made.quality.schedule == "FSFFS"


def test_a_number_of_tokens_is_the_models_own(selecting: Any, tokens: list[Tensor]) -> None:
    with pytest.raises(OptionError, match=r"this model selects 8 tokens by itself.*leave 'topk' out"):
        find(selecting, tokens, Asked(topk=16, anchors=2, keep_last=3), progress=False)
    with pytest.raises(OptionError, match="a sequence of 20 tokens is too short for topk=8"):
        find(selecting, [t[:, :20] for t in tokens], ASKED, progress=False)
    with pytest.raises(OptionError, match="nothing to measure without 'topk' or 'share'"):
        clsa_compile.evaluate(selecting, {}, tokens)
