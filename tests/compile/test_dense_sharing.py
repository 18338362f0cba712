"""`topk` on dense models, against an attention written for Hugging Face's own interface, token by token."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import clsa_compile
from clsa_compile.backend import ClsaWarning
from clsa_compile.config import Options
from clsa_compile.errors import OptionError, StrictError
from clsa_compile.ir.routing import Layer, Pool
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.testing import Transcript, generate_steps, largest_difference, tiny

LAYERS, PROMPT, STEPS, LENGTH, TOLERANCE = 5, 20, 6, 48, 1e-4
TOPK = {"topk": 8, "keep_first": 2, "keep_last": 3}
POOL = 14


@functools.cache
def llama(**changes: Any) -> nn.Module:
    return tiny("llama", num_hidden_layers=LAYERS, **changes)


def run(model: Any, config: Any, cache: str) -> Transcript:
    return generate_steps(
        model, config, cache=cache, steps=STEPS, prompt=PROMPT, padding=3, batch=2, length=LENGTH
    )


class Oracle:
    """Attention as Hugging Face calls it, with a schedule: loops over sequences, queries and kv heads."""

    name = "clsa_oracle"

    def __init__(
        self,
        schedule: str,
        prompts: bool,
        scope: str = "layer",
        own: bool = False,
        below: int = 0,
        rows: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.below, self.rows = below, rows or {}
        self.schedule, self.prompts, self.scope, self.own = schedule, prompts, scope, own
        self.chosen: dict[tuple[int, int, int], list[int]] = {}
        self.offered: dict[tuple[int, int, int], list[int]] = {}

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        h, s = q.shape[1:3]
        group = h // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = (q @ k.mT) * kwargs["scaling"]
        allowed = (
            mask if mask is not None else torch.ones(q.shape[0], 1, s, k.shape[2]).tril(k.shape[2] - s).bool()
        )
        scores = scores.masked_fill(~allowed, -torch.inf)
        shared = self.prompts or s == 1
        role = self.schedule[module.layer_idx]
        if role == "R" and shared:
            scores = scores + self._bias(scores, self.offered)
        if role in "FR" or self.own:
            mass = scores.softmax(-1).nan_to_num()
            readable = (scores > -torch.inf).any(1, keepdim=True)
            self.chosen = self._choose(mass, readable, group, TOPK["topk"])
            if role == "F":
                self.offered = self._choose(mass, readable, group, POOL)
        if shared and (role == "S" or self.own):
            few = allowed.expand(scores.shape).sum(-1, keepdim=True) <= self.below
            chosen = self.chosen
            if own_sets := self.rows.get(module.layer_idx):
                chosen = {(i, n, row): chosen[i, own_sets[n // group] * group, row] for i, n, row in chosen}
            scores = scores + torch.where(few, 0.0, self._bias(scores, chosen))
        out = scores.softmax(-1).nan_to_num() @ v
        return out.transpose(1, 2), None

    def _choose(self, mass: Tensor, allowed: Tensor, group: int, topk: int) -> dict[Any, list[int]]:
        chosen = {}
        b, h, s, _ = mass.shape
        for i in range(b):
            for row in range(s):
                readable = torch.nonzero(allowed[i, 0, row]).flatten().tolist()
                for head in range(h):
                    heads = slice(head // group * group, (head // group + 1) * group)
                    pooled = mass[i, heads if self.scope == "kv_head" else slice(None), row].sum(0)
                    ends = [*readable[:2], *readable[-3:]]
                    rank = {t: (t not in ends, -float(pooled[t]), t) for t in readable}
                    chosen[i, head, row] = sorted(readable, key=rank.__getitem__)[:topk]
        return chosen

    def _bias(self, scores: Tensor, chosen: dict[Any, list[int]]) -> Tensor:
        bias = torch.full_like(scores, -torch.inf)
        for (i, head, row), tokens in chosen.items():
            bias[i, head, row, tokens] = 0.0
        return bias


@pytest.fixture
def oracle() -> Any:
    def make(model: nn.Module, cache: str, *args: Any, **kwargs: Any) -> Transcript:
        made = Oracle(*args, **kwargs)
        ALL_ATTENTION_FUNCTIONS.register(Oracle.name, made)
        ALL_MASK_ATTENTION_FUNCTIONS.register(Oracle.name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        twin = type(model)(model.config)
        twin.load_state_dict(model.state_dict())
        twin.eval().set_attn_implementation(Oracle.name)
        try:
            return run(twin, model.config, cache)
        finally:
            model.set_attn_implementation("sdpa")

    return make


# All of schedules and prompts over a static cache, and each pair of values with the other caches.
SCHEDULES = [(2, "FSFSF"), (4, "FSSSF"), ("FFSSS", "FFSSS")]
ATTENDED = [
    *((*schedule, prefill, "static") for schedule in SCHEDULES for prefill in ("dense", "sparse")),
    pytest.param(2, "FSFSF", "dense", "dynamic", marks=pytest.mark.slow),
    pytest.param(4, "FSSSF", "sparse", "dynamic", marks=pytest.mark.slow),
    ("FFSSS", "FFSSS", "sparse", "dynamic"),
    pytest.param(2, "FSFSF", "sparse", "none", marks=pytest.mark.slow),
    (4, "FSSSF", "dense", "none"),
    ("FFSSS", "FFSSS", "dense", "none"),
]


@pytest.mark.parametrize(("share", "schedule", "prefill", "cache"), ATTENDED)
def test_layers_attend_to_what_their_anchor_looked_at(
    share: Any, schedule: str, prefill: str, cache: str, passes: Any, traced: Any, oracle: Any
) -> None:
    passes.options = Options.read({**TOPK, "share": share, "prefill": prefill})
    model = llama()
    ours = run(traced(model, passes), model.config, cache)
    expected = oracle(model, cache, schedule, prefill == "sparse")
    assert largest_difference(expected, ours) < TOLERANCE
    dense = run(model, model.config, cache)
    if cache != "none" or prefill == "sparse":
        assert largest_difference(dense, ours) > TOLERANCE
    sparse = [plan for plan in passes.plans if plan.pools]
    assert len(sparse) == len(passes.plans) if prefill == "sparse" else len(sparse) <= len(passes.plans)
    for plan in sparse:
        assert plan.schedule == schedule
        assert plan.count("sparse") == schedule.count("S")


@pytest.mark.parametrize(
    ("schedule", "prefill", "cache"),
    [
        *((schedule, p, "static") for schedule in ("FSRSS", "FRSRS", "FFSRS") for p in ("dense", "sparse")),
        ("FSRSS", "sparse", "dynamic"),
        ("FRSRS", "dense", "dynamic"),
        ("FFSRS", "sparse", "dynamic"),
    ],
)
def test_layers_choose_again_among_what_was_offered(
    schedule: str, prefill: str, cache: str, passes: Any, traced: Any, oracle: Any
) -> None:
    passes.options = Options.read({**TOPK, "share": schedule, "pool": POOL, "prefill": prefill})
    model = llama()
    ours = run(traced(model, passes), model.config, cache)
    expected = oracle(model, cache, schedule, prefill == "sparse")
    assert largest_difference(expected, ours) < TOLERANCE
    sparse = [plan for plan in passes.plans if plan.pools]
    assert sparse
    for plan in sparse:
        assert plan.schedule == schedule
        assert plan.count("sparse") == schedule.count("S") + schedule.count("R")


@pytest.mark.parametrize(
    ("below", "prefill", "cache"),
    [
        (15, "sparse", "static"),
        (22, "sparse", "static"),
        (20, "dense", "static"),
        (22, "dense", "static"),
        (15, "sparse", "dynamic"),
        (20, "dense", "dynamic"),
    ],
)
def test_rows_of_few_tokens_are_dense(
    below: int, prefill: str, cache: str, passes: Any, traced: Any, oracle: Any
) -> None:
    """Prompts of 20 tokens, one sequence with 3 of padding, and 6 steps: some rows below, some above."""
    passes.options = Options.read({**TOPK, "share": 3, "prefill": prefill, "dense_below": below})
    model = llama()
    ours = run(traced(model, passes), model.config, cache)
    expected = oracle(model, cache, "FSSFS", prefill == "sparse", below=below)
    assert largest_difference(expected, ours) < TOLERANCE
    assert largest_difference(oracle(model, cache, "FSSFS", prefill == "sparse"), ours) > TOLERANCE


def test_a_pool_of_all_keys_is_the_dense_layer(passes: Any, traced: Any, oracle: Any) -> None:
    passes.options = Options.read({**TOPK, "share": "FSRSS", "pool": LENGTH, "prefill": "sparse"})
    model = llama()
    ours = run(traced(model, passes), model.config, "static")
    assert largest_difference(oracle(model, "static", "FSFSS", True), ours) < TOLERANCE
    assert all(plan.schedule == "FSFSS" for plan in passes.plans)


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
@pytest.mark.parametrize("scope", ["layer", "kv_head"])
@pytest.mark.parametrize("share", ["off", 3])
def test_a_set_for_all_heads_or_one_a_kv_head(
    share: Any, scope: str, prefill: str, passes: Any, traced: Any, oracle: Any
) -> None:
    passes.options = Options.read({**TOPK, "share": share, "scope": scope, "prefill": prefill})
    model = llama(num_attention_heads=4, num_key_value_heads=2)
    ours = run(traced(model, passes), model.config, "static")
    expected = oracle(model, "static", "FSSFS", prefill == "sparse", scope, own=share == "off")
    assert largest_difference(expected, ours) < TOLERANCE


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_a_kv_head_may_attend_to_the_set_of_another(
    prefill: str, passes: Any, traced: Any, oracle: Any
) -> None:
    """A plan that says so by hand, as no search does: crosswise, one set for both, and none said."""
    rows = {1: (1, 0), 2: (1, 1), 3: (0, 0)}
    model = llama(num_attention_heads=4, num_key_value_heads=2)
    layers = tuple(Layer(i, 4, 2, "", 16, 16, 0.25) for i in range(LAYERS))
    by_kv_head = ((0.5, 0.5, 0.0, 0.0), (0.0, 0.0, 0.5, 0.5))
    pool = Pool(0, TOPK["topk"], {0: by_kv_head}, (1, 2, 3, 4), rows, TOPK["keep_first"], TOPK["keep_last"])
    plan = SharingPlan(layers=layers, pools=(pool,), scope="kv_head", **TOPK)
    passes.options = Options.read({"share": plan, "prefill": prefill})
    ours = run(traced(model, passes), model.config, "static")
    # A layer without an entry reads the first set for all of its heads.
    expected = oracle(model, "static", "FSSSS", prefill == "sparse", "kv_head", rows=rows | {4: (0, 0)})
    assert largest_difference(expected, ours) < TOLERANCE
    assert [p.schedule for p in passes.plans if p.pools] == ["FSSSS"] * (2 if prefill == "sparse" else 1)
    straight = oracle(model, "static", "FSSSS", prefill == "sparse", "kv_head")
    assert largest_difference(straight, ours) > TOLERANCE


def test_more_tokens_than_keys_is_dense(passes: Any, traced: Any) -> None:
    passes.options = Options.read({"topk": LENGTH, "share": 2, "prefill": "sparse"})
    model = llama()
    ours = run(traced(model, passes), model.config, "static")
    assert largest_difference(run(model, model.config, "static"), ours) < TOLERANCE
    assert all("48 keys, and 48 would be selected" in reason for reason in passes.reasons)
    assert not any(plan.pools for plan in passes.plans)


def test_while_tokens_are_fewer_than_selected_it_is_exact(passes: Any, traced: Any) -> None:
    passes.options = Options.read({"topk": LENGTH - 1, "share": 2, "prefill": "sparse"})
    model = llama()
    ours = run(traced(model, passes), model.config, "static")
    assert largest_difference(run(model, model.config, "static"), ours) < TOLERANCE
    assert all(plan.pools for plan in passes.plans)


def test_prompts_stay_dense_and_say_so(passes: Any, traced: Any) -> None:
    passes.options = Options.read({**TOPK, "share": 2})
    model = llama()
    run(traced(model, passes), model.config, "none")
    assert passes.reasons == ["a prompt: stays dense"] * 2


@pytest.mark.slow
def test_window_layers_are_not_counted(passes: Any, traced: Any) -> None:
    passes.options = Options.read({**TOPK, "share": "FS", "prefill": "sparse"})
    model = tiny("gemma3_text", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    run(traced(model, passes), model.config, "static")
    for plan in passes.plans:
        assert plan.schedule == "FS"
        assert [site.action for site in plan.sites] == ["attention", "attention", "attention", "sparse"]


@pytest.mark.usefixtures("without_inductor")
def test_the_option_works_through_torch_compile() -> None:
    model = llama()
    ids = torch.randint(1, 60, (1, PROMPT))
    options = {**TOPK, "share": 4, "prefill": "sparse"}
    with torch.no_grad():
        got = torch.compile(model, backend="clsa", options=options)(input_ids=ids, use_cache=False).logits
        dense = model(input_ids=ids, use_cache=False).logits
    assert counters["clsa"]["sparse_attention"] == 3
    assert got.shape == dense.shape
    assert 1e-4 < (got - dense).abs().max() < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0}, "topk"),
        ({"topk": 4097}, "1 to 4096"),
        ({"topk": 8.0}, "topk"),
        ({"topk": 64, "share": "SFF"}, "before the first F"),
        ({"topk": 64, "share": "RFF"}, "before the first F"),
        ({"topk": 64, "share": "FSF", "pool": 128}, "'pool' needs an R in 'share'"),
        ({"topk": 64, "share": "FRS", "pool": 5000}, "2 to 4096"),
        ({"topk": 64, "scope": "head"}, "'layer' or 'kv_head'"),
        ({"topk": 64, "prefill": True}, "'dense' or 'sparse'"),
        ({"topk": 64, "keep_last": -1}, "a number from 0"),
        ({"topk": 64, "dense_below": 0.5}, "a number from 0"),
        ({"dense_below": 100}, "'dense_below' is for dense layers, and needs 'topk'"),
        ({"topk": 16}, "keep_first=4 and keep_last=32 are more tokens than topk=16"),
        ({"topk": 64, "dense_layers": 2, "share": "FS"}, "contradict"),
        ({"keep_first": 4}, "'keep_first' is for dense layers, and needs 'topk'"),
        ({"prefill": "sparse"}, "needs 'topk'"),
    ],
)
def test_options_that_cannot_be_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        Options.read(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "FSS"}, "'FSS' is for 3 layers; this graph has 5 dense layers that can share"),
        ({"share": "FSSSSS"}, "is for 6 layers; this graph has 5 dense layers"),
        ({"share": "FRSSS", "pool": 8}, "a pool of 8 tokens leaves nothing to choose for topk=8"),
    ],
)
def test_schedules_that_do_not_fit_are_errors(options: dict[str, Any], message: str) -> None:
    ids = torch.ones(1, 16, dtype=torch.long)
    with pytest.raises((OptionError, BackendCompilerFailed), match=message):
        clsa_compile.inspect(llama(), input_ids=ids, use_cache=False, options={**TOPK, **options})


@pytest.mark.parametrize("length", [16, 8])
def test_models_that_select_by_themselves_keep_their_number(length: int) -> None:
    """Also where they have no more tokens than they select, and attend to all of them."""
    ids = torch.ones(1, length, dtype=torch.long)
    with pytest.raises((OptionError, BackendCompilerFailed), match="this model selects tokens by itself"):
        clsa_compile.inspect(tiny("glm_moe_dsa"), input_ids=ids, use_cache=False, options=TOPK)


def test_a_model_without_attention_is_told() -> None:
    model = torch.compile(nn.Linear(4, 4), backend="clsa", options=TOPK)
    with torch.no_grad(), pytest.warns(ClsaWarning, match="topk=8 changes nothing"):
        model(torch.ones(2, 4))


class Broken(nn.Module):
    """Two attentions, and a graph of its own after them."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        torch._dynamo.graph_break()
        return x + 1


@pytest.mark.usefixtures("without_inductor")
def test_what_a_graph_break_cut_off_is_no_error() -> None:
    options = {"topk": 4, "keep_first": 1, "keep_last": 1, "share": 2, "prefill": "sparse", "strict": True}
    model = torch.compile(Broken(), backend="clsa", options=options)
    with (
        torch.no_grad(),
        pytest.warns(ClsaWarning, match="topk=4 changes nothing in a graph: it holds no att"),
    ):
        model(torch.randn(1, 2, 20, 16))
    assert counters["clsa"]["sparse_attention"] == 1


class Others(nn.Module):
    """Two attentions with different masks."""

    def forward(self, x: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        return attend(attend(x, x, x, is_causal=True), x, x)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("strict", [False, True])
def test_sharing_that_is_refused_is_said(strict: bool) -> None:
    options = {"topk": 4, "keep_first": 1, "keep_last": 1, "share": 2, "prefill": "sparse", "strict": strict}
    model = torch.compile(Others(), backend="clsa", options=options)
    message = "1 of 2 attentions do not share as they were asked to: layer 1: stays dense, for its tokens are"
    with torch.no_grad():
        if strict:
            with pytest.raises((StrictError, BackendCompilerFailed), match=message):
                model(torch.randn(1, 2, 20, 16))
        else:
            with pytest.warns(ClsaWarning, match=message):
                model(torch.randn(1, 2, 20, 16))


def test_the_report_says_who_attends_to_whose_tokens() -> None:
    ids = torch.ones(1, PROMPT, dtype=torch.long)
    options = {**TOPK, "share": 4, "prefill": "sparse"}
    text = str(clsa_compile.inspect(llama(), input_ids=ids, use_cache=False, options=options))
    assert "schedule FSSSF: layers 1, 2, 3 attend to 8 tokens of each sequence instead of all" in text
    assert "This changes results" in text
    assert "layers 1, 2, 3 attend to the 8 tokens that layer 0 looked at most" in text
