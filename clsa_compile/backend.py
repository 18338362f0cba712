"""The backend: `torch.compile(model, backend="clsa")`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.compiler.config as compiler_config
from torch._dynamo.utils import counters
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from clsa_compile.capture.dynamo import (
    capture,
    higher_order,
    name_buffers,
    returns_growing_cache,
    subclass_input,
    uses_autocast,
)
from clsa_compile.config import Options
from clsa_compile.dispatch import kernels, torch_kernels
from clsa_compile.errors import (
    ClsaError,
    ClsaWarning,
    MissingTritonError,
    OptionError,
    PlanError,
    StrictError,
)
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.plan import Plan, SitePlan
from clsa_compile.ir.routing import Request, Sharing
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.ir.sites import Reason
from clsa_compile.ir.variants import Variant
from clsa_compile.pace import roomy, uncollected
from clsa_compile.passes.pipeline import Decision, Observer, carry_out, decide, missing, uuid
from clsa_compile.passes.route import REFUSED
from clsa_compile.passes.savings import parameter, stripped
from clsa_compile.policies import planned
from clsa_compile.policies.dense import Dense, route
from clsa_compile.policies.schedule import shares
from clsa_compile.saved import saveable
from clsa_compile.watch import Stopped, Watch

Compiled = Callable[..., Any]


@roomy
def clsa(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles one Dynamo graph: attention through clsa, everything else through Inductor.

    Raises OptionError for options that cannot be, and StrictError with `strict` where something would
    be left as it was. Whatever fails otherwise is compiled by Inductor as it came, and a warning says so.
    """
    chosen = Options.read(options, mode)
    watch = Watch.open(chosen, example_inputs)
    alone = partial(_inductor_alone, gm, example_inputs, watch)
    left = _left_whole(gm, example_inputs)
    if left is not None:
        return alone(*left)
    _check_weights(gm, example_inputs, chosen)
    try:
        module = transform(gm, chosen, watch)
    except (StrictError, OptionError):
        raise
    except ClsaError as error:
        if chosen.strict:
            raise
        return alone(_why(gm, error), str(error), error)
    try:
        compiled = _inductor(module, example_inputs, chosen)
    except Exception as error:
        if chosen.strict or module is gm:
            raise
        reason = f"Inductor failed on the rewritten graph: {type(error).__name__}: {error}".partition("\n")[0]
        return alone(Reason.INDUCTOR, reason, error)
    watch.done()
    return compiled


@roomy
def examine(
    gm: GraphModule, example_inputs: Sequence[Any], options: Options
) -> tuple[Captured, Decision] | str:
    """Returns one Dynamo graph and what would be done with it, or why it would be left alone."""
    left = _left_whole(gm, example_inputs)
    if left is not None:
        return f"{left[0]}: {left[1]}"
    _check_weights(gm, example_inputs, options)
    try:
        captured = capture(gm, "replay" not in options.skips)
        decision = decided(captured, options)
    except OptionError:
        raise
    except ClsaError as error:
        if options.strict:
            raise
        return f"{_why(gm, error)}: {error}"
    _report(decision.plan, options)
    return captured, decision


@uncollected()
def transform(gm: GraphModule, options: Options, watch: Watch | None = None) -> GraphModule:
    """Returns a Dynamo graph with its attentions rewritten and lowered; the original is not touched.

    Where the options say so, it stops after an earlier stage and returns the graph as it is then.
    """
    watch = watch or Watch(options)
    captured = capture(gm, "replay" not in options.skips)
    try:
        return _transformed(gm, captured, options, watch)
    except Stopped as stage:
        counters["clsa"]["stopped"] += 1
        watch.stopped(stage)
        _warn_once(f"stopped after {stage}", f"clsa stopped after the stage {stage} (CLSA_STOP_AFTER)")
        name_buffers(captured.module)
        return captured.module


def _transformed(gm: GraphModule, captured: Captured, options: Options, watch: Watch) -> GraphModule:
    captured, decision = carried_out(captured, options, watch, may_wait=True)
    if not _does_something(decision.plan):
        return gm  # nothing to gain from another dialect
    name_buffers(captured.module)
    return captured.module


def carried_out(
    captured: Captured,
    options: Options,
    watch: Watch,
    observe: Observer | None = None,
    look: Callable[[Decision], None] | None = None,
    may_wait: bool = False,
) -> tuple[Captured, Decision]:
    """Takes a graph through the whole pipeline; returns it lowered, or as it was where nothing is to be done.

    `observe` is told of each stage besides `watch`, and `look` of the decision, before the graph changes.
    This is what both ways of compiling do, `torch.compile` and `export`. `may_wait` is as in `lower`.
    """

    def reached(stage: str, graph: Captured) -> None:
        watch.stage(stage, graph)
        if observe is not None:
            observe(stage, graph)

    reached("captured", captured)
    decision = decided(captured, options, reached)
    watch.decision(captured, decision)
    if look is not None:
        look(decision)
    _count(decision.plan)
    _report(decision.plan, options)
    if _does_something(decision.plan):
        variants = variants_for(captured, options)
        captured, choices = carry_out(captured, decision, variants, _wrap_triton, reached, may_wait)
        watch.choices(choices)
        _count_choices(decision.plan)
    watch.transformed(decision.plan)
    return captured, decision


def _does_something(plan: Plan) -> bool:
    return any(entry.action != "left" for entry in plan.sites)


def decided(captured: Captured, options: Options, observe: Observer | None = None) -> Decision:
    """Returns what the options make of a graph. Raises OptionError where they do not fit it."""
    request = requested(options)
    shared = sharing(options) if request is None else None
    decision = decide(
        captured, shared, reclaims=options.reclaim, request=request, skips=options.skips, observe=observe
    )
    for name in missing(decision):
        _warn_once(name, f"CLSA_SKIP names {name!r}, and no layer of this graph bears that name")
    saved = decision.plan.savings
    if needed := sorted(set(stripped(captured.graph)) - set(saved.idle if saved else ())):
        raise OptionError(
            f"{len(needed)} weights that this graph reads were freed by plan.strip(model), as {needed[0]}: "
            "compile with the options of that plan, or load the weights again"
        )
    _check_number(decision, options)
    if request is not None and any(site.has_selection for site in decision.sites.attention):
        raise OptionError(
            f"topk={options.topk} is for dense layers, and this model selects tokens by itself: "
            "its own number stands; leave 'topk' out"
        )
    return decision


def _check_number(decision: Decision, options: Options) -> None:
    """Raises PlanError for a plan of layers with indexers that select another number of tokens."""
    plan = options.share
    if not isinstance(plan, SharingPlan) or plan.kind != "index":
        return
    others = {s.indexer.topk for s in decision.sites.attention if s.indexer is not None} - {plan.topk}
    if others:
        raise PlanError(
            f"the plan is for another model: its indexers select {plan.topk} tokens, this one's "
            f"{', '.join(map(str, sorted(others)))}; search for a plan for it"
        )


def requested(options: Options) -> Request | None:
    """Returns what the options ask of dense layers."""
    if options.topk is None:
        return None
    if isinstance(options.share, SharingPlan):
        plan = options.share
        return Request(planned.route(plan), options.prefill == "sparse", options.dense_below, plan.tensors)
    dense = Dense(
        options.topk,
        options.share,
        options.scope,
        options.dense_layers,
        options.keep_first,
        options.keep_last,
        options.pool,
    )
    return Request(route(dense), options.prefill == "sparse", options.dense_below)


def sharing(options: Options) -> Sharing | None:
    """Returns which layer reads which one's index, as a function of what the model does."""
    if options.share == "off":
        return None
    if isinstance(options.share, SharingPlan):
        return partial(planned.shares, options.share) if options.share.kind == "index" else None
    return partial(shares, options.share, options.pool)


def variants_for(captured: Captured, options: Options) -> tuple[Variant, ...]:
    """Returns the variants for a graph's device: torch's own on a CPU. Raises MissingTritonError."""
    devices = {
        node.meta["val"].device.type
        for node in captured.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    if "cuda" not in devices:
        return torch_kernels()
    found = kernels()
    if not options.autotune:
        return found
    from clsa_compile.kernels.autotune import tuned

    return tuned(found)


def _wrap_triton(kernel: Any) -> Any:
    return torch.library.wrap_triton(kernel)


def _left_whole(gm: GraphModule, example_inputs: Sequence[Any]) -> tuple[Reason, str] | None:
    """Returns why a graph must be left alone as a whole, or None."""
    needs_gradients = torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs
    )
    if needs_gradients:
        return (
            Reason.TRAINING,
            "it needs gradients; run it under torch.no_grad() to have it compiled by clsa",
        )
    if uses_autocast(gm):
        return (
            Reason.AUTOCAST,
            "autocast is on; cast the model (model.to(torch.bfloat16)) to have it compiled by clsa",
        )
    name = higher_order(gm)
    if name is not None and "flex_attention" in name:
        return Reason.HIGHER_ORDER, f"{name} is Inductor's own"
    subclass = subclass_input(gm)
    if subclass is not None:
        return Reason.SUBCLASS, f"the input {subclass}, a tensor subclass"
    return None


def _check_weights(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> None:
    """Raises PlanError where a graph reads other weights than those of the plan's model."""
    if isinstance(options.share, SharingPlan):
        inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
        named = ((parameter(node), x) for node, x in zip(inputs, example_inputs, strict=True))
        options.share.check_weights((name, x) for name, x in named if name)


def _why(gm: GraphModule, error: ClsaError) -> Reason:
    """Returns what a graph that could not be transformed is left for."""
    if isinstance(error, MissingTritonError):
        return Reason.TRITON
    return Reason.CAPTURE if higher_order(gm) is None else Reason.HIGHER_ORDER


def _inductor_alone(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    watch: Watch,
    reason: Reason,
    detail: str,
    error: Exception | None = None,
) -> Compiled:
    counters["clsa"][f"left_graphs_{reason}"] += 1
    message = f"clsa left a graph to Inductor ({reason}): {detail}"
    watch.left(message, error)
    _complain(reason, message, watch.options)
    compiled = _inductor(gm, example_inputs, watch.options)
    watch.done()
    return compiled


def _complain(key: str, message: str, options: Options) -> None:
    """Warns of something once; with `strict` it is an error."""
    if options.strict:
        raise StrictError(message)
    _warn_once(key, message)


@cache
def _warn_once(key: str, message: str) -> None:
    warnings.warn(message, ClsaWarning, stacklevel=2)


def _inductor(gm: GraphModule, example_inputs: Sequence[Any], options: Options) -> Compiled:
    patches = inductor_settings(options)
    if _would_overwrite(gm, patches, options):
        patches["triton.cudagraphs"] = False
        _warn_once(
            "growing",
            f"mode={options.mode!r}: graphs that return a growing cache run without CUDA graphs, whose next "
            "run would overwrite the cache (pytorch/pytorch#175557); a StaticCache keeps them",
        )
    # Part of the keys of both caches: another pipeline or other options never find this graph.
    tag = f"clsa:{uuid()}:{options.identity()}"
    with compiler_config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        compiled: Any = compile_fx(gm, example_inputs, config_patches=patches or None)
    return saveable(compiled)


def _would_overwrite(gm: GraphModule, patches: Mapping[str, Any], options: Options) -> bool:
    """Tells whether a CUDA graph, not asked for by its own name, would own a cache that outlives its run."""
    by_mode = patches.get("triton.cudagraphs") and "triton.cudagraphs" not in options.inductor
    return bool(by_mode) and returns_growing_cache(gm)


def inductor_settings(options: Options) -> dict[str, Any]:
    """Returns what of Inductor's configuration differs from its defaults."""
    settings: dict[str, Any] = dict(list_mode_options(options.mode)) if options.mode != "default" else {}
    return settings | dict(options.inductor)


def _report(plan: Plan, options: Options) -> None:
    """Says which attentions are left, and when there is nothing to share."""
    left = [entry for entry in plan.sites if entry.action == "left" and not _is_skipped(entry)]
    if left:
        lines = "; ".join(f"layer {e.layer} ({e.path}): {e.reason}" for e in left[:4])
        found = f"{len(left)} of {len(plan.sites)} attentions"
        _complain(lines, f"clsa left {found} as they were: {lines}", options)
    for refused in REFUSED:
        those = [entry for entry in plan.sites if refused in entry.reason]
        if those:
            found = f"{len(those)} of {len(plan.sites)} attentions do not share as they were asked to"
            _complain(refused, f"{found}: layer {those[0].layer}: {those[0].reason}", options)
    if plan.schedule or (options.topk is None and options.share == "off"):
        return
    asked = f"topk={options.topk}" if options.topk is not None else f"share={options.share!r}"
    if not plan.sites:
        nothing = "it holds no attention: it is what a graph break cut off, or the model has none"
        _warn_once("nothing", f"{asked} changes nothing in a graph: {nothing}")
    elif options.topk is not None:
        nothing = f"none of the {len(plan.sites)} attentions is dense over all tokens"
        _complain("topk", f"{asked} changes nothing: {nothing}", options)
    elif not _takes_all(plan):
        nothing = f"none of the {len(plan.sites)} attentions has an indexer that is understood"
        _complain("share", f"{asked} changes nothing: {nothing}", options)


def _is_skipped(site: SitePlan) -> bool:
    return site.reason.startswith(f"{Reason.SKIPPED}:")


def _takes_all(plan: Plan) -> bool:
    """Tells whether a model selects tokens and this graph has no more than it selects: dense and exact."""
    return any(entry.takes_all for entry in plan.sites)


def _count(plan: Plan) -> None:
    counters["clsa"]["sites"] += len(plan.sites)
    counters["clsa"]["left"] += plan.count("left")


def _count_choices(plan: Plan) -> None:
    counters["clsa"]["sparse_attention"] += plan.count("sparse")
    counters["clsa"]["attention"] += plan.count("attention")
    counters["clsa"]["index_topk"] += sum(group.runs_index for group in plan.groups)
