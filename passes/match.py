"""Matches: from each anchor that cannot be missing, back to a site or a reason."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.fx import Node

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.sites import AttentionSite, Reason, Refused, Reject, Sites
from clsa_compile.ir.skips import Skips
from clsa_compile.passes.analyze import Order
from clsa_compile.passes.patterns.indexer import read_indexer
from clsa_compile.passes.patterns.pattern import Context, Pattern, build_site
from clsa_compile.passes.recover import Reader

NO_SKIPS = Skips()


def match(captured: Captured, families: tuple[Pattern, ...], skips: Skips = NO_SKIPS) -> Sites:
    """Returns every attention of a graph: as a site, or as a reject with its reason."""
    order = Order(captured.graph)
    context = Context(order, Reader(order), _left_out if "indexer" in skips else read_indexer)
    by_anchor = {target: family for family in families for target in family.anchors}
    sites: list[AttentionSite] = []
    rejects: list[Reject] = []
    for node in captured.graph.nodes:
        if node.op != "call_function":
            continue
        ordinal = len(sites) + len(rejects)
        hidden = _hidden_attention(node)
        if hidden is not None:
            rejects.append(Reject(ordinal, node.name, module_path(node), Reason.HIGHER_ORDER, hidden))
            continue
        family = by_anchor.get(node.target)
        if family is None:
            continue
        try:
            candidate = family.match(context, node)
            if candidate is None:
                continue
            path = module_path(node)
            _refuse_skipped(skips, family.family, path, layer_of(path, ordinal))
            sites.append(build_site(context, family.family, ordinal, path, candidate))
        except Refused as refusal:
            rejects.append(Reject(ordinal, node.name, module_path(node), refusal.reason, refusal.detail))
    return Sites(tuple(sites), tuple(rejects))


def _refuse_skipped(skips: Skips, family: str, path: str, number: int) -> None:
    name = family if family in skips else skips.layer(path, number)
    if name:
        raise Refused(Reason.SKIPPED, f"the option 'skip' names {name!r}")


def _left_out(*_: Any) -> Any:
    raise Refused(Reason.SKIPPED, "the option 'skip' names 'indexer'")


def _hidden_attention(node: Node) -> str | None:
    """Returns why an attention cannot be seen: it is one higher-order op, or inside of one."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    name = node.target.name()
    if "flex_attention" in name:
        return f"{name} is left to Inductor"
    for source in node.all_input_nodes:
        inner = (
            getattr(node.graph.owning_module, str(source.target), None) if source.op == "get_attr" else None
        )
        if isinstance(inner, torch.fx.GraphModule) and _attends(inner):
            return f"attention inside {name} is left to Inductor"
    return None


def _attends(module: torch.fx.GraphModule) -> bool:
    return any(
        "scaled_dot_product" in str(n.target) or "softmax" in str(n.target) for n in module.graph.nodes
    )


_SOURCE = re.compile(r"\._modules\['([^']+)'\]|\._modules\[\"([^\"]+)\"\]|\['([^']+)'\]|\[(\d+)\]")


def module_path(node: Node) -> str:
    """Returns the module that a node comes from, such as "model.layers.3.self_attn", for people."""
    stack: Any = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = str(list(stack.values())[-1][0])
    path = _SOURCE.sub(lambda m: "." + next(g for g in m.groups() if g is not None), path)
    # What is left of Dynamo's name for the root, such as L['self'] or L['model'], says nothing.
    path = re.sub(r"^L(\['\w+'\]|\.\w+)\.?", "", path)
    return path or node.name


def layer_of(path: str, ordinal: int) -> int:
    """Returns the layer number in a module path, or the ordinal where there is none."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(numbers[0]) if numbers else ordinal
