"""`scaled_dot_product_attention`: what is read, what is refused, and that both stay right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.ir.masks import print_predicate
from clsa_compile.ir.sites import Reason
from clsa_compile.passes.pipeline import decide

Rewritten = Callable[..., Any]
sdpa = F.scaled_dot_product_attention
B, H, S, T, D = 2, 4, 3, 6, 8


def qkv(kv_heads: int = H, s: int = S, t: int = T, dv: int = D) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, s, D), torch.randn(B, kv_heads, t, D), torch.randn(B, kv_heads, t, dv)


def repeat_kv(x: Tensor, n: int) -> Tensor:
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, n, t, d).reshape(b, h * n, t, d)


# -- what is taken ---------------------------------------------------------------------------------


def test_plain_attention_is_taken_with_its_default_scale(rewritten: Rewritten) -> None:
    outcome = rewritten(sdpa, *qkv())
    outcome.assert_equal()
    site = outcome.site
    assert (site.family, site.heads, site.kv_heads, site.softcap) == ("sdpa", H, H, 0.0)
    assert site.scale == pytest.approx(1 / math.sqrt(D))
    assert site.mask.is_open
    assert site.kind == "dense"
    assert not any("scaled_dot_product" in op or "clsa" in op for op in outcome.ops)


@pytest.mark.parametrize("scale", [0.5, 1, 0.0, -0.3])
def test_a_constant_scale_is_carried_over(scale: float, rewritten: Rewritten) -> None:
    outcome = rewritten(lambda q, k, v: sdpa(q, k, v, scale=scale), *qkv())
    outcome.assert_equal()
    assert outcome.site.scale == scale


GROUPED: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_kv": lambda x: repeat_kv(x, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "repeat_interleave, last dimensions": lambda x: x.repeat_interleave(2, dim=-3),
    "expand and flatten": lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    "stack": lambda x: x[:, :, None].expand(B, 2, 2, -1, -1).contiguous().view(B, 4, -1, D),
}


@pytest.mark.parametrize("spelling", list(GROUPED))
def test_grouped_heads_are_read_once_whatever_spells_them(spelling: str, rewritten: Rewritten) -> None:
    grow = GROUPED[spelling]
    outcome = rewritten(lambda q, k, v: sdpa(q, grow(k), grow(v)), *qkv(kv_heads=2))
    outcome.assert_equal()
    assert outcome.site.kv_heads == 2
    assert not any("expand" in op or "repeat" in op for op in outcome.ops), "the copies are gone"


def test_grouped_heads_by_enable_gqa(rewritten: Rewritten) -> None:
    outcome = rewritten(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), *qkv(kv_heads=2))
    outcome.assert_equal()
    assert outcome.site.kv_heads == 2


def test_one_key_head_for_all_by_expand(rewritten: Rewritten) -> None:
    outcome = rewritten(
        lambda q, k, v: sdpa(q, k.expand(-1, H, -1, -1), v.expand(-1, H, -1, -1)), *qkv(kv_heads=1)
    )
    outcome.assert_equal()
    assert outcome.site.kv_heads == 1


TILED: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "expand in front": lambda x: x[:, None].expand(B, 2, 2, T, D).reshape(B, 4, T, D),
    "concatenation": lambda x: torch.cat([x, x], 1),
}


@pytest.mark.parametrize("spelling", list(TILED))
def test_tiled_heads_are_not_mistaken_for_grouped_ones(spelling: str, rewritten: Rewritten) -> None:
    # Head i reads key head i % 2 here, and i // 2 in grouped attention.
    tile = TILED[spelling]
    outcome = rewritten(lambda q, k, v: sdpa(q, tile(k), tile(v)), *qkv(kv_heads=2))
    outcome.assert_equal()
    assert outcome.site.kv_heads == H


@pytest.mark.parametrize(
    ("grow_k", "grow_v", "k_heads", "v_heads"),
    [
        (lambda x: x.repeat_interleave(2, 1), lambda x: x, 2, H),
        (lambda x: x.expand(-1, H, -1, -1), lambda x: x, 1, H),
        (lambda x: x, lambda x: x.expand(-1, H, -1, -1), H, 1),
        (lambda x: x.expand(-1, H, -1, -1), lambda x: x.repeat_interleave(2, 1), 1, 2),
    ],
)
def test_keys_and_values_of_different_head_counts(
    grow_k: Any, grow_v: Any, k_heads: int, v_heads: int, rewritten: Rewritten
) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(B, k_heads, T, D), torch.randn(B, v_heads, T, D)
    outcome = rewritten(lambda q, k, v: sdpa(q, grow_k(k), grow_v(v)), torch.randn(B, H, S, D), k, v)
    outcome.assert_equal()
    assert len(outcome.sites) == 1


@pytest.mark.parametrize("dv", [1, 5, 16])
def test_values_may_be_wider_or_narrower_than_keys(dv: int, rewritten: Rewritten) -> None:
    outcome = rewritten(sdpa, *qkv(dv=dv))
    outcome.assert_equal()
    assert outcome.actual.shape[-1] == dv
    assert len(outcome.sites) == 1


@pytest.mark.parametrize(("s", "t"), [(3, 6), (6, 3), (4, 4), (1, 6), (6, 1)])
def test_is_causal_is_aligned_to_the_top_left_corner(s: int, t: int, rewritten: Rewritten) -> None:
    outcome = rewritten(lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv(s=s, t=t))
    outcome.assert_equal()
    assert print_predicate(outcome.site.mask.predicate) == "kv <= q"


@pytest.mark.parametrize(
    "shape", [(S, T), (B, 1, S, T), (1, 1, 1, T), (B, H, S, T), (1, H, S, T), (S, 1), (B, 1, 1, 1)]
)
@pytest.mark.parametrize("boolean", [True, False])
def test_masks_handed_in_broadcast_as_they_do_in_eager(
    shape: tuple[int, ...], boolean: bool, rewritten: Rewritten
) -> None:
    torch.manual_seed(1)
    mask = torch.rand(shape) > 0.4 if boolean else torch.randn(shape)
    if boolean and shape[-1] == T:
        mask[..., 0] = True  # no row without a key
    elif boolean:
        mask[:] = True
    outcome = rewritten(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), *qkv(), mask)
    outcome.assert_equal()
    assert len(outcome.sites) == 1


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min])
def test_an_additive_mask_that_forbids_is_a_predicate(low: float, rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        causal = torch.arange(T)[None] <= torch.arange(S)[:, None]
        return sdpa(q, k, v, attn_mask=torch.where(causal & kept[:, None, None], 0.0, low))

    kept = torch.ones(B, T, dtype=torch.bool)
    kept[0, 1] = False
    outcome = rewritten(fn, *qkv(), kept)
    outcome.assert_equal()
    assert outcome.site.mask.tensor is None


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, None])
def test_rows_without_keys_give_no_nan_and_leave_other_rows_alone(
    low: float | None, rewritten: Rewritten
) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        mask = (torch.arange(T)[None] <= torch.arange(S)[:, None]) & kept[:, None, None]
        return sdpa(q, k, v, attn_mask=mask if low is None else torch.where(mask, 0.0, low))

    kept = torch.ones(B, T, dtype=torch.bool)
    kept[0, :2] = False  # left padding: rows 0 and 1 of the first sequence see nothing
    outcome = rewritten(fn, *qkv(), kept)
    assert outcome.site.mask.tensor is None
    assert torch.isfinite(outcome.actual).all()
    torch.testing.assert_close(outcome.actual[0, :, 2:], outcome.expected[0, :, 2:])
    torch.testing.assert_close(outcome.actual[1], outcome.expected[1])
    assert torch.equal(outcome.actual[0, :, :2], torch.zeros(H, 2, D)), "defined: zeros"


def test_three_dimensional_attention_has_one_head(rewritten: Rewritten) -> None:
    q, k, v = (x[:, 0] for x in qkv(dv=5))
    mask = torch.rand(B, S, T) > 0.3
    mask[..., 0] = True
    outcome = rewritten(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), q, k, v, mask)
    outcome.assert_equal()
    assert outcome.site.heads == 1


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads before batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "width before tokens": lambda x: x.mT.contiguous().mT,
    "a slice of a longer cache": lambda x: F.pad(x, (0, 0, 0, 4))[:, :, : x.shape[2]],
    "half of a fused projection": lambda x: torch.cat([x, x], -1).chunk(2, -1)[0],
    "heads split from a row": lambda x: (
        x.transpose(1, 2).reshape(B, x.shape[2], -1).view(B, x.shape[2], H, D).transpose(1, 2)
    ),
    "flipped": lambda x: x.flip(2),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_operands_of_any_layout_are_right(name: str, rewritten: Rewritten) -> None:
    lay = LAYOUTS[name]
    outcome = rewritten(lambda q, k, v: sdpa(lay(q), lay(k), lay(v)), *qkv())
    outcome.assert_equal()
    assert len(outcome.sites) == 1


def test_keys_whose_tokens_and_width_are_swapped_keep_their_roles(rewritten: Rewritten) -> None:
    # T equals D, so shapes alone would not tell.
    outcome = rewritten(lambda q, k, v: sdpa(q, k.mT, v.mT), *qkv(t=D))
    outcome.assert_equal()
    assert len(outcome.sites) == 1


def test_batch_and_lengths_may_be_unknown(rewritten: Rewritten) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        def heads(z: Tensor) -> Tensor:
            return z.view(z.shape[0], z.shape[1], H, D).transpose(1, 2)

        s, t = x.shape[1], y.shape[1]
        mask = torch.arange(t)[None] <= torch.arange(s)[:, None] + (t - s)
        return sdpa(heads(x), heads(y), heads(y), attn_mask=mask)

    def inputs(b: int, s: int, t: int) -> tuple[Tensor, Tensor]:
        return torch.randn(b, s, H * D), torch.randn(b, t, H * D)

    outcome = rewritten(fn, *inputs(2, 5, 9), symbolic=True, others=[inputs(3, 2, 7)])
    outcome.assert_equal()
    assert outcome.decision.plan.count("attention") == 1


def test_a_view_of_a_cache_that_is_written_before_use_is_read_after_the_write(
    rewritten: Rewritten,
) -> None:
    def fn(q: Tensor, cache: Tensor, new: Tensor) -> Tensor:
        keys = cache[:, :, :T]
        cache[:, :, 2:3] = new
        return sdpa(q, keys, keys)

    q, k, _ = qkv(t=T + 3)
    outcome = rewritten(fn, q, k, torch.randn(B, H, 1, D))
    outcome.assert_equal()
    assert len(outcome.sites) == 1


def test_an_in_place_cache_update_is_kept_and_read(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k_cache: Tensor, v_cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
        k_cache.index_copy_(2, at, new)
        v_cache.index_copy_(2, at, new * 2)
        return sdpa(q, k_cache, v_cache)

    q, k, v = qkv()
    outcome = rewritten(fn, q, k, v, torch.randn(B, H, 1, D), torch.tensor([4]))
    outcome.assert_equal()
    assert len(outcome.sites) == 1
    assert sum("index_copy_" in op for op in outcome.ops) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_keep_theirs(dtype: torch.dtype, rewritten: Rewritten) -> None:
    outcome = rewritten(sdpa, *(x.to(dtype) for x in qkv()))
    assert outcome.actual.dtype == dtype
    outcome.assert_equal({torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype])
    assert len(outcome.sites) == 1


# -- what is refused -------------------------------------------------------------------------------


def refused(outcome: Any, reason: Reason, detail: str) -> None:
    """Checks a refusal's reason, and that the graph still computes what it did."""
    outcome.assert_equal()
    assert outcome.reject.reason is reason, str(outcome.reject)
    assert detail in outcome.reject.detail
    assert outcome.decision.plan.count("left") == 1


def test_dropout_is_refused(rewritten: Rewritten) -> None:
    outcome = rewritten(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), *qkv())
    refused(outcome, Reason.DROPOUT, "dropout_p is 0.5")


@pytest.mark.parametrize("shape", [(S, D), (2, B, H, S, D)])
def test_other_ranks_are_refused(shape: tuple[int, ...], rewritten: Rewritten) -> None:
    x = torch.randn(shape)
    refused(rewritten(sdpa, x, x, x), Reason.SHAPE, "ranks")


def test_a_scale_that_is_not_known_is_refused(trace: Any) -> None:
    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        heads = (x[..., None] * torch.arange(1.0, 1.0 + D)).transpose(1, 2)
        scale = torch.sym_float(y.shape[0]) ** -0.5
        return sdpa(heads, heads, heads, scale=0.25), y * scale

    # Tracing turns a SymFloat scale into a number; a graph made by other means keeps the node.
    captured = trace(fn, torch.randn(2, 5, 4), torch.randn(16), symbolic=True)
    (attention,) = [n for n in captured.graph.nodes if "scaled_dot" in str(n.target)]
    (scaled,) = [
        n for n in captured.graph.nodes if "aten.mul" in str(n.target) and n.args[1].name[:3] == "pow"
    ]
    attention.kwargs = {**attention.kwargs, "scale": scaled.args[1]}
    captured.module.recompile()
    decision = decide(captured)
    assert not decision.sites.attention
    (reject,) = decision.sites.rejects
    assert reject.reason is Reason.SCALE
    inputs = torch.randn(2, 5, 4), torch.randn(16)
    torch.testing.assert_close(captured.module(*inputs), fn(*inputs))


def test_a_width_that_is_not_known_is_refused(rewritten: Rewritten) -> None:
    x = torch.randn(2, 3, 5, 7)
    refused(rewritten(sdpa, x, x, x, symbolic=True), Reason.SCALE, "width is not static")
    outcome = rewritten(lambda q, k, v: sdpa(q, k, v, scale=0.5), x, x, x, symbolic=True)
    refused(outcome, Reason.SHAPE, "width is not static")


def test_a_number_of_heads_that_is_not_known_is_refused(rewritten: Rewritten) -> None:
    def fn(x: Tensor) -> Tensor:
        heads = (x[..., None] * torch.arange(1.0, 1.0 + D)).transpose(1, 2)
        return sdpa(heads, heads, heads)

    outcome = rewritten(fn, torch.randn(2, 5, H * D), symbolic=True)
    refused(outcome, Reason.SHAPE, "heads is not static")


def test_grouped_keys_and_values_of_different_heads_are_refused(rewritten: Rewritten) -> None:
    q, k, _ = qkv(kv_heads=2)
    v = torch.randn(B, H, T, D)
    outcome = rewritten(lambda q, k, v: sdpa(q, k, v, enable_gqa=True), q, k, v)
    refused(outcome, Reason.SHAPE, "query heads over")


def test_a_batch_that_is_broadcast_is_refused(rewritten: Rewritten) -> None:
    q, k, v = qkv()
    refused(rewritten(sdpa, q, k[:1], v[:1]), Reason.LAYOUT, "the key")
    refused(rewritten(sdpa, q[:1], k, v), Reason.LAYOUT, "the key")


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "repeat_kv": lambda x: repeat_kv(x, 2),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2).repeat_interleave(2, 1),
    "clone": lambda x: repeat_kv(x.clone(), 2),
    "copying cast": lambda x: repeat_kv(x.to(torch.float32, copy=True), 2),
}


@pytest.mark.parametrize("name", list(COPIES))
@pytest.mark.parametrize("operand", ["key", "value"])
def test_a_cache_written_between_its_copy_and_its_use_is_refused(
    name: str, operand: str, rewritten: Rewritten
) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = COPIES[name](k), COPIES[name](v)
        (k if operand == "key" else v).mul_(2.0)
        return sdpa(q, keys, values)

    refused(rewritten(fn, *qkv(kv_heads=2)), Reason.MUTATION, f"the {operand}")


def test_a_mask_written_between_its_copy_and_its_use_is_not_read_again(
    rewritten: Rewritten,
) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        kept = mask.clone()
        mask.zero_()
        return sdpa(q, k, v, attn_mask=kept)

    mask = torch.rand(S, T) > 0.4
    mask[:, 0] = True
    outcome = rewritten(fn, *qkv(), mask)
    outcome.assert_equal()
