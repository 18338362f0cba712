"""clsa_compile.check: agreement where there is, and the layer that departs where one is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import clsa_compile
from clsa_compile.checking import Check
from clsa_compile.errors import OptionError
from clsa_compile.passes import rewrite
from clsa_compile.testing import tiny

Broken = Callable[[int], None]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    """Breaks the rewrite of one layer: its scale is a tenth too large."""

    def install(*ordinals: int) -> None:
        real = rewrite._Rewriter.replace

        def wrong(self: Any, site: Any, indexer: Any) -> None:
            scaled = replace(site, scale=site.scale * 1.1) if site.ordinal in ordinals else site
            real(self, scaled, indexer)

        monkeypatch.setattr(rewrite._Rewriter, "replace", wrong)

    return install


def step(model: Any, kind: str = "static", **settings: Any) -> Check:
    """Checks one decode step after a prompt of 12 tokens."""
    cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=24)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 100, (2, 13), generator=generator)
    with torch.no_grad():
        model(input_ids=ids[:, :12], past_key_values=cache, use_cache=True)
    kept = [layer.keys.clone() for layer in cache.layers]
    made = clsa_compile.check(
        model,
        input_ids=ids[:, 12:],
        position_ids=torch.full((2, 1), 12),
        past_key_values=cache,
        use_cache=True,
        **settings,
    )
    assert all(torch.equal(a, layer.keys) for a, layer in zip(kept, cache.layers, strict=True)), "a copy ran"
    return made


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_what_agrees_is_compared_whole(kind: str) -> None:
    made = step(tiny("llama"), kind, inductor=False)
    assert made.ok
    assert made.first is None
    assert [d.name for d in made.layers] == [f"layer {i} (model.layers.{i}.self_attn)" for i in (0, 1)]
    names = [d.name for d in made.tensors]
    assert names[0] == "output.logits"
    assert len([n for n in names if n.endswith((".keys", ".values"))]) == 4
    assert all(0 < d.eager < d.budget for d in made.tensors)
    assert str(made).startswith("clsa agrees: all 2 attentions and 5 tensors")


@pytest.mark.slow
def test_inductor_and_clsa_stand_side_by_side() -> None:
    made = step(tiny("llama", num_hidden_layers=1))
    assert made.ok
    assert all(0 <= d.inductor < d.budget for d in made.tensors)


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_a_broken_layer_is_found_and_named(broken: Broken) -> None:
    broken(2)
    made = step(tiny("llama", num_hidden_layers=3), inductor=False)
    assert not made.ok
    assert made.first is made.layers[2]
    assert [d.departs for d in made.layers[:3]] == [False, False, True]
    assert next(d.name for d in made.tensors if d.departs) == "output.logits"
    assert made.blame == ("the rewrite of layer 2",)
    assert str(made).startswith("layer 2 (model.layers.2.self_attn) departs by ")


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_several_broken_layers_are_all_named(broken: Broken) -> None:
    broken(0, 2)
    made = step(tiny("llama", num_hidden_layers=3), inductor=False)
    assert made.blame == ("the rewrite of layer 0, 2",)


@pytest.mark.usefixtures("without_inductor")
def test_a_broken_pass_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from clsa_compile.passes import pipeline

    real = pipeline.keep_tables

    def wrong(captured: Any) -> Any:
        found = real(captured)
        for node in list(captured.graph.nodes):
            if node.target is torch.ops.aten.cos.default:
                node.target = torch.ops.aten.sin.default
        return found

    monkeypatch.setattr(pipeline, "keep_tables", wrong)
    made = step(tiny("llama"), inductor=False)
    assert any("the pass 'tables' (without it tables of sines" in text for text in made.blame)


@pytest.mark.usefixtures("without_inductor")
def test_a_model_without_float64_is_compared_with_eager() -> None:
    made = step(tiny("glm_moe_dsa"), inductor=False)
    assert made.ok
    assert made.note.startswith("compared with eager itself, since the model does not run in float64: ")
    assert made.note in str(made)
    assert all(d.eager == 0 for d in made.tensors)


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_options_that_change_results_are_said_to() -> None:
    made = step(
        tiny("llama"), options={"topk": 4, "keep_first": 1, "keep_last": 1, "share": 2}, inductor=False
    )
    assert made.changes_results
    assert made.first is not None
    assert made.first.name.startswith("layer 1 ")
    assert "the options change results" in str(made)
    assert not step(tiny("llama"), inductor=False).changes_results


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(OptionError, match=r"training mode.*call model.eval\(\)"):
        clsa_compile.check(tiny("llama").train(), torch.ones(1, 4, dtype=torch.long))


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        layer = torch.nn.Linear(4, 4)
    with pytest.raises(OptionError, match="not on the meta device"):
        clsa_compile.check(layer.eval(), torch.ones(1, 4))
