"""Matching: every attention once, in execution order, with a name that people know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.sites import Reason, Refused
from clsa_compile.passes.families import FAMILIES
from clsa_compile.passes.match import layer_of, match, module_path
from clsa_compile.passes.patterns.pattern import Pattern

Trace = Callable[..., Captured]
sdpa = F.scaled_dot_product_attention


def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 4, 6, 8)


def mixed(q: Tensor) -> tuple[Tensor, ...]:
    one = sdpa(q, q, q)
    weights = (q @ q.mT).softmax(-1)
    two = weights @ q
    three = (q @ q.mT).softmax(-1) @ q
    four = sdpa(q, q, q, dropout_p=0.1)
    return one, two, weights, three, four


def test_sites_and_rejects_are_numbered_in_execution_order(trace: Trace) -> None:
    sites = match(trace(mixed, x()), FAMILIES)
    assert [(s.ordinal, s.family) for s in sites.attention] == [(0, "sdpa"), (2, "eager")]
    assert [(r.ordinal, r.reason) for r in sites.rejects] == [
        (1, Reason.USERS), (3, Reason.DROPOUT),
    ]  # fmt: skip


def test_matching_changes_nothing(trace: Trace) -> None:
    captured = trace(mixed, x())
    before = captured.module.code
    match(captured, FAMILIES)
    captured.module.recompile()
    assert captured.module.code == before


def test_anchors_belong_to_one_family_each() -> None:
    anchors = [a for family in FAMILIES for a in family.anchors]
    assert len(anchors) == len(set(anchors))
    assert {f.family for f in FAMILIES} == {"sdpa", "eager"}


def test_a_pattern_may_say_that_an_anchor_is_no_attention(trace: Trace) -> None:
    pattern = Pattern("none", (torch.ops.aten.scaled_dot_product_attention.default,), lambda c, n: None)
    sites = match(trace(lambda q: sdpa(q, q, q), x()), (pattern,))
    assert (sites.attention, sites.rejects) == ((), ())


def test_a_refusal_becomes_a_reject_that_names_its_node(trace: Trace) -> None:
    def refuse(context: Any, node: Any) -> Any:
        raise Refused(Reason.LAYOUT, "because")

    pattern = Pattern("none", (torch.ops.aten.scaled_dot_product_attention.default,), refuse)
    (reject,) = match(trace(lambda q: sdpa(q, q, q), x()), (pattern,)).rejects
    assert str(reject) == "layout: because"
    assert reject.node == "scaled_dot_product_attention"


@pytest.mark.parametrize(
    ("stack", "path"),
    [
        ("L['self']._modules['model']._modules['layers']._modules['3']._modules['self_attn']",
         "model.layers.3.self_attn"),
        ("L['self'].model.layers[12].attn", "model.layers.12.attn"),
        ("L['model']._modules['layers']._modules['0']", "layers.0"),
        ("L['self']", "scaled_dot_product_attention"),
    ],
)  # fmt: skip
def test_paths_are_those_that_people_know(stack: str, path: str, trace: Trace) -> None:
    captured = trace(lambda q: sdpa(q, q, q), x())
    node = next(n for n in captured.graph.nodes if n.op == "call_function")
    assert module_path(node) == node.name, "without a stack the node's own name"
    node.meta["nn_module_stack"] = {"outer": ("L['self']", object), "inner": (stack, object)}
    assert module_path(node) == path


@pytest.mark.parametrize(
    ("path", "layer"),
    [("model.layers.3.self_attn", 3), ("layers.12", 12), ("h.0.attn", 0), ("attn", 7), ("layer3.attn", 7)],
)
def test_layers_are_the_numbers_of_paths(path: str, layer: int) -> None:
    assert layer_of(path, 7) == layer
