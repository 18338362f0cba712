"""Verifies: what a graph must satisfy after each pass."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.fx import Graph, Node

from clsa_compile.errors import VerifyError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.ops import contract_op
from clsa_compile.passes.analyze import Order, Repeated, storages, written


def mutations(graph: Graph) -> list[Node]:
    """Returns the nodes that write memory, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and written(n)]


def verify(captured: Captured, after: str, kept: list[Node], waiting: Collection[str] = ()) -> None:
    """Checks a graph. Raises VerifyError naming the pass and the node.

    1. The graph is well formed. 2. Every call has a value. 3. Every mutation that was there before is
    there still, in the same order. 4. After lowering no contract op is left, but those named in `waiting`.
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
        is_left = node.op == "call_function" and contract_op(node.target) and node.name not in waiting
        if after == "lower" and is_left:
            raise VerifyError(f"after {after}: the contract op {node.name} is left")
    wanted = set(kept)
    present = [n for n in captured.graph.nodes if n in wanted]
    if present != kept:
        found = set(present)
        lost = [n.name for n in kept if n not in found]
        raise VerifyError(
            f"after {after}: mutations were lost or moved: {', '.join(lost) or 'order changed'}"
        )


def verify_repeated(order: Order, pairs: Sequence[Repeated]) -> None:
    """Checks that writes may go because each repeats an earlier one. Raises VerifyError naming the write.

    1. Both are the same op and write the same storage. 2. From the first of them on nothing else writes that
    storage until the other stands. 3. Nor does anything write what the op reads, the two included. Writes
    that repeat others change nothing, so they do not count in between.
    """
    ignored = {pair.write for pair in pairs}
    for pair in pairs:
        write, first = pair.write, pair.first
        (buffer,), (before,) = written(write), written(first)
        own = list(storages(buffer.meta.get("val")))
        if write.target != first.target or not own or own != list(storages(before.meta.get("val"))):
            raise VerifyError(f"{write.name} does not write what {first.name} writes")
        low, high = order.position(first), order.position(write)
        for node in write.all_input_nodes:
            between = [w for w in order.writes(node) if low <= order.position(w) < high and w not in ignored]
            allowed = [first] if node is buffer else []
            if between != allowed:
                raise VerifyError(
                    f"{write.name} is not what {first.name} wrote: {node.name} was written between"
                )


def verify_owned(graph: Graph, order: Order, writes: Sequence[Node]) -> None:
    """Checks that writes may become values because only the graph sees them. Raises VerifyError naming one.

    1. What is written is in memory that is known. 2. Nothing else lives there but what ops of a known schema
    return: no input of the graph, no attribute, nothing of a subgraph. 3. No other write of it stays.
    """
    given = {
        s
        for node in graph.nodes
        if node.op != "output" and not isinstance(node.target, torch._ops.OpOverload)
        for s in storages(node.meta.get("val"))
    }
    gone, seen = set(writes), set[int]()
    for write in writes:
        for target in written(write):
            own = set(storages(target.meta.get("val")))
            if not own or own & given:
                raise VerifyError(f"{write.name} writes what is seen outside of the graph")
            if own <= seen:
                continue  # one write of a memory speaks for all of them
            seen |= own
            if stays := [w.name for w in order.writes(target) if w not in gone]:
                raise VerifyError(f"{write.name} goes, but {stays[0]} writes the same memory")
