"""Plans with trained indices, against an attention written for Hugging Face's own interface."""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import clsa_compile
from clsa_compile.config import Options
from clsa_compile.errors import PlanError
from clsa_compile.ir.routing import Index, Layer, Pool
from clsa_compile.ir.scores import LIGHTNING
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.testing import Transcript, generate_steps, largest_difference, tiny

LAYERS, PROMPT, STEPS, LENGTH, TOPK, TOLERANCE = 4, 20, 5, 48, 8, 1e-4
MIXTURE = "sum: exp(dot + weight)"


class Oracle:
    """Attention as Hugging Face calls it: a group's first layer scores all keys for all of its layers."""

    name = "clsa_trained"

    def __init__(self, model: nn.Module, plan: SharingPlan, prompts: bool) -> None:
        self.plan, self.prompts = plan, prompts
        self.given: dict[int, tuple[Tensor, Any]] = {}
        self.bias = torch.zeros(())
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, module: Any, args: Any, kwargs: Any) -> None:
        self.given[module.layer_idx] = (kwargs["hidden_states"], kwargs["position_embeddings"])

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        group, s = q.shape[1] // k.shape[1], q.shape[2]
        if mask is None:
            mask = torch.ones(q.shape[0], 1, s, k.shape[2]).tril(k.shape[2] - s).bool()
        pool = next(p for p in self.plan.pools if module.layer_idx in p.members)
        if pool.anchor == module.layer_idx:
            self.bias = self._chosen(module, pool, k, mask, kwargs["scaling"])
        scores = (q @ k.repeat_interleave(group, 1).mT * kwargs["scaling"]).masked_fill(~mask, -torch.inf)
        if self.prompts or s == 1:
            scores = scores + self.bias
        return (scores.softmax(-1).nan_to_num() @ v.repeat_interleave(group, 1)).transpose(1, 2), None

    def _chosen(self, module: Any, pool: Pool, k: Tensor, mask: Tensor, scale: float) -> Tensor:
        index = pool.index
        assert index is not None
        x, (cos, sin) = self.given[module.layer_idx]
        query, head, bias = (self.plan.tensors[name] for name in index.tensor_names())
        rows = query.shape[0] if not hasattr(module, "qkv_proj") else module.o_proj.in_features
        q = (x @ query[:rows].T).unflatten(-1, (-1, module.head_dim))
        q = (module.q_norm(q) if hasattr(module, "q_norm") else q).transpose(1, 2)
        half = q.shape[-1] // 2
        q = q * cos[:, None] + torch.cat((-q[..., half:], q[..., :half]), -1) * sin[:, None]
        group = q.shape[1] // k.shape[1]
        first, last = index.first_head, index.first_head + index.kv_heads
        dot = (q @ k.repeat_interleave(group, 1).mT * scale)[:, first * group : last * group]
        weight = (x @ head.T + bias).transpose(1, 2)[..., None]
        points = torch.exp(dot + weight) if index.score == MIXTURE else weight * dot.relu()
        scores = points.sum(1, keepdim=True).masked_fill(~mask, -torch.inf)
        # A padding token's embedding is 0, and all its scores are equal: ties go to the lowest position.
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :TOPK]
        return torch.full_like(scores, -torch.inf).scatter(-1, best, 0.0)


@functools.cache
def made(family: str) -> nn.Module:
    return tiny(family, num_hidden_layers=LAYERS)


def run(model: Any, config: Any, cache: str) -> Transcript:
    return generate_steps(
        model, config, cache=cache, steps=STEPS, prompt=PROMPT, padding=3, batch=2, length=LENGTH
    )


def expected(model: nn.Module, plan: SharingPlan, cache: str, prompts: bool) -> Transcript:
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    made = Oracle(twin.eval(), plan, prompts)
    ALL_ATTENTION_FUNCTIONS.register(Oracle.name, made)
    ALL_MASK_ATTENTION_FUNCTIONS.register(Oracle.name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    twin.set_attn_implementation(Oracle.name)
    try:
        return run(twin, model.config, cache)
    finally:
        model.set_attn_implementation("sdpa")


# Families differ in how queries are made, which prompts and caches know nothing of.
@pytest.mark.parametrize(
    ("family", "cache", "prefill"),
    [
        ("llama", "static", "dense"),
        ("llama", "static", "sparse"),
        pytest.param("llama", "dynamic", "dense", marks=pytest.mark.slow),
        pytest.param("llama", "none", "sparse", marks=pytest.mark.slow),
        pytest.param("qwen3", "static", "dense", marks=pytest.mark.slow),
        pytest.param("phi3", "dynamic", "sparse", marks=pytest.mark.slow),
    ],
)
def test_layers_attend_to_what_the_index_of_their_group_ranks_first(
    family: str, prefill: str, cache: str, passes: Any, traced: Any, index_plan: Any
) -> None:
    model = made(family)
    plan = index_plan(model)
    passes.options = Options.read({"share": plan, "prefill": prefill})
    ours = run(traced(model, passes), model.config, cache)
    wanted = expected(model, plan, cache, prefill == "sparse")
    assert largest_difference(wanted, ours) < TOLERANCE
    if cache != "none" or prefill == "sparse":
        assert largest_difference(run(model, model.config, cache), ours) > TOLERANCE
        assert any(p.schedule == "ISIS" for p in passes.plans)


# Which heads are read is settled before they are scored.
@pytest.mark.parametrize(("score", "kv_heads", "first"), [(MIXTURE, 1, 1), (LIGHTNING.text, 1, 0)])
def test_an_index_may_read_some_key_heads_only(
    score: str, kv_heads: int, first: int, passes: Any, traced: Any, index_plan: Any
) -> None:
    model = made("llama")
    plan = index_plan(model, score=score, kv_heads=kv_heads, first=first)
    passes.options = Options.read({"share": plan, "prefill": "sparse"})
    ours = run(traced(model, passes), model.config, "static")
    assert largest_difference(expected(model, plan, "static", True), ours) < TOLERANCE


def test_the_file_of_a_plan_is_the_plan(
    tmp_path: Path, make_passes: Any, traced: Any, index_plan: Any
) -> None:
    model = made("llama")
    plan = index_plan(model)
    path = tmp_path / "plan.json"
    plan.save(path)
    transcripts = []
    for share in (plan, str(path)):
        passes = make_passes(options=Options.read({"share": share, "prefill": "sparse"}))
        transcripts.append(run(traced(model, passes), model.config, "static"))
    assert largest_difference(*transcripts) == 0


def test_another_model_is_refused(index_plan: Any) -> None:
    plan = index_plan(made("llama"))
    other = tiny("llama", num_hidden_layers=LAYERS + 1)
    with pytest.raises(BackendCompilerFailed, match=re.escape("the plan is for 4 dense layers that can")):
        clsa_compile.inspect(other, torch.arange(30)[None], options={"share": replace(plan, model=None)})


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_other_weights_of_the_same_shapes_are_refused(index_plan: Any, tmp_path: Path) -> None:
    """By every way of compiling, whatever the module is that the weights lie in."""
    plan, ids = index_plan(made("llama")), torch.arange(30)[None]
    torch.manual_seed(1)
    other = type(made("llama"))(made("llama").config).eval()
    message = "the plan is for another model than this one: its weights are others, as "
    options = {"share": plan, "prefill": "sparse"}
    for module in (other, other.model):
        with torch.no_grad(), pytest.raises((PlanError, BackendCompilerFailed), match=message):
            torch.compile(module, backend="clsa", options=options)(ids, use_cache=False)
        with pytest.raises((PlanError, BackendCompilerFailed), match=message):
            clsa_compile.inspect(module, ids, use_cache=False, options=options)
    with pytest.raises(PlanError, match=message):
        clsa_compile.check(other, ids, use_cache=False, options=options)
    with pytest.raises(PlanError, match=message):
        clsa_compile.export(other, ids, path=tmp_path / "model.pt2", options=options)
    assert not list(tmp_path.iterdir())
    half = copy.deepcopy(made("llama")).bfloat16()
    clsa_compile.inspect(half, ids, use_cache=False, options=options)


def test_the_report_says_what_an_index_is_for(index_plan: Any) -> None:
    model = made("llama")
    options = {"share": index_plan(model), "prefill": "sparse"}
    text = str(clsa_compile.inspect(model, torch.arange(30)[None], options=options))
    assert "layers 0, 1 share an index trained for them, over the keys of layer 0" in text
    assert "8 tokens by an index trained for layers 2, 3" in text
    assert "schedule ISIS" in text
    assert "4 sparse over selected tokens (2 indexers run)" in text


@pytest.mark.usefixtures("without_inductor")
def test_the_option_works_through_torch_compile(index_plan: Any) -> None:
    model = made("llama")
    plan = index_plan(model)
    options = {"share": plan, "prefill": "sparse", "strict": True}
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours = torch.compile(model, backend="clsa", options=options)(ids, use_cache=False).logits
        theirs = model(ids, use_cache=False).logits
    assert (ours - theirs)[:, :TOPK].abs().max() < TOLERANCE, "rows with few tokens read all of them"
    assert (ours - theirs)[:, TOPK:].abs().max() > TOLERANCE


class Biased(nn.Module):
    """One layer whose mask is added to scores, a number a distance."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        places = torch.arange(x.shape[1])
        ahead = places > places[:, None]
        bias = torch.where(ahead, -torch.inf, -0.3 * (places[:, None] - places).abs())
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def test_strict_minds_a_group_whose_index_cannot_be_made() -> None:
    layer = Layer(0, 2, 2, "", 16, 16, 0.25, 0.0)
    index = Index("0", MIXTURE, 0, 2)
    shapes = ((96, 32), (2, 32), (2,))
    tensors = {n: torch.zeros(s) for n, s in zip(index.tensor_names(), shapes, strict=True)}
    pools = (Pool(0, TOPK, {}, (0,), index=index),)
    plan = SharingPlan(TOPK, (layer,), pools, 0, 0, kind="distilled", tensors=tensors)
    options = {"share": plan, "prefill": "sparse"}
    report = clsa_compile.inspect(Biased(), torch.randn(1, 20, 32), options=options)
    (site,) = report.sites
    assert "is added to scores, which an index does not learn" in site.reason
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="its index cannot be made"):
        torch.compile(Biased(), backend="clsa", options={**options, "strict": True})(torch.randn(1, 20, 32))
