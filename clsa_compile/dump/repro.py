"""repro.py: one graph as a script that runs alone, and compares what is compiled with eager."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from clsa_compile.config import Options
from clsa_compile.dump.code import code_of
from clsa_compile.dump.inputs import recipe
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.plan import Plan
from clsa_compile.ir.sharing import SharingPlan

__all__ = ["repro"]

_TEXT = '''\
"""Compares one graph in eager mode with what is compiled: python repro.py [--backend clsa] [--limit 1e-3].

Inputs and weights are random with a fixed seed; masks and positions are those of the call. The status is 1
where a difference is larger than the limit.
"""

import argparse
import base64
import math
import operator
import sys
import zlib

import torch

import clsa_compile
{imports}
OPTIONS = {options}


def inputs():
    generator = torch.Generator().manual_seed(0)

    def normal(length, mean, deviation):
        return torch.randn(length, generator=generator) * deviation + mean

    def integers(length, low, high):
        return torch.randint(low, high + 1, (length,), generator=generator)

    def steps(length, first, step, period):
        return first + torch.arange(length) % period * step

    def full(length, value):
        return torch.full((length,), value)

    def packed(text, dtype):
        return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=dtype)

    def tensor(values, shape, dtype, stride=None, device="cpu", dynamic=()):
        values = values.to(device, dtype)
        values = values.reshape(shape) if stride is None else values.as_strided(shape, stride)
        for dimension in dynamic:
            torch._dynamo.maybe_mark_dynamic(values, dimension)
        return values

    return [
{inputs}
    ]


{graph}

def tensors(values):
    return [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


def difference(actual, expected):
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    if actual.numel() == 0:
        return 0.0
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    distance = (actual.double() - expected.double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.where(same, 0.0, distance).max().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="clsa")
    parser.add_argument("--limit", type=float, default=math.inf)
    arguments = parser.parse_args()
    graph = Graph()
    given, again = inputs(), inputs()
    options = OPTIONS if arguments.backend == "clsa" else None
    with torch.no_grad():
        expected = graph(*given)
        compiled = torch.compile(graph, backend=arguments.backend, options=options or None)
        actual = compiled(*again)
    names = [*(f"output {{i}}" for i in range(len(tensors(expected))))]
    names += [f"input {{i}} afterwards" for i in range(len(tensors(given)))]
    pairs = zip(tensors([actual, again]), tensors([expected, given]), strict=True)
    differences = {{name: difference(*pair) for name, pair in zip(names, pairs, strict=True)}}
    largest = max(differences, key=differences.get)
    print("counted:", dict(torch._dynamo.utils.counters["clsa"]))
    print(f"largest difference: {{differences[largest]:.3g}} in {{largest}}")
    return int(differences[largest] > arguments.limit)


if __name__ == "__main__":
    sys.exit(main())
'''


def repro(captured: Captured, inputs: Sequence[Any], options: Options, plan: Plan | None = None) -> str:
    """Returns the script for a captured graph and the inputs of its first call.

    The script's modules have no paths: where a `plan` is known, layers that were left out go by number.
    """
    nodes = [node for node in captured.graph.nodes if node.op == "placeholder"]
    derived = dict(_derived(nodes))
    made = [
        f"        {recipe(value, node.meta.get('val'))},  # {node.name}"
        for node, value in zip(nodes, inputs, strict=True)
        if node.name not in derived
    ]
    return _TEXT.format(
        imports="".join(f"import {name}\n" for name in _registering(captured)),
        options=_options(options, plan),
        inputs="\n".join(made),
        graph=code_of(captured.module, derived),
    )


def _derived(nodes: Sequence[Node]) -> Iterator[tuple[str, str]]:
    """Yields the sizes among a graph's inputs that some tensor has; as numbers they would be constants."""
    places = {
        str(size): f"{node.name}.shape[{i}]"
        for node in nodes
        if isinstance(value := node.meta.get("val"), torch.Tensor)
        for i, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt)
    }
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and str(value) in places:
            yield node.name, places[str(value)]


def _registering(captured: Captured) -> list[str]:
    """Returns the modules that register the custom ops of a graph, where torch knows them."""
    ops = [node.target for node in captured.graph.nodes if isinstance(node.target, OpOverload)]
    names = {op._schema.name for op in ops if op.namespace not in ("aten", "prims", "clsa")}
    known: Any = getattr(torch._library.custom_ops, "OPDEFS", {})
    homes = {known[name]._init_fn.__module__ if name in known else name.partition("::")[0] for name in names}
    return sorted(home for home in homes if home in sys.modules and home != "__main__")


def _options(options: Options, plan: Plan | None) -> str:
    """Returns the options that differ from the defaults, as Python; what has no text is left out."""
    default = Options()
    planned = ("topk", "scope", "keep_first", "keep_last") if isinstance(options.share, SharingPlan) else ()
    given = []
    for name in (field.name for field in fields(options)):
        value = getattr(options, name)
        if name in ("dump", *planned) or value == getattr(default, name):
            continue
        if isinstance(value, SharingPlan):
            given.append(f"{name!r}: {_plan_text(value)}")
            continue
        if name == "skip":
            value = _without_paths(value, plan)
        if name == "inductor":
            value = {k: v for k, v in value.items() if _is_plain(v)}
        given.append(f"{name!r}: {value!r}")
    return f"{{{', '.join(given)}}}"


def _plan_text(plan: SharingPlan) -> str:
    """Returns a plan as Python; the weights of indices are drawn at random, as all weights here are."""
    if not plan.tensors:
        return f"clsa_compile.SharingPlan.from_dict({plan.to_dict()!r})"
    shapes = {name: list(tensor.shape) for name, tensor in plan.tensors.items()}
    tensors = f"{{name: 0.02 * torch.randn(shape) for name, shape in {shapes!r}.items()}}"
    return f"clsa_compile.SharingPlan.from_dict({ {**plan.to_dict(), 'weights': ''}!r}, {tensors})"


def _without_paths(names: tuple[str, ...], plan: Plan | None) -> tuple[str, ...]:
    layers = [f"{site.ordinal}" for site in plan.sites if site.reason.startswith("skipped")] if plan else []
    passes = [name for name in names if plan is None or name in plan.skipped]
    return (*passes, *layers)


def _is_plain(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False
