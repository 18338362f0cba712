"""Searches: the same twice, resumed where killed, within their budget; what compiles is what was judged."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clsa_compile
from clsa_compile.calibration import judging, mass_finder, mixture, records
from clsa_compile.calibration.finding import Found
from clsa_compile.calibration.searching import Asked, find
from clsa_compile.errors import KeepError, OptionError
from clsa_compile.testing import tiny


def test_a_search_gives_a_plan_for_the_model_and_its_data(found: Found, asked: Asked) -> None:
    plan = found.plan
    assert plan.pattern().count("F") == 2
    assert plan.pattern()[0] == "F"
    assert (plan.topk, plan.keep_first, plan.keep_last, plan.scope) == (12, 2, 3, "layer")
    assert plan.model is not None
    assert plan.model.layers == 5
    assert len(plan.data) == 64
    assert plan.quality == found.quality.numbers()
    assert plan.quality["tokens"] == 23  # half of the last sequence, which was held out
    for pool in plan.pools:
        anchors = [i for i, role in enumerate(plan.pattern()) if role == "F" and i <= pool.anchor]
        assert sorted(pool.sources) == anchors


def test_the_same_arguments_find_the_same_plan(
    model: Any, tokens: list[Tensor], asked: Asked, found: Found
) -> None:
    settings = {name: getattr(asked, name) for name in Asked.__slots__}
    assert clsa_compile.search(model, tokens, **settings, progress=False) == found.plan


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was(
    model: Any,
    tokens: list[Tensor],
    asked: Asked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    limit = 999

    def counted(real: Any, name: str) -> Any:
        def run(*args: Any) -> Any:
            if len(made) == limit:
                raise KeyboardInterrupt
            made.append(name)
            return real(*args)

        return run

    runs = ((records, "record"), (judging.Judge, "_run"), (judging.Judge, "_dense_run"))
    for owner, name in (*runs, (mass_finder, "fit"), (mass_finder, "moves")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), name))
    monkeypatch.setattr(mass_finder, "NEAR", 1.25)  # one flip is likely enough to be tried
    uninterrupted = find(model, tokens, asked, tmp_path / "whole", progress=False).plan
    whole = [made.pop(0) for _ in tuple(made)]
    tried = [*["fit"] * 2, *["_run"] * 3]
    start = [*["record"] * 3, "moves", "fit", *["_dense_run"] * 3, *["_run"] * 3]
    assert whole == [*start, *tried, "_dense_run", "_run"], "what was held out is judged last, and once"
    for limit in (2, 4, 12):
        with pytest.raises(KeyboardInterrupt):
            find(model, tokens, asked, tmp_path, progress=False)
        assert made == whole[:limit]
    limit = 999
    for _ in range(2):
        assert find(model, tokens, asked, tmp_path, progress=False).plan == uninterrupted
        assert made == whole
        # Nor are costs of anchors made again, which are looked up in what `moves` and other stages keep.
        monkeypatch.setattr(mixture.Costs, "total", no_cost)


def no_cost(*_: Any) -> float:
    raise AssertionError("no cost is to be made again")


def test_grown_anchors_are_kept(
    model: Any, tokens: list[Tensor], asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(asked, anchors=1, budget=1e9)
    plan = find(model, tokens, wanted, tmp_path, progress=False).plan
    monkeypatch.setattr(mixture.Costs, "total", no_cost)
    assert find(model, tokens, wanted, tmp_path, progress=False).plan == plan


def test_a_full_disk_is_an_error_and_what_was_kept_stays(
    model: Any,
    tokens: list[Tensor],
    asked: Asked,
    found: Found,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, room = os.replace, 0

    def replace_file(source: Any, target: Any) -> None:
        nonlocal room
        if Path(target).name.startswith(f"{stage}-"):
            room -= 1
            if room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace_file)
    kept: set[Path] = set()
    for stage in ("record", "moves", "fitted", "dense", "judged"):
        room = int(stage == "record")
        with pytest.raises(KeepError) as error:
            find(model, tokens, asked, tmp_path, progress=False)
        said = str(error.value)
        assert re.search(rf"kept in '{tmp_path}/{stage}-\w+\.\w+': .*No space left on device", said)
        assert "make room and run the same again, and it goes on from there" in said
        now = set(tmp_path.iterdir())
        assert kept < now, "what there was room for is kept"
        assert not [path for path in now if path.name.startswith(".")]
        kept = now
    stage = "none"
    assert find(model, tokens, asked, tmp_path, progress=False).plan == found.plan


@pytest.mark.slow
def test_flips_of_anchors_follow_the_divergence(
    model: Any,
    tokens: list[Tensor],
    asked: Asked,
    found: Found,
    only_layer_3_matters: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layer 3 becomes an anchor, if the mass says that it may."""
    assert found.plan.pattern()[3] == "S"
    for near, role in ((1.0, "S"), (2.0, "F")):
        monkeypatch.setattr(mass_finder, "NEAR", near)
        assert find(model, tokens, asked, progress=False).plan.pattern()[3] == role


@pytest.mark.parametrize("scope", ["layer", "kv_head"])
def test_what_compiles_is_what_was_judged(
    scope: str, model: Any, tokens: list[Tensor], asked: Asked, folder: Path, tmp_path: Path, passes: Any
) -> None:
    found = find(model, tokens, replace(asked, scope=scope), folder, progress=False)
    assert any(pool.sets == 2 for pool in found.plan.pools) == (scope == "kv_head")
    found.plan.save(tmp_path / "plan.json")
    options = {"share": tmp_path / "plan.json", "prefill": "sparse", "strict": True}
    assert abs(loss(model, tokens, passes(**options)) - found.quality.loss) < 1e-5
    assert abs(found.quality.loss - found.quality.dense_loss) > 1e-3


@pytest.mark.exhaustive
def test_inductor_compiles_what_was_judged(model: Any, tokens: list[Tensor], found: Found) -> None:
    settings = {"backend": "clsa", "options": {"share": found.plan, "prefill": "sparse", "strict": True}}
    assert abs(loss(model, tokens, **settings) - found.quality.loss) < 1e-4


def loss(model: Any, tokens: list[Tensor], backend: Any, **settings: Any) -> float:
    """Returns the loss of the held-out sequence, from a compiled model."""
    ids = tokens[1][1:]
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, **settings)
        logits = compiled(input_ids=ids, use_cache=False).logits[0, 24:-1]
    return nn.functional.cross_entropy(logits, ids[0, 25:]).item()


def test_a_budget_takes_as_few_anchors_as_hold_it(
    model: Any, tokens: list[Tensor], asked: Asked, folder: Path
) -> None:
    one = find(model, tokens, replace(asked, anchors=1), folder, progress=False)
    worst = one.quality.perplexity_increase
    for budget in (1e-9, 1e9, max(worst / 2, 1e-9)):
        found = find(model, tokens, replace(asked, anchors=None, budget=budget), folder, progress=False)
        assert found.quality.perplexity_increase <= budget
    loose = find(model, tokens, replace(asked, anchors=None, budget=1e9), folder, progress=False)
    assert loose.plan.pattern() == "FSSSS"


def test_layers_that_break_a_budget_become_anchors(
    model: Any, tokens: list[Tensor], asked: Asked, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a judge for whom every follower costs one percent, three percent leave three of them."""
    real = judging.Judge.quality

    def judged(self: Any, *args: Any) -> Any:
        quality = real(self, *args)
        loss = quality.dense_loss + 0.00995 * quality.schedule.count("S")
        return replace(quality, loss=loss)

    monkeypatch.setattr(judging.Judge, "quality", judged)
    tight = find(model, tokens, replace(asked, anchors=1, budget=0.031), folder, progress=False)
    assert tight.plan.pattern().count("S") == 3
    assert tight.plan.quality["perplexity_increase"] <= 0.031
    none = find(model, tokens, replace(asked, anchors=1, budget=0.001), folder, progress=False)
    assert none.plan.pattern() == "FFFFF"
    assert none.plan.pools == ()
    fewest = find(model, tokens, replace(asked, anchors=None, budget=0.021), folder, progress=False)
    assert fewest.plan.pattern().count("S") == 2


def test_a_layer_that_stays_dense_is_no_follower_in_the_plan(
    ahead: Any, tokens: list[Tensor], asked: Asked
) -> None:
    made = find(ahead(), tokens, replace(asked, anchors=1, scope="kv_head"), progress=False)
    assert made.plan.pattern() == made.quality.schedule == "FSFS"
    assert clsa_compile.evaluate(ahead(), made.plan, tokens[1][1:]).loss == made.quality.loss


def test_models_in_half_precision_can_be_searched(tokens: list[Tensor], asked: Asked) -> None:
    half = tiny("llama", num_hidden_layers=3).to(torch.bfloat16)
    assert find(half, tokens, asked, progress=False).plan.pattern().count("F") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchors": None}, "give 'anchors', the number of layers that choose, or a 'budget'"),
        ({"anchors": 0}, "'anchors' is 0; accepted: a number from 1"),
        ({"anchors": 2.0}, "'anchors' is 2.0"),
        ({"anchors": 6}, "anchors=6, but only 5 layers can share"),
        ({"budget": 0}, "'budget' is 0; accepted: a number above 0"),
        ({"budget": "1%"}, "'budget' is '1%'"),
        ({"seed": -1}, "'seed' is -1"),
        ({"topk": None}, "give 'topk', or longer sequences"),
        ({"topk": 0}, "'topk' is 0; accepted: 1 to 4096"),
        ({"topk": 4097}, "'topk' is 4097; accepted: 1 to 4096"),
        ({"topk": 4}, "keep_first=2 and keep_last=3 are more tokens than topk=4"),
        ({"topk": 40}, "a sequence of 48 tokens is too short for topk=40"),
        ({"scope": "head"}, "'layer' or 'kv_head'"),
    ],
)
def test_what_cannot_be_searched_is_an_error(
    changes: dict[str, Any], message: str, model: Any, tokens: list[Tensor], asked: Asked
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        find(model, tokens, replace(asked, **changes), progress=False)


def test_one_sequence_is_not_enough(model: Any, tokens: list[Tensor], asked: Asked) -> None:
    with pytest.raises(OptionError, match="two sequences at least, one to find a plan and one to judge it"):
        find(model, tokens[0][:1], asked, progress=False)
