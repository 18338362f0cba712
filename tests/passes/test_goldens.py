"""A few whole graphs as text, with counts and numerics beside them: what a reader should expect to see.

Run with CLSA_ACCEPT=1 to write the texts anew, and read the difference before committing it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.ir.captured import Captured
from clsa_compile.ir.ops import contract_op
from clsa_compile.passes.pipeline import decide
from clsa_compile.passes.rewrite import rewrite

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
Trace = Callable[..., Captured]
B, H, S, T, D = 2, 4, 6, 6, 8


def q(seed: int, heads: int = H) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(B, heads, T, D)


def grouped_causal(x: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    mask = (torch.arange(T)[None] <= torch.arange(S)[:, None]) & kept[:, None, None]
    return F.scaled_dot_product_attention(x, k, v, attn_mask=mask)


def softcapped(x: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.tanh((x @ k.mT * 0.5) / 5.0) * 5.0 + bias
    return (scores.softmax(-1, dtype=torch.float32) @ v).transpose(1, 2).contiguous()


def selected(x: Tensor, k: Tensor, v: Tensor, iq: Tensor, ik: Tensor, w: Tensor) -> Tensor:
    causal = torch.arange(T)[None] <= torch.arange(S)[:, None]
    scores = torch.einsum("bshd,btd->bsht", iq, ik).relu() * 0.25
    scores = torch.einsum("bsh,bsht->bst", w, scores).masked_fill(~causal, -math.inf)
    chosen = torch.full((B, S, T), -math.inf).scatter(-1, scores.topk(3, -1).indices, 0.0)
    mask = chosen + torch.where(causal, 0.0, -math.inf)
    return F.scaled_dot_product_attention(x, k, v, attn_mask=mask[:, None])


def cached(x: Tensor, cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    cache.index_copy_(2, at, new)
    return F.scaled_dot_product_attention(x, cache, cache)


CASES: dict[str, tuple[Any, Callable[[], tuple[Tensor, ...]], dict[str, int]]] = {
    "grouped_causal": (
        grouped_causal,
        lambda: (q(0), q(1, 2), q(2, 2), torch.ones(B, T, dtype=torch.bool)),
        {"attention": 1},
    ),
    "softcapped": (softcapped, lambda: (q(0), q(1), q(2), torch.randn(1, 1, S, T)), {"attention": 1}),
    "selected": (
        selected,
        lambda: (
            q(0), q(1), q(2), torch.randn(B, S, 32, 4), torch.randn(B, T, 4), torch.randn(B, S, 32),
        ),
        {"index_topk": 1, "sparse_attention": 1},
    ),
    "cached": (cached, lambda: (q(0), q(1), q(3)[:, :, :1], torch.tensor([2])), {"attention": 1}),
}  # fmt: skip


def readable(captured: Captured) -> str:
    """Returns a graph as one short line a node: name, op, operands, and its value's dtype and shape."""
    lines = []
    for node in captured.graph.nodes:
        value = node.meta.get("val")
        kind = (
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            if isinstance(value, Tensor)
            else ""
        )
        if node.op == "call_function":
            target = re.sub(r"\.(default|Tensor|Scalar)$", "", str(node.target))
            target = "getitem" if "getitem" in target else target
            given = [str(a) if not isinstance(a, str) else repr(a) for a in node.args]
            given += [f"{k}={v}" for k, v in node.kwargs.items() if k not in ("device", "pin_memory")]
            lines.append(f"{node.name}: {kind} = {target}({', '.join(given)})")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
        else:
            lines.append(f"{node.name}: {kind}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", list(CASES))
def test_the_rewritten_graph_reads_as_it_should(name: str, trace: Trace) -> None:
    fn, inputs, counts = CASES[name]
    captured = trace(fn, *inputs())
    decision = decide(captured)
    rewrite(captured, decision.sites, decision.plan)
    torch.testing.assert_close(captured.module(*inputs()), fn(*inputs()), atol=2e-5, rtol=2e-5)
    ops = [contract_op(n.target) for n in captured.graph.nodes if n.op == "call_function"]
    assert {op: ops.count(op) for op in ops if op} == counts
    path = GOLDENS / "rewrite" / f"{name}.txt"
    text = readable(captured)
    if os.environ.get("CLSA_ACCEPT") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert path.exists(), "write it with CLSA_ACCEPT=1"
    assert text == path.read_text(), "read the difference; CLSA_ACCEPT=1 accepts it"
