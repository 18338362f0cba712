"""Lowering: every contract op becomes a kernel's launch or the reference, on operands laid out for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from clsa_compile.errors import VerifyError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.ops import contract_op
from clsa_compile.ir.references import REFERENCES
from clsa_compile.ir.variants import SUPPORTED, Facts, Support, Variant
from clsa_compile.passes.lower import Choice, facts_of, lower
from clsa_compile.passes.pipeline import decide
from clsa_compile.passes.rewrite import rewrite
from clsa_compile.passes.verify import verify

Trace = Callable[..., Captured]
sdpa = F.scaled_dot_product_attention
B, H, S, T, D = 2, 4, 3, 6, 8


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, S, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)


def rewritten_only(captured: Captured) -> Captured:
    decision = decide(captured)
    assert not decision.sites.rejects
    return rewrite(captured, decision.sites, decision.plan)


class Kernel:
    """A variant that records the strides of its operands, and runs the reference."""

    def __init__(self, op: str = "attention", supports: Any = lambda f: SUPPORTED) -> None:
        self.strides: list[dict[str, Any]] = []
        self.wraps: list[Any] = []
        self.facts: list[Facts] = []
        self.variant = Variant(op, f"my_{op}", self._supports(supports), self.launch)
        self._op = op

    def _supports(self, supports: Any) -> Callable[[Facts], Support]:
        def asked(facts: Facts) -> Support:
            self.facts.append(facts)
            return supports(facts)  # type: ignore[no-any-return]

        return asked

    def launch(self, *args: Any, wrap: Any) -> Any:
        names = [a.name for a in getattr(torch.ops.clsa, self._op).default._schema.arguments]
        self.strides.append(
            {n: a.stride() for n, a in zip(names, args, strict=False) if isinstance(a, Tensor)}
        )
        self.wraps.append(wrap)
        return REFERENCES[self._op](*args)


def lowered(
    trace: Trace, fn: Any, *args: Tensor, variants: tuple[Variant, ...] = ()
) -> tuple[Captured, tuple[Choice, ...]]:
    captured, choices = lower(rewritten_only(trace(fn, *args)), variants, wrap)
    captured.graph.lint()
    with torch.no_grad():
        actual = captured.module(*(a.clone() for a in args))
        expected = fn(*(a.clone() for a in args))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    assert not any(contract_op(n.target) for n in captured.graph.nodes if n.op == "call_function")
    return captured, choices


def wrap(kernel: Any) -> Any:
    return kernel


def operand_copies(captured: Captured) -> list[Node]:
    """Returns the copies made for a kernel: contiguous clones before its first product."""
    found = []
    for node in captured.graph.nodes:
        if node.target is torch.ops.aten.matmul.default:
            break
        if node.kwargs.get("memory_format") is torch.contiguous_format:
            found.append(node)
    return found


# -- choices -----------------------------------------------------------------------------------------


def test_without_variants_everything_becomes_the_reference(trace: Trace) -> None:
    _, choices = lowered(trace, lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv())
    assert [(c.op, c.variant, c.passed_over) for c in choices] == [("attention", "reference", ())]


def test_the_first_variant_that_fits_is_launched_with_the_wrapper(trace: Trace) -> None:
    never = Kernel(supports=lambda f: Support(False, "never"))
    mine = Kernel()
    _, choices = lowered(trace, sdpa, *qkv(), variants=(never.variant, mine.variant))
    assert [(c.variant, c.passed_over) for c in choices] == [("my_attention", ("my_attention: never",))]
    assert mine.wraps == [wrap]
    assert never.strides == []


def test_alike_ops_are_traced_once_and_unlike_ones_are_not(trace: Trace) -> None:
    mine = Kernel()

    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (
            sdpa(q, k, v),
            sdpa(q, v, k),
            sdpa(q, k, v, scale=0.1),
            sdpa(q, k, v, is_causal=True),
            sdpa(q, k.mT.contiguous().mT, v),
        )

    _, choices = lowered(trace, fn, *qkv(), variants=(mine.variant,))
    assert len(choices) == 5
    # Equal layouts and constants: one trace; another scale, another mask: traces of their own.
    assert 3 <= len(mine.strides) <= 4
    assert [choice.like for choice in choices[:2]] == [choices[0].node] * 2
    assert len({choice.like for choice in choices}) == len(mine.strides)


def test_ops_that_nothing_needs_are_dropped(trace: Trace) -> None:
    def fn(x: Tensor) -> Tensor:
        torch.ops.clsa.mask_bounds(x, None, [], 1, 4, "kv <= q")
        return x + 1

    captured, choices = lower(trace(fn, torch.randn(1, 2, 3, 4)), (), wrap)
    assert choices == ()
    assert [str(n.target) for n in captured.graph.nodes if n.op == "call_function"] == ["aten.add.Tensor"]


# -- facts -------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_operands(trace: Trace) -> None:
    mine = Kernel()
    q, k, _ = qkv()
    v = torch.randn(B, 2, T, 5)
    mask = torch.randn(S, T)
    lowered(
        trace,
        lambda q, k, v, m: sdpa(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=m),
        q, k[:, :2].contiguous(), v, mask, variants=(mine.variant,),
    )  # fmt: skip
    (facts,) = mine.facts
    assert facts == Facts(
        op="attention", device="cpu", dtype=torch.float32, B=B, H=H, Hkv=2, S=S, T=T, D=D, Dv=5,
        topk=0, softcap=False, sinks=False, additive=True, lse_used=False,
    )  # fmt: skip


@pytest.mark.parametrize("kernel", [False, True])
def test_a_block_table_that_the_model_gives_is_handed_on(kernel: bool, trace: Trace) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, pages: Tensor) -> Tensor:
        out: Tensor = torch.ops.clsa.attention(q, k, v, None, None, [], None, 0.3, 0.0, "", pages=pages)[0]
        return out

    mine = Kernel()
    args = (*qkv(), torch.tensor([[0, 1, 0], [1, 1, 0]], dtype=torch.int32))
    lowered(trace, fn, *args, variants=(mine.variant,) if kernel else ())
    assert [(f.paged, f.B, f.T) for f in mine.facts] == ([(True, B, 3 * T)] if kernel else [])


def test_unknown_sizes_are_none(trace: Trace) -> None:
    def fn(x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], H, D).transpose(1, 2)
        return sdpa(heads, heads, heads)

    captured = rewritten_only(trace(fn, torch.randn(2, 5, H * D), symbolic=True))
    (node,) = [n for n in captured.graph.nodes if n.op == "call_function" and contract_op(n.target)]
    facts = facts_of(node, "attention")
    assert (facts.B, facts.S, facts.T) == (None, None, None)
    assert (facts.H, facts.Hkv, facts.D, facts.Dv) == (H, H, D, D)


def _ranked(q: Tensor, k: Tensor) -> Tensor:
    chosen: Tensor = torch.ops.clsa.index_topk(
        q, k, None, None, None, None, [], 3, 0.5, "sum: dot", "kv <= q", False
    )
    return chosen + 1


@pytest.mark.parametrize(("symbolic", "may_wait"), [(True, True), (True, False), (False, True)])
def test_an_op_of_unknown_rows_waits_in_a_graph_that_python_runs(
    symbolic: bool, may_wait: bool, trace: Trace
) -> None:
    mine = Kernel("index_topk")
    variant = replace(mine.variant, waits=lambda facts: facts.S is None)
    q, k = torch.randn(2, 3, 12, 8), torch.randn(2, 1, 12, 8)
    captured, (choice,) = lower(trace(_ranked, q, k, symbolic=symbolic), (variant,), wrap, may_wait)
    left = [n.name for n in captured.graph.nodes if n.op == "call_function" and contract_op(n.target)]
    waits = symbolic and may_wait
    assert (choice.variant, choice.waits, bool(mine.strides)) == ("my_index_topk", waits, not waits)
    assert left == ([choice.node] if waits else [])
    assert torch.equal(captured.module(q, k), _ranked(q, k))
    verify(captured, "lower", [], left)
    if waits:
        with pytest.raises(VerifyError, match=f"the contract op {choice.node} is left"):
            verify(captured, "lower", [])


# -- strides -----------------------------------------------------------------------------------------


def _input(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


def _view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k[:, :, 1:5], v[:, :, 1:5])


def _permuted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k.transpose(0, 1).transpose(0, 1), v.mT.mT)


def _updated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(1)
    return sdpa(q, k.index_copy_(2, at, k[:, :, :1] * 2), v.index_copy_(2, at, v[:, :, :1] * 2))


def _updated_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k[:, :, 1:2] = 0.5
    v.add_(1.0)
    return sdpa(q, k[:, :, :4], v[:, :, :4])


@pytest.mark.parametrize("fn", [_input, _view, _permuted, _updated, _updated_view])
def test_graph_inputs_and_views_of_them_are_not_copied(fn: Any, trace: Trace) -> None:
    mine = Kernel()
    captured, _ = lowered(trace, fn, *qkv(), variants=(mine.variant,))
    assert operand_copies(captured) == []


def _projected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def project(x: Tensor) -> Tensor:
        return (x.transpose(1, 2).flatten(2) * 2).view(B, -1, H, D).transpose(1, 2)

    return sdpa(project(q), project(k), project(v))


def _transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, (k.mT * 2).contiguous().mT, v)


def _concatenated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, torch.cat([k[:, :, :3], k[:, :, 3:]], 2), v.mul(2))


def _copied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k.transpose(1, 2).clone().transpose(1, 2), v)


def _written_copy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    made = torch.empty_like(k)
    made.copy_(k)
    return sdpa(q, made, v)


@pytest.mark.parametrize(
    ("fn", "copies"),
    [(_projected, 3), (_transposed, 1), (_concatenated, 2), (_copied, 0), (_written_copy, 1)],
)
def test_what_the_graph_computes_is_pinned_to_contiguous(fn: Any, copies: int, trace: Trace) -> None:
    # Inductor may choose other strides for its own buffers than a kernel was generated for.
    mine = Kernel()
    captured, _ = lowered(trace, fn, *qkv(), variants=(mine.variant,))
    assert len(operand_copies(captured)) == copies
    (strides,) = mine.strides
    if copies:
        assert strides["k"] == torch.empty(B, H, T, D).stride()


def test_the_reference_needs_no_copies(trace: Trace) -> None:
    captured, _ = lowered(trace, _concatenated, *qkv())
    assert operand_copies(captured) == []


def test_results_keep_the_strides_that_were_declared(trace: Trace) -> None:
    # A kernel writes [B, H, S, Dv] rows; what follows was traced with the declared layout.
    mine = Kernel()
    captured, _ = lowered(
        trace, lambda q, k, v: sdpa(q, k, v).view(B, H, S * D), *qkv(), variants=(mine.variant,)
    )
    assert captured.module(*qkv()).shape == (B, H, S * D)


def test_origins_are_carried_over(trace: Trace) -> None:
    captured = rewritten_only(trace(sdpa, *qkv()))
    (node,) = [n for n in captured.graph.nodes if n.op == "call_function" and contract_op(n.target)]
    node.meta["nn_module_stack"] = {"layer": ("layers.3.attn", object)}
    node.meta["stack_trace"] = "here"
    captured, _ = lower(captured, (), wrap)
    made = [n for n in captured.graph.nodes if n.target is torch.ops.aten.matmul.default]
    assert len(made) == 2
    assert {n.meta["stack_trace"] for n in made} == {"here"}


def test_bounds_are_held_for_all_kernels_that_take_them(trace: Trace) -> None:
    def fn(q: Tensor) -> Tensor:
        bounds = torch.ops.clsa.mask_bounds(q, None, [], H, T, "kv <= q")
        return bounds[..., 0] + bounds[..., 1]

    captured, _ = lower(trace(fn, qkv()[0]), (), wrap)
    (held,) = [n for n in captured.graph.nodes if n.target is torch.ops.aten.as_strided.default]
    assert len(held.users) == 2
    assert torch.equal(captured.module(qkv()[0]), fn(qkv()[0]))


@pytest.mark.parametrize("said", [True, False])
def test_bounds_that_may_be_loose_are_not_taken_as_exact(trace: Trace, said: bool) -> None:
    """A kernel that reads all of few tokens trusts the bounds that it is given."""
    clsa, predicate = torch.ops.clsa, "kv <= q"
    mine = torch.tensor([0, T], dtype=torch.int32).expand(B, S, 2).contiguous()
    indices = torch.zeros(B, 1, S, 2, dtype=torch.int32)

    def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, mine: Tensor) -> Tensor:
        bounds = clsa.mask_bounds(q, None, [], H, T, predicate) if said else mine
        rest = (None, bounds, [], None, 0.5, 0.0, predicate, None, 4)
        return clsa.sparse_attention(q, k, v, indices, *rest)  # type: ignore[no-any-return]

    kernel = Kernel("sparse_attention")
    lower(trace(attend, *qkv(), indices, mine), (kernel.variant,), lambda k: k)
    assert ("bounds" in kernel.strides[0]) == said
