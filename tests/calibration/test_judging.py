"""Evaluation: figures are those of the two models' logits, and results in a folder are found again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clsa_compile
from clsa_compile.calibration import judging
from clsa_compile.calibration.finding import Found
from clsa_compile.calibration.given import Model, asked
from clsa_compile.calibration.stages import Stages
from clsa_compile.errors import OptionError, PlanError
from clsa_compile.testing import tiny

OPTIONS = {"topk": 12, "share": "FSFSS", "keep_first": 2, "keep_last": 3}
AGAIN = {**OPTIONS, "share": "FSRSS", "pool": 24}


class Words:
    """A tokenizer that has one word a token."""

    def decode(self, ids: list[int]) -> str:
        return f"word{ids[0]}"


@pytest.mark.parametrize("options", [OPTIONS, AGAIN, {**OPTIONS, "dense_below": 32}])
def test_figures_are_those_of_both_models_logits(
    options: dict[str, Any], model: Any, tokens: list[Tensor], passes: Any
) -> None:
    ids = tokens[0]
    quality = clsa_compile.evaluate(model, options, ids, tokenizer=Words(), skip=30)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)[:, 30:-1]
        compiled = torch.compile(model, backend=passes(**options, prefill="sparse"))
        sparse = compiled(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)[:, 30:-1]
    labels = ids[:, 31:, None]
    kl = (dense.exp() * (dense - sparse)).sum(-1)
    assert quality.tokens == 34
    near = {"abs_tol": 1e-5, "rel_tol": 1e-4}
    assert math.isclose(quality.dense_loss, -dense.gather(2, labels).mean(), **near)
    assert math.isclose(quality.loss, -sparse.gather(2, labels).mean(), **near)
    assert math.isclose(quality.kl, kl.mean(), **near)
    assert math.isclose(quality.agreement, (dense.argmax(-1) == sparse.argmax(-1)).double().mean())
    worst = quality.worst_token
    assert math.isclose(worst.kl, kl.max(), abs_tol=1e-4)
    assert kl[worst.sequence, worst.position - 31] == kl.max()
    assert worst.token == ids[worst.sequence, worst.position]
    assert worst.text == f"word{worst.token}"
    assert len(quality.by_sequence) == 2


def test_a_layer_that_chooses_again_says_so(model: Any, tokens: list[Tensor]) -> None:
    quality = clsa_compile.evaluate(model, AGAIN, tokens[0])
    assert quality.schedule == "FSRSS"
    assert [layer.anchor for layer in quality.layers] == [None, 0, 0, 2, 2]
    assert quality.layers[2].recovered > quality.layers[1].recovered


def test_layers_say_whom_they_follow_and_what_they_keep(model: Any, tokens: list[Tensor]) -> None:
    quality = clsa_compile.evaluate(model, OPTIONS, tokens[0])
    assert quality.schedule == "FSFSS"
    assert [layer.anchor for layer in quality.layers] == [None, 0, None, 2, 2]
    kept = [layer.recovered for layer in quality.layers]
    assert kept[0] is None
    assert kept[2] is None
    assert all(0.1 < kept[i] <= 1 for i in (1, 3, 4))
    assert quality.worst_layer == min((1, 3, 4), key=lambda i: kept[i])
    assert quality.layers[1].path == "model.layers.1.self_attn"
    for anchor, row in enumerate(quality.serves):
        for layer, share in enumerate(row):
            assert math.isnan(share) if layer < anchor else 0 < share <= 1.001
            assert layer <= anchor or share <= quality.serves[layer][layer] + 1e-3


def test_a_layer_is_the_mean_of_the_sequences_in_which_it_reads_chosen_tokens(
    model: Any, tokens: list[Tensor]
) -> None:
    known = Model(model, tokens[0][:1], Stages(None))
    judge = judging.Judge(known, [tokens[0][:1], tokens[0][1:]], asked(OPTIONS).options)
    figures, pools = judge.measure(asked(OPTIONS).change, "ours")
    del figures[0]["kept"]["3"]
    figures[1]["kept"]["3"] = 0.5
    figures[0]["kept"]["1"], figures[1]["kept"]["1"] = 0.25, 0.5
    kept = [layer.recovered for layer in judge.quality(figures, pools).layers]
    assert (kept[1], kept[3]) == (0.375, 0.5)


def test_roles_are_those_of_the_graph_that_ran(ahead: Any, tokens: list[Tensor]) -> None:
    """Layer 2 reads tokens that others do not, so nobody chooses for it: it stays dense."""
    quality = clsa_compile.evaluate(ahead(), {**OPTIONS, "share": "FSSS"}, tokens)
    assert quality.schedule == "FSFS"
    assert [layer.anchor for layer in quality.layers] == [None, 0, None, 0]
    assert [layer.recovered is None for layer in quality.layers] == [True, False, True, False]


def test_lengths_that_run_different_schedules_are_an_error(ahead: Any, tokens: list[Tensor]) -> None:
    """Only from 64 tokens on does layer 2 read others."""
    longer = torch.cat([tokens[0], tokens[1]], 1)
    with pytest.raises(OptionError, match="sequences of 48 tokens run FSSS, of 96 FSFS; give sequences of"):
        clsa_compile.evaluate(ahead(least=64), {**OPTIONS, "share": "FSSS"}, [tokens[0], longer])


def test_more_tokens_are_nearer_and_all_of_them_are_the_model(model: Any, tokens: list[Tensor]) -> None:
    few, many = (clsa_compile.evaluate(model, {**OPTIONS, "topk": k}, tokens[0]) for k in (8, 32))
    assert many.kl < few.kl
    dense = clsa_compile.evaluate(model, {**OPTIONS, "share": "FFFFF"}, tokens[0])
    assert dense.kl < 1e-9
    assert abs(dense.perplexity_increase) < 1e-5
    assert dense.agreement == 1
    assert dense.worst_layer is None


def test_a_plan_a_file_and_options_are_taken(
    model: Any, tokens: list[Tensor], found: Found, tmp_path: Path
) -> None:
    found.plan.save(tmp_path / "plan.json")
    results = [
        clsa_compile.evaluate(model, plan, tokens[1][1:])
        for plan in (found.plan, tmp_path / "plan.json", {"share": found.plan})
    ]
    assert {r.loss for r in results} == {found.quality.loss}


def no_run(*_: Any) -> None:
    raise AssertionError("nothing is to be run")


def test_results_in_a_folder_are_found_again(
    model: Any, tokens: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = clsa_compile.evaluate(model, OPTIONS, tokens[0], folder=tmp_path)
    monkeypatch.setattr(judging.Judge, "_run", no_run)
    monkeypatch.setattr(judging.Judge, "_dense_run", no_run)
    assert str(clsa_compile.evaluate(model, OPTIONS, tokens[0], folder=tmp_path)) == str(first)
    with pytest.raises(AssertionError):
        clsa_compile.evaluate(model, {**OPTIONS, "topk": 11}, tokens[0], folder=tmp_path)


def test_a_plan_of_another_model_is_an_error(tokens: list[Tensor], found: Found) -> None:
    with pytest.raises(PlanError, match=r"its weights are others, as .*; search for a plan for it"):
        clsa_compile.evaluate(tiny("llama", num_hidden_layers=5), found.plan, tokens)
    with pytest.raises(PlanError, match="it has 3 attentions, the plan's has 5"):
        clsa_compile.evaluate(tiny("llama", num_hidden_layers=3), found.plan, tokens)


@pytest.mark.parametrize(
    ("plan", "settings", "message"),
    [
        ({"share": 2}, {}, "give 'topk', or longer sequences"),
        ({"topk": 0}, {}, "'topk' is 0; accepted: 1 to 4096"),
        ({"topk": 4097}, {}, "'topk' is 4097; accepted: 1 to 4096"),
        ({**OPTIONS, "share": "SFFFF"}, {}, "before the first F"),
        ({**OPTIONS, "share": "FSSS"}, {}, "'FSSS' is for 4 layers; this graph has 5"),
        ({**OPTIONS, "topk": 40}, {}, "a sequence of 48 tokens is too short for topk=40"),
        ({**OPTIONS, "dense_below": 50}, {}, "48 tokens is too short for dense_below=50"),
        ({**AGAIN, "pool": 40}, {}, "48 tokens is too short for pool=40"),
        ("nowhere.json", {}, "'nowhere.json' cannot be read"),
        (OPTIONS, {"skip": 47}, "skip=47 leaves nothing to score of 48 tokens"),
        (OPTIONS, {"skip": -1}, "skip=-1 leaves nothing"),
    ],
)
def test_what_cannot_be_measured_is_an_error(
    plan: Any, settings: dict[str, Any], message: str, model: Any, tokens: list[Tensor]
) -> None:
    with pytest.raises(OptionError, match=message):
        clsa_compile.evaluate(model, plan, tokens, **settings)


def test_a_model_that_selects_by_itself_is_told(tokens: list[Tensor]) -> None:
    with pytest.raises(OptionError, match="this model selects 8 tokens by itself"):
        clsa_compile.evaluate(tiny("glm_moe_dsa"), OPTIONS, tokens)
