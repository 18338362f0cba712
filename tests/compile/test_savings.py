"""What sharing saves: counted by hand, said in the report, and freed by plan.strip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import StaticCache

import clsa_compile
from clsa_compile.errors import OptionError, StrippedError
from clsa_compile.ir.plan import Plan, Savings
from clsa_compile.testing import generate_steps, largest_difference, tiny

LAYERS, LENGTH = 5, 48
IDLE = ("wq_b.weight", "weights_proj.weight")
RECLAIMED = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")


def glm() -> nn.Module:
    return tiny("glm_moe_dsa", num_hidden_layers=LAYERS, mlp_layer_types=["dense"] * LAYERS)


def plan_of(model: nn.Module, length: int = LENGTH, **options: Any) -> Plan:
    cache = StaticCache(model.config, max_cache_len=length)
    ids = torch.ones(2, 1, dtype=torch.long)
    (plan,) = clsa_compile.inspect(model, input_ids=ids, past_key_values=cache, options=options).plans
    return plan


def saved(plan: Plan) -> Savings:
    assert plan.savings is not None
    return plan.savings


@pytest.mark.parametrize(("reclaim", "names"), [(False, IDLE), (True, RECLAIMED)])
def test_indexers_that_do_not_run(reclaim: bool, names: tuple[str, ...]) -> None:
    model = glm()
    found = saved(plan_of(model, share="FSSFS", reclaim=reclaim))
    paths = [f"model.layers.{i}.self_attn.indexer.{name}" for i in (1, 2, 4) for name in names]
    assert sorted(found.idle) == sorted(paths)
    weights = [model.get_parameter(path) for path in paths]
    assert found.weight_bytes == sum(w.numel() * 4 for w in weights)
    config, rows = model.config, 2
    keys = rows * LENGTH * config.index_head_dim
    assert found.cache_bytes == 3 * keys * 4
    scores = 3 * 2 * keys * config.index_n_heads
    assert found.flops == scores + sum(2 * rows * w.numel() for w in weights if w.dim() == 2)


def test_dense_layers_that_attend_to_selected_tokens() -> None:
    model = tiny("llama", num_hidden_layers=LAYERS)
    found = saved(plan_of(model, 100, topk=40, share=4))
    config, skipped = model.config, 3 * 2 * (100 - 40) * 2 * model.config.head_dim
    assert found.cache_bytes == skipped * config.num_key_value_heads * 4
    assert found.flops == 2 * skipped * config.num_attention_heads
    assert found.idle == ()
    assert found.weight_bytes == 0


@pytest.mark.slow
def test_nothing_is_saved_where_nothing_is_shared() -> None:
    assert plan_of(glm()).savings is None
    # Every layer looks at everything to choose for itself.
    assert plan_of(tiny("llama"), 100, topk=40).savings is None


def test_the_report_says_what_is_saved() -> None:
    model = glm()
    cache = StaticCache(model.config, max_cache_len=LENGTH)
    ids = torch.ones(1, 1, dtype=torch.long)
    text = str(clsa_compile.inspect(model, input_ids=ids, past_key_values=cache, options={"share": 4}))
    assert (
        "a call no longer reads 9.22 kB of caches and 221 kB of weights, and computes 258 kflop less" in text
    )
    assert "`inspect(...).plans[0].strip(model)` frees the weights that are no longer read" in text


def test_the_report_offers_to_free_weights_only_where_some_are_idle() -> None:
    model = tiny("llama")
    ids = torch.ones(1, 64, dtype=torch.long)
    text = str(clsa_compile.inspect(model, ids, options={"topk": 40, "share": 2, "prefill": "sparse"}))
    assert "a call no longer reads" in text
    assert "strip(model)" not in text


def test_plans_with_savings_go_through_json() -> None:
    plan = plan_of(glm(), share=4)
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("reclaim", [False, True])
def test_a_stripped_model_computes_the_same(reclaim: bool) -> None:
    options = {"share": 4, "reclaim": reclaim}
    model = glm()
    expected = generate_steps(torch.compile(model, backend="clsa", options=options), model.config, prompt=20)
    plan = plan_of(model, **options)
    torch._dynamo.reset()
    before = {name: p.untyped_storage().nbytes() for name, p in model.named_parameters()}
    assert plan.strip(model) == saved(plan).weight_bytes
    after = {name: p.untyped_storage().nbytes() for name, p in model.named_parameters()}
    assert sum(before.values()) - sum(after.values()) == saved(plan).weight_bytes - 4 * len(saved(plan).idle)
    assert plan.strip(model) == 0
    actual = generate_steps(torch.compile(model, backend="clsa", options=options), model.config, prompt=20)
    assert largest_difference(expected, actual) < 1e-5


@pytest.mark.exhaustive
def test_a_stripped_model_computes_the_same_through_inductor() -> None:
    options = {"share": 4, "reclaim": True}
    model = glm()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = torch.compile(model, backend="clsa", options=options)(ids, use_cache=False).logits
        torch._dynamo.reset()
        plan_of(model, **options).strip(model)
        actual = torch.compile(model, backend="clsa", options=options)(ids, use_cache=False).logits
    assert (expected - actual).abs().max() < 1e-5


@pytest.mark.slow
def test_a_stripped_model_never_runs_wrong() -> None:
    model = glm()
    plan_of(model, share=4).strip(model)
    ids = torch.ones(1, 20, dtype=torch.long)
    with torch.no_grad(), pytest.raises(StrippedError, match=r"freed by plan\.strip"):
        model(input_ids=ids)
    for options in ({}, {"share": 2}):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="clsa", options=options)
        with (
            torch.no_grad(),
            pytest.raises((OptionError, BackendCompilerFailed), match="weights that this graph"),
        ):
            compiled(input_ids=ids, use_cache=False)


def test_a_plan_of_another_model_strips_nothing() -> None:
    plan, model = plan_of(glm(), share=4), tiny("llama")
    before = dict(model.named_parameters())
    with pytest.raises(OptionError, match="plan is of another model"):
        plan.strip(model)
    assert all(p is before[name] for name, p in model.named_parameters())
