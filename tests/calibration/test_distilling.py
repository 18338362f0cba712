"""Distilling: better than chance, the same twice, within a budget; what cannot be asked is an error."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clsa_compile
from clsa_compile.calibration import distilling
from clsa_compile.calibration.distilling import Wanted, train
from clsa_compile.calibration.finding import Found
from clsa_compile.calibration.graphs import Forward
from clsa_compile.calibration.trainer import Training
from clsa_compile.errors import OptionError, PlanError
from clsa_compile.testing import tiny

WANTED = Wanted(topk=8, groups=2, steps=60)
FAST = Training(topk=8, steps=60, rows=40, query_rate=3e-3, head_rate=1e-2)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences and few steps take larger rates."""
    real = Wanted.training.fget
    assert real is not None
    monkeypatch.setattr(
        Wanted,
        "training",
        property(lambda self: replace(real(self), rows=40, query_rate=3e-3, head_rate=1e-2)),
    )


@pytest.fixture(scope="module")
def trained(model: Any, tokens: list[Tensor]) -> Found:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Wanted, "training", property(lambda _: FAST))
        return train(model, tokens, WANTED, progress=False)


def test_a_plan_for_the_model_and_its_data(trained: Found) -> None:
    plan = trained.plan
    assert plan.kind == "distilled"
    assert plan.pattern().count("I") == 2
    assert plan.pattern()[0] == "I"
    assert (plan.topk, plan.keep_first, plan.keep_last) == (8, 0, 0)
    assert plan.model is not None
    assert plan.quality == trained.quality.numbers()
    assert sorted(m for pool in plan.pools for m in pool.members) == [0, 1, 2, 3, 4]


def test_an_index_of_random_weights_loses(model: Any, tokens: list[Tensor], trained: Found) -> None:
    """The control: were the index not used, or were any as good, this would not tell them apart."""
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randn(t.shape, generator=generator) for n, t in trained.plan.tensors.items()}
    plan = replace(trained.plan, tensors=drawn, weights="")
    ours, random = (clsa_compile.evaluate(model, p, tokens) for p in (trained.plan, plan))
    assert random.kl > 1.3 * ours.kl
    kept = [sum(layer.recovered or 0.0 for layer in quality.layers) for quality in (random, ours)]
    assert kept[1] > 1.3 * kept[0], "of what layers would have looked at"


def test_weights_of_another_plan_are_refused(trained: Found, tmp_path: Path) -> None:
    trained.plan.save(tmp_path / "plan.json")
    names = sorted(trained.plan.tensors)
    shuffled = dict(zip(names, (trained.plan.tensors[n] for n in reversed(names)), strict=True))
    with pytest.raises(PlanError, match="other shapes"):
        replace(trained.plan, tensors=shuffled, weights="")
    swapped = {f"{1 - int(n[0])}{n[1:]}": t for n, t in trained.plan.tensors.items()}
    other = replace(trained.plan, tensors=swapped, weights="")
    other.save(tmp_path / "other.json")
    (path,) = tmp_path.glob("plan.*.safetensors")
    next(tmp_path.glob("other.*.safetensors")).replace(path)
    with pytest.raises(PlanError, match="not those that the plan was made with"):
        clsa_compile.SharingPlan.load(tmp_path / "plan.json")


def test_the_same_arguments_give_the_same_plan(model: Any, tokens: list[Tensor], trained: Found) -> None:
    again = clsa_compile.distill(model, tokens, topk=8, groups=2, steps=60, progress=False)
    assert again == trained.plan
    assert again.weights == trained.plan.weights


def test_groups_begin_where_they_are_asked_to(model: Any, tokens: list[Tensor]) -> None:
    plan = clsa_compile.distill(model, tokens, topk=8, groups=(0, 1, 4), steps=1, progress=False)
    assert plan.pattern() == "IISSI"


def test_a_budget_finds_the_fewest_groups(
    model: Any, tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged by a rule in place of a model: the increase is 0.5 over the number of groups."""
    tried = []

    def judged(self: Any, anchors: tuple[int, ...]) -> Any:
        tried.append(anchors)
        return type("Judged", (), {"plan": anchors, "quality": _Increase(0.5 / len(anchors))})

    monkeypatch.setattr(distilling._Finder, "judged", judged)
    assert len(train(model, tokens, Wanted(topk=8, budget=0.17), progress=False).plan) == 3  # type: ignore[arg-type]
    grown = train(model, tokens, Wanted(topk=8, budget=0.13, groups=(0, 2)), progress=False).plan
    assert {0, 2} < set(grown)  # type: ignore[call-overload]
    assert len(grown) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("able", [(0, 1, 2, 3, 4), (0, 2, 3, 4), (0, 3, 4), (0, 1, 3), (0,)])
def test_groups_begin_only_where_an_index_can_be_made(
    able: tuple[int, ...], model: Any, tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every number of groups their places are the best of all that can be, tried one by one."""
    lost = torch.rand(5, 5, generator=torch.Generator().manual_seed(3)).triu(1).tolist()

    class Drawn:
        def __init__(self, *_: Any) -> None:
            self.pairs = lambda: lost

    def cost(starts: tuple[int, ...]) -> float:
        return sum(lost[max(s for s in starts if s <= layer)][layer] for layer in range(5))

    def judged(self: Any, anchors: tuple[int, ...]) -> Any:
        starts = tuple(self._able[a] for a in anchors)
        return type("Judged", (), {"plan": starts, "quality": _Increase(0.5 / len(anchors))})

    monkeypatch.setattr(Forward, "unable", lambda _: {i: "" for i in range(5) if i not in able})
    monkeypatch.setattr(distilling, "recorded", lambda *_: None)
    monkeypatch.setattr(distilling, "Table", Drawn)
    monkeypatch.setattr(distilling, "Costs", Drawn)
    monkeypatch.setattr(distilling._Finder, "judged", judged)
    for count in range(1, len(able) + 1):
        placed = train(model, tokens, Wanted(topk=8, groups=count), progress=False).plan
        every = [(0, *rest) for rest in itertools.combinations(able[1:], count - 1)]
        assert placed == min(every, key=cost)
    assert train(model, tokens, Wanted(topk=8, budget=1e-9), progress=False).plan == able
    grown = train(model, tokens, Wanted(topk=8, groups=1, budget=0.26), progress=False).plan
    assert set(grown) <= set(able)  # type: ignore[call-overload]


def test_layers_with_adapters_are_in_groups_that_begin_elsewhere(tokens: list[Tensor]) -> None:
    adapted = tiny("llama", num_hidden_layers=5)
    for layer in (1, 2, 3):
        attention = adapted.model.layers[layer].self_attn
        attention.q_proj = Adapted(attention.q_proj)
    plan = clsa_compile.distill(adapted, tokens, topk=8, groups=2, steps=1, progress=False)
    assert plan.pattern() == "ISSSI"


class Adapted(nn.Module):
    """A product and a smaller one beside it, as LoRA makes them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


@pytest.mark.parametrize(
    ("wanted", "unable", "message"),
    [
        (
            {"groups": 3},
            {1: "2 products", 2: "2 products", 4: "2 products"},
            "groups=3: an index cannot begin at layer 1: 2 products. The first group begins at layer 0; "
            "layers that can begin one: 0, 3. Adapters can be merged into the weights before",
        ),
        ({"groups": (0, 2, 4)}, {4: "why"}, "groups=(0, 2, 4): an index cannot begin at layer 4: why."),
        ({"groups": 1}, {0: "why"}, "groups=1: an index cannot begin at layer 0: why."),
        ({"budget": 0.1}, {0: "why"}, "the first group: an index cannot begin at layer 0: why."),
        ({"budget": 0.1}, dict.fromkeys(range(5), "why"), "layers that can begin one: none."),
    ],
)
def test_an_error_names_the_layers_that_can_begin_a_group(
    wanted: dict[str, Any], unable: dict[int, str], message: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        Wanted(topk=8, **wanted).able(5, unable)


class _Increase:
    def __init__(self, increase: float) -> None:
        self.perplexity_increase = increase


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": None}, "give 'groups', how many indices there are to be, or a 'budget'"),
        ({"groups": 0}, "'groups' is 0; accepted: their number, or the layers"),
        ({"groups": (1, 3)}, "the first group begins at layer 0"),
        ({"groups": (0, 3, 2)}, "each one later than the one before it"),
        ({"groups": (0, 5)}, "groups=(0, 5), but 5 layers can share"),
        ({"groups": 6}, "groups=6, but 5 layers can share"),
        ({"topk": 0}, "'topk' is 0; accepted: 1 to 4096"),
        ({"topk": 48}, "a sequence of 48 tokens is too short for topk=48"),
        ({"steps": 0}, "'steps' is 0"),
        ({"score": "dot"}, "'score' is 'dot'; accepted: 'mixture' or 'lightning'"),
        ({"target": "mass"}, "'target' is 'mass'; accepted: 'attention' or 'worth'"),
        ({"budget": -1.0}, "'budget' is -1.0; accepted: a number above 0"),
        ({"kv_heads": 3}, "kv_heads=3, but layer 0 has 2"),
    ],
)
def test_what_cannot_be_asked_is_an_error(
    changes: dict[str, Any], message: str, model: Any, tokens: list[Tensor]
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        clsa_compile.distill(model, tokens, **{"topk": 8, "groups": 2, "progress": False, **changes})


def test_too_little_text_and_models_with_indexers_are_errors(model: Any, tokens: list[Tensor]) -> None:
    with pytest.raises(OptionError, match="two sequences at least"):
        clsa_compile.distill(model, tokens[0][:1], topk=8, groups=2)
    with pytest.raises(OptionError, match="give 'topk', or longer sequences"):
        clsa_compile.distill(model, tokens, groups=2)


@pytest.fixture(scope="module")
def own(tokens: list[Tensor]) -> Found:
    return train(tiny("deepseek_v32"), tokens, Wanted(steps=3), progress=False)


@pytest.mark.slow
def test_a_model_with_indexers_keeps_their_form(own: Found, tokens: list[Tensor], tmp_path: Path) -> None:
    assert own.plan.kind == "own"
    assert own.plan.topk == 8
    assert own.plan.quality == own.quality.numbers()
    assert all(layer.recovered is not None for layer in own.quality.layers)
    own.plan.save(tmp_path / "plan.json")
    plan = clsa_compile.SharingPlan.load(tmp_path / "plan.json")
    assert plan == own.plan
    model = tiny("deepseek_v32")
    before = clsa_compile.evaluate(model, plan, tokens)
    clsa_compile.apply(model, plan)
    after = clsa_compile.evaluate(model, plan, tokens)
    assert after.to_dict() == before.to_dict(), "of dense attention, both times"
    assert before.kl > 0


def test_a_plan_of_weights_is_not_for_compiling(own: Found, tokens: list[Tensor]) -> None:
    model = tiny("deepseek_v32")
    with pytest.raises(OptionError, match=re.escape("clsa_compile.apply(model, plan) puts them")):
        clsa_compile.inspect(model, tokens[0][:1], options={"share": own.plan})
    with pytest.raises(OptionError, match="tasks say what sharing changes"):
        clsa_compile.evaluate_tasks(model, own.plan, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 8, "groups": 2}, "by itself, with indexers that it was trained with: leave 'topk' out"),
        ({"groups": 2}, "'groups' is 2, but this model has indexers of its own"),
        ({"kv_heads": 1}, "'kv_heads' is 1, but this model has indexers of its own"),
        ({"score": "lightning"}, "'score' is 'lightning', but this model has indexers"),
    ],
)
def test_what_own_indexers_cannot_be_asked(
    changes: dict[str, Any], message: str, tokens: list[Tensor]
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        clsa_compile.distill(tiny("deepseek_v32"), tokens, progress=False, **changes)
