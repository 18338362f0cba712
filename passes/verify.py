"""Verifies: what a graph must satisfy after each pass."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from clsa_compile.errors import VerifyError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.ops import contract_op
from clsa_compile.passes.analyze import written


def mutations(graph: Graph) -> list[Node]:
    """Returns the nodes that write memory, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and written(n)]


def verify(captured: Captured, after: str, kept: list[Node]) -> None:
    """Checks a graph. Raises VerifyError naming the pass and the node.

    1. The graph is well formed. 2. Every call has a value. 3. Every mutation that was there before is
    there still, in the same order. 4. After lowering no contract op is left.
    """
    try:
        captured.graph.lint()
    except Exception as error:
        raise VerifyError(f"after {after}: the graph is malformed: {error}") from error
    for node in captured.graph.nodes:
        if (
            node.op == "call_function"
            and "val" not in node.meta
            and isinstance(node.target, torch._ops.OpOverload)
        ):
            raise VerifyError(f"after {after}: {node.name} has no value")
        if after == "lower" and node.op == "call_function" and contract_op(node.target):
            raise VerifyError(f"after {after}: the contract op {node.name} is left")
    present = [n for n in captured.graph.nodes if n in set(kept)]
    if present != kept:
        lost = [n.name for n in kept if n not in set(present)]
        raise VerifyError(
            f"after {after}: mutations were lost or moved: {', '.join(lost) or 'order changed'}"
        )
