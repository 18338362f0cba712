"""`share`: indexers that do not run, against Hugging Face's own schedule with the same weights."""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from transformers import StaticCache

import clsa_compile
from clsa_compile.backend import ClsaWarning
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.stages import Stages
from clsa_compile.config import Options
from clsa_compile.errors import OptionError, PlanError, StrictError
from clsa_compile.ir.routing import Layer, Pool
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.testing import Transcript, cache_difference, generate_steps, largest_difference, tiny

LAYERS, PROMPT, STEPS, LENGTH, TOLERANCE = 5, 12, 4, 48, 1e-4
DENSE_MLP = {"num_hidden_layers": LAYERS, "mlp_layer_types": ["dense"] * LAYERS}


@functools.cache
def glm() -> nn.Module:
    return made()


def made(**changes: Any) -> nn.Module:
    return tiny("glm_moe_dsa", **DENSE_MLP, **changes)


def run(model: Any, config: Any, cache: str) -> Transcript:
    return generate_steps(
        model, config, cache=cache, steps=STEPS, prompt=PROMPT, padding=3, batch=2, length=LENGTH
    )


def with_schedule(schedule: str) -> nn.Module:
    """The model as Hugging Face configures that schedule, with the weights of `glm()`."""
    model = made(indexer_types=[{"F": "full", "S": "shared"}[role] for role in schedule])
    missing, unused = model.load_state_dict(glm().state_dict(), strict=False)
    assert not missing
    assert all(".indexer." in name for name in unused)
    return model


# Every schedule over a static cache; what a cache is makes no difference to who shares.
@pytest.mark.parametrize(
    ("share", "schedule", "cache"),
    [
        (2, "FSFSF", "static"),
        (4, "FSSSF", "static"),
        ("FFSSS", "FFSSS", "static"),
        (1, "FFFFF", "static"),
        pytest.param(2, "FSFSF", "dynamic", marks=pytest.mark.slow),
        pytest.param("FFSSS", "FFSSS", "dynamic", marks=pytest.mark.slow),
        pytest.param(4, "FSSSF", "none", marks=pytest.mark.slow),
    ],
)
def test_sharing_is_what_the_same_schedule_is_in_the_model(
    share: int | str, schedule: str, cache: str, passes: Any, traced: Any
) -> None:
    passes.options = Options.read({"share": share})
    model = glm()
    expected = run(with_schedule(schedule), model.config, cache)
    ours = run(traced(model, passes), model.config, cache)
    assert largest_difference(expected, ours) < TOLERANCE
    assert passes.plans
    for plan in passes.plans:
        assert plan.schedule == schedule
        assert sum(g.kind == "index" for g in plan.groups) == schedule.count("F")
        assert len(plan.shares) == schedule.count("S")
    for targets in passes.rewritten:
        assert targets[torch.ops.clsa.index_topk.default] == schedule.count("F")
        assert targets[torch.ops.clsa.sparse_attention.default] == LAYERS
        assert targets[torch.ops.aten.topk.default] == 0


class Lattice(TorchFunctionMode):
    """Stands in for the selections of a schedule with R: in single steps, among the last F's best.

    Hugging Face runs the indexers of F and R layers in order, and ranks their scores [B, S, T] by `topk`.
    """

    def __init__(self, schedule: str, pool: int) -> None:
        super().__init__()
        self._roles = itertools.cycle(schedule.replace("S", ""))
        self._pool = pool

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.topk, torch.Tensor.topk):
            return func(*args, **(kwargs or {}))
        scores, *rest = args
        role = next(self._roles)
        if scores.shape[-2] == 1 and role == "F":
            self._offered = torch.zeros_like(scores).scatter(-1, scores.topk(self._pool).indices, 1).bool()
        if scores.shape[-2] == 1 and role == "R":
            scores = scores.masked_fill(~self._offered, -torch.inf)
        return func(scores, *rest, **(kwargs or {}))


@pytest.mark.parametrize(
    ("schedule", "pool", "cache"),
    [
        ("FSRSS", 10, "static"),
        ("FRSRF", 9, "static"),
        ("FRSFR", 12, "static"),
        pytest.param("FRSRF", 9, "dynamic", marks=pytest.mark.slow),
    ],
)
def test_indexers_select_again_among_what_was_offered(
    schedule: str, pool: int, cache: str, passes: Any, traced: Any
) -> None:
    passes.options = Options.read({"share": schedule, "pool": pool})
    model = glm()
    twin = with_schedule(schedule.replace("R", "F"))
    ours = run(traced(model, passes), model.config, cache)
    all_keys = run(twin, model.config, cache)
    with Lattice(schedule, pool):
        expected = run(twin, model.config, cache)
    assert largest_difference(expected, ours) < TOLERANCE
    assert largest_difference(expected, all_keys) > TOLERANCE
    steps = [plan for plan in passes.plans if "R" in plan.schedule]
    assert steps
    for plan in steps:
        assert plan.schedule == schedule
        chosen = [g for g in plan.groups if g.among is not None]
        assert [g.pool for g in chosen] == [pool] * schedule.count("R")
    assert "a prompt: its indexer reads all keys" in passes.reasons


def test_the_report_says_who_selects_among_what() -> None:
    model = glm()
    cache = StaticCache(model.config, max_cache_len=LENGTH)
    ids = torch.ones(1, 1, dtype=torch.long)
    options = {"share": "FSRSS", "pool": 20}
    text = str(clsa_compile.inspect(model, input_ids=ids, past_key_values=cache, options=options))
    assert "schedule FSRSS: layers 1, 3, 4 do not run their indexers, layers 2 run them over offered" in text
    assert "layers 2, 3, 4 share the index of layer 2, selected from the 20 best tokens of layer 0" in text
    assert "This changes results" in text


def test_a_pool_that_leaves_nothing_to_choose_is_an_error() -> None:
    ids = torch.ones(1, 16, dtype=torch.long)
    with pytest.raises((OptionError, BackendCompilerFailed), match="leaves nothing to choose for topk="):
        clsa_compile.inspect(glm(), input_ids=ids, use_cache=False, options={"share": "FRSSS", "pool": 2})


@pytest.mark.slow
def test_caches_stay_what_eager_makes_them(passes: Any, traced: Any) -> None:
    """The first layers of a run are exact; the index keys of all are written, for an eager step may come."""
    passes.options = Options.read({"share": "FSSSS"})
    model = glm()
    eager = run(model, model.config, "static")
    ours = run(traced(model, passes), model.config, "static")
    assert len(ours.cache.layers) == LAYERS
    for mine, theirs in zip(ours.cache.layers, eager.cache.layers, strict=True):
        for (name, got), (_, want) in zip(_tensors(mine), _tensors(theirs), strict=True):
            # Later layers see other hidden states; all of them are filled in the same places.
            assert torch.equal(got != 0, want != 0), name
    assert cache_difference(eager.cache, ours.cache, torch.zeros(2, LENGTH, dtype=torch.bool)) == 0


def _tensors(layer: Any) -> list[tuple[str, torch.Tensor]]:
    found = sorted(vars(layer).items())
    return [(name, x) for name, x in found if isinstance(x, torch.Tensor) and x.dim() > 2]


@pytest.mark.slow
def test_reclaimed_key_caches_are_not_written(passes: Any, traced: Any) -> None:
    passes.options = Options.read({"share": "FSSFS", "reclaim": True})
    model = glm()
    expected = run(with_schedule("FSSFS"), model.config, "static")
    ours = run(traced(model, passes), model.config, "static")
    assert largest_difference(expected, ours) < TOLERANCE
    for plan, targets in zip(passes.plans, passes.rewritten, strict=True):
        assert plan.invalid == (1, 2, 4)
        # K and V of all five, index keys of two.
        assert targets[torch.ops.aten.index_copy_.default] == 2 * LAYERS + 2
    empty = [bool((layer.indexer_keys == 0).all()) for layer in ours.cache.layers]
    assert empty == [False, True, True, False, True]
    for mine, theirs in zip(ours.cache.layers, expected.cache.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=TOLERANCE, rtol=TOLERANCE)


@functools.cache
def deepseek() -> nn.Module:
    return tiny("deepseek_v32", num_hidden_layers=LAYERS, first_k_dense_replace=LAYERS)


def handing_on(schedule: str) -> nn.Module:
    """The model with layers S that attend to what the indexer of the last F selected.

    deepseek_v32 has no schedule in Hugging Face: every indexer runs, and its result is dropped here.
    """
    model, last = copy.deepcopy(deepseek()), []

    def selected(module: nn.Module, given: Any, found: torch.Tensor, role: str) -> torch.Tensor:
        if role == "F":
            last[:] = [found]
        return last[0]

    for layer, role in zip(model.model.layers, schedule, strict=True):
        layer.self_attn.indexer.register_forward_hook(functools.partial(selected, role=role))
    return model


@pytest.mark.parametrize("reclaim", [pytest.param(False, marks=pytest.mark.slow), True])
def test_deepseek_shares_though_it_has_no_schedule_of_its_own(
    reclaim: bool, passes: Any, traced: Any
) -> None:
    passes.options = Options.read({"share": 4, "reclaim": reclaim})
    model = deepseek()
    expected = run(handing_on("FSSSF"), model.config, "static")
    ours = run(traced(model, passes), model.config, "static")
    assert largest_difference(expected, ours) < TOLERANCE
    assert largest_difference(run(model, model.config, "static"), ours) > TOLERANCE
    assert len(passes.plans) == 2
    for plan, targets in zip(passes.plans, passes.rewritten, strict=True):
        assert plan.schedule == "FSSSF"
        assert plan.invalid == ((1, 2, 3) if reclaim else ())
        assert targets[torch.ops.clsa.index_topk.default] == 2
        assert targets[torch.ops.clsa.sparse_attention.default] == LAYERS
        assert targets[torch.ops.aten.topk.default] == 0
        # K and V of all five, and index keys.
        assert targets[torch.ops.aten.index_copy_.default] == 2 * LAYERS + (2 if reclaim else LAYERS)
    empty = [bool((layer.indexer_keys == 0).all()) for layer in ours.cache.layers]
    assert empty == [False, reclaim, reclaim, reclaim, False]


@pytest.mark.slow
def test_growing_key_caches_stay(passes: Any, traced: Any) -> None:
    passes.options = Options.read({"share": "FSSSS", "reclaim": True})
    model = glm()
    ours = run(traced(model, passes), model.config, "dynamic")
    assert all(plan.invalid == () for plan in passes.plans)
    assert largest_difference(run(with_schedule("FSSSS"), model.config, "dynamic"), ours) < TOLERANCE


def test_the_report_names_what_is_no_longer_written() -> None:
    model = glm()
    cache = StaticCache(model.config, max_cache_len=LENGTH)
    ids = torch.ones(1, 16, dtype=torch.long)
    options = {"share": "FSSSS", "reclaim": True}
    report = clsa_compile.inspect(model, input_ids=ids, past_key_values=cache, options=options)
    assert "the index keys of layers 1, 2, 3, 4 are not written" in str(report)


def test_a_schedule_of_the_model_is_kept(passes: Any, traced: Any) -> None:
    """Layers 1 and 4 have no indexers; the others follow `share`."""
    passes.options = Options.read({"share": "FSFSS"})
    model = with_schedule("FSFFS")
    expected = run(with_schedule("FSFSS"), model.config, "static")
    ours = run(traced(model, passes), model.config, "static")
    assert largest_difference(expected, ours) < TOLERANCE
    assert {plan.schedule for plan in passes.plans} == {"FSFSS"}
    assert {len(plan.shares) for plan in passes.plans} == {1}


@pytest.mark.usefixtures("without_inductor")
def test_the_option_works_through_torch_compile() -> None:
    model = glm()
    ids = torch.randint(1, 60, (1, 16))
    expected = with_schedule("FSSSF")(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        got = torch.compile(model, backend="clsa", options={"share": 4})(
            input_ids=ids, use_cache=False
        ).logits
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert counters["clsa"]["index_topk"] == 2
    assert counters["clsa"]["sparse_attention"] == LAYERS


@pytest.mark.parametrize("share", ["FSS", "FFFFFF"])
def test_a_schedule_of_another_length_is_an_error(share: str) -> None:
    model = torch.compile(glm(), backend="clsa", options={"share": share})
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=f"is for {len(share)} layers; this graph has 5") as error,
    ):
        model(input_ids=torch.ones(1, 16, dtype=torch.long), use_cache=False)
    assert isinstance(getattr(error.value, "inner_exception", error.value), OptionError)


def test_inspecting_says_what_compiling_would() -> None:
    ids = torch.ones(1, 16, dtype=torch.long)
    with pytest.raises((OptionError, BackendCompilerFailed), match="is for 3 layers; this graph has 5"):
        clsa_compile.inspect(glm(), input_ids=ids, use_cache=False, options={"share": "FSS"})
    with pytest.warns(ClsaWarning, match="share=4 changes nothing"):
        clsa_compile.inspect(tiny("llama"), input_ids=ids, use_cache=False, options={"share": 4})


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("strict", [False, True])
def test_a_model_without_indexers_has_nothing_to_share(strict: bool) -> None:
    options = {"share": 4, "strict": strict}
    model = torch.compile(tiny("llama"), backend="clsa", options=options)
    ids = torch.ones(1, 8, dtype=torch.long)
    message = "share=4 changes nothing: none of the 2 attentions has an indexer"
    with torch.no_grad():
        if strict:
            with pytest.raises((StrictError, BackendCompilerFailed), match=message):
                model(input_ids=ids, use_cache=False)
        else:
            with pytest.warns(ClsaWarning, match=message):
                model(input_ids=ids, use_cache=False)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_a_prompt_of_no_more_tokens_than_are_selected_is_no_error(attention: str) -> None:
    """Nothing is left undone: every token is selected, which is dense and exact. The same graph at full size
    must still be understood."""
    model = tiny("glm_moe_dsa", attention)
    options = {"share": 2, "strict": True}
    report = clsa_compile.inspect(
        model, input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False, options=options
    )
    assert [(site.kind, site.action, site.takes_all) for site in report.sites] == [
        ("topk", "attention", True)
    ] * 2
    assert {site.reason for site in report.sites} == {"every key is selected: the same as dense"}
    longer = torch.ones(1, 9, dtype=torch.long)
    report = clsa_compile.inspect(model, input_ids=longer, use_cache=False, options=options)
    assert [(site.action, site.takes_all) for site in report.sites] == [("sparse", False)] * 2


def test_selections_that_are_not_understood_are_an_error_with_strict() -> None:
    """Even where no more tokens are there than are selected: the indices are needed elsewhere too."""
    model = tiny("glm_moe_dsa")

    def hands_on(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model.model.embed_tokens(ids)  # type: ignore[union-attr, operator]
        positions = torch.arange(ids.shape[1])[None]
        angles = model.model.rotary_emb(hidden, position_ids=positions)  # type: ignore[union-attr, operator]
        mask = (positions.mT >= positions)[None, None]
        out: tuple[torch.Tensor, torch.Tensor] = model.model.layers[0](  # type: ignore[union-attr, index]
            hidden, attention_mask=mask, position_embeddings=angles, position_ids=positions
        )
        return out

    ids = torch.ones(1, 16, dtype=torch.long)
    options = {"share": 2, "strict": True}
    with pytest.raises((StrictError, BackendCompilerFailed), match="share=2 changes nothing"):
        clsa_compile.inspect(hands_on, ids, options=options)


@pytest.mark.slow
def test_a_plan_for_another_number_of_tokens_is_refused() -> None:
    """Layers say nothing of how many tokens their indexers select."""
    ids = torch.ones(1, 16, dtype=torch.long)
    layers = inspected_layers(glm(), ids)
    pools = (Pool(0, 9, {}, (1, 2, 3, 4), {}, 0, 0),)
    plan = SharingPlan(9, layers, pools, 0, 0, kind="index")
    with pytest.raises((PlanError, BackendCompilerFailed), match="select 9 tokens, this one's 8"):
        clsa_compile.inspect(glm(), input_ids=ids, use_cache=False, options={"share": plan})
    fitting = replace(plan, topk=8, pools=(replace(pools[0], topk=8),))
    report = clsa_compile.inspect(glm(), input_ids=ids, use_cache=False, options={"share": fitting})
    assert {p.schedule for p in report.plans} == {"FSSSS"}


def inspected_layers(model: nn.Module, ids: torch.Tensor) -> tuple[Layer, ...]:
    return Model(model, ids, Stages(None)).layers


def test_the_report_says_what_is_shared_and_that_results_change() -> None:
    ids = torch.ones(1, 16, dtype=torch.long)
    report = clsa_compile.inspect(glm(), input_ids=ids, use_cache=False, options={"share": 4})
    assert report.counts()["index_topk"] == 2
    text = str(report)
    assert "schedule FSSSF: layers 1, 2, 3 do not run their indexers. This changes results" in text
    assert "layers 0, 1, 2, 3 share the index of layer 0" in text
    plain = clsa_compile.inspect(glm(), input_ids=ids, use_cache=False)
    assert "schedule" not in str(plain)
    assert {plan.schedule for plan in plain.plans} == {"FFFFF"}
