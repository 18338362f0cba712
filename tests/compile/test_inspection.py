"""inspect(): says what a compile would do, and has no effect of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, StaticCache

import clsa_compile.backend
from clsa_compile import OptionError, Plan, Report, StrictError, inspect
from clsa_compile.ir.routing import Layer, Pool
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.testing import tiny

CACHES: dict[str, Callable[[Any], Any]] = {
    "static": lambda config: StaticCache(config=config, max_cache_len=48),
    "dynamic": lambda config: DynamicCache(config=config),
    "none": lambda config: None,
}


def prompt(batch: int = 2, tokens: int = 12) -> dict[str, Tensor]:
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": torch.arange(batch * tokens).view(batch, tokens), "attention_mask": mask}


def tensors_of(cache: Any) -> list[Tensor]:
    found = []
    for layer in cache.layers:
        found += [x for x in (layer.keys, layer.values) if isinstance(x, Tensor)]
    return found


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *(("llama", cache) for cache in CACHES),
        ("glm_moe_dsa", "static"),
        *(pytest.param("glm_moe_dsa", cache, marks=pytest.mark.slow) for cache in ("dynamic", "none")),
    ],
)
@pytest.mark.usefixtures("without_inductor")
def test_counts_are_those_of_a_compile(name: str, cache: str) -> None:
    model = tiny(name)
    report = inspect(model, **prompt(), past_key_values=CACHES[cache](model.config))
    assert not counters["clsa"], "nothing is compiled"
    with torch.no_grad():
        torch.compile(model, backend=clsa_compile.backend.clsa)(
            **prompt(), past_key_values=CACHES[cache](model.config)
        )
    assert report.counts() == dict(counters["clsa"])
    assert report.counts()["sites"] == 2
    assert report.counts()["left"] == 0


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_caches_stay_as_they_are(cache: str) -> None:
    model = tiny("llama")
    past = CACHES[cache](model.config)
    with torch.no_grad():
        model(**prompt(), past_key_values=past)
    length, kept = past.get_seq_length(), [x.clone() for x in tensors_of(past)]
    identities = [id(x) for x in tensors_of(past)]
    step = {"input_ids": torch.tensor([[1], [2]]), "attention_mask": torch.ones(2, 13).long()}
    report = inspect(model, **step, past_key_values=past)
    assert report.counts()["attention"] == 2
    assert past.get_seq_length() == length
    assert [id(x) for x in tensors_of(past)] == identities
    for now, before in zip(tensors_of(past), kept, strict=True):
        assert torch.equal(now, before)


def test_an_empty_cache_stays_empty() -> None:
    model = tiny("llama")
    for name in ("static", "dynamic"):
        past = CACHES[name](model.config)
        inspect(model, **prompt(), past_key_values=past)
        assert past.get_seq_length() == 0
        assert all(not x.any() for x in tensors_of(past))


def test_weights_on_the_meta_device_are_enough() -> None:
    model = tiny("llama").to("meta")
    ids = torch.zeros(2, 12, dtype=torch.long, device="meta")
    report = inspect(model, ids, use_cache=False)
    assert report.counts()["attention"] == 2
    assert [site.heads for site in report.sites] == [4, 4]


def test_weights_on_the_meta_device_are_enough_for_a_model_that_makes_its_cache() -> None:
    model = tiny("llama").to("meta")
    ids = torch.zeros(2, 12, dtype=torch.long, device="meta")
    assert inspect(model, ids).counts()["attention"] == 2


def test_fake_weights_are_enough() -> None:
    with FakeTensorMode():
        model = tiny("llama")
        ids = torch.zeros(2, 12, dtype=torch.long)
    assert inspect(model, ids).counts()["attention"] == 2


class Broken(nn.Module):
    """Two attentions with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_graph_breaks_give_several_plans() -> None:
    report = inspect(Broken(), torch.randn(2, 4, 6, 8))
    assert len(report.plans) == 2
    assert report.counts()["attention"] == 2
    assert [site.mask for site in report.sites] == ["none", "kv <= q"]
    assert "2 graphs" in str(report)


def test_arguments_that_python_changes_are_copied() -> None:
    def model(x: Tensor, seen: list[Tensor]) -> Tensor:
        seen.append(x)
        x.add_(1)
        return F.scaled_dot_product_attention(x, x, x)

    x, seen = torch.zeros(2, 4, 6, 8), list[Tensor]()
    report = inspect(model, x, seen)
    assert report.counts()["attention"] == 1
    assert seen == []
    assert not x.any()


def test_a_model_that_is_compiled_already_is_not_disturbed(passes: Any) -> None:
    model = tiny("llama")
    run = torch.compile(model, backend=passes)
    with torch.no_grad():
        first = run(**prompt()).logits
        inspect(model, **prompt())
        second = run(**prompt()).logits
    assert len(passes.plans) == 1, "no recompilation"
    assert torch.equal(first, second)


def test_what_would_be_left_is_in_the_report_with_its_reason() -> None:
    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        weights = (x @ x.mT).softmax(-1)
        return weights @ x, weights

    x = torch.randn(2, 4, 6, 8)
    with pytest.warns(clsa_compile.ClsaWarning, match="users"):
        report = inspect(model, x)
    assert report.counts()["left"] == 1
    assert report.sites[0].reason.startswith("users: ")
    assert "users" in str(report)
    with pytest.raises(Exception, match="users") as error:
        inspect(model, x, options={"strict": True})
    assert "StrictError" in repr(error.value) or isinstance(error.value, StrictError)


def test_a_graph_that_would_be_left_whole_is_in_the_report() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        report = inspect(tiny("llama"), **prompt())
    assert report.plans == ()
    (why,) = report.left_graphs
    assert why.startswith("autocast: ")
    assert why in str(report)


def test_gradients_are_off_while_inspecting() -> None:
    model = tiny("llama")
    assert all(p.requires_grad for p in model.parameters())
    assert inspect(model, **prompt()).counts()["attention"] == 2
    assert torch.is_grad_enabled()


def test_impossible_options_are_errors() -> None:
    with pytest.raises(OptionError, match="strict"):
        inspect(tiny("llama"), **prompt(), options={"strikt": True})


def test_reports_are_readable_and_become_json() -> None:
    model = tiny("glm_moe_dsa", num_hidden_layers=3, indexer_types=["full", "shared", "full"],
                 mlp_layer_types=["dense"] * 3)  # fmt: skip
    report = inspect(model, **prompt())
    assert isinstance(report, Report)
    text = str(report)
    for words in (
        "3 attentions in 1 graph:",
        "3 sparse over selected tokens (2 indexers run)",
        "layers 0, 1 share the index of layer 0",
        "layer 2 has an index of its own",
        "top 8 of",
    ):
        assert words in text, text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["counts"]["sparse_attention"] == 3
    assert tuple(Plan.from_dict(g) for g in data["graphs"]) == report.plans
    assert data["left_graphs"] == []


def test_the_plan_that_the_options_name_is_in_the_report(tmp_path: Path) -> None:
    layers = tuple(Layer(i, 4, 2, f"model.layers.{i}.self_attn", 16, 16, 0.25) for i in range(2))
    pool = Pool(0, 8, {0: ((0.25,) * 4,)}, (1,), keep_first=1, keep_last=2)
    plan = SharingPlan(8, layers, (pool,), keep_first=1, keep_last=2, quality={"kl": 0.5})
    plan.save(tmp_path / "plan.json")
    for share in (plan, tmp_path / "plan.json"):
        report = inspect(tiny("llama"), **prompt(), options={"share": share})
        assert report.sharing == plan
    assert inspect(tiny("llama"), **prompt(), options={"topk": 40, "share": 2}).sharing is None


def test_shared_keys_and_values_are_in_the_report() -> None:
    report = inspect(tiny("gemma3n_text"), **prompt(), past_key_values=None, use_cache=False)
    pairs = [g for g in report.groups if g.kind == "kv"]
    assert [g.members for g in pairs] == [(1, 3, 4)]
    assert "layers 1, 3, 4 read the same keys and values" in str(report)
