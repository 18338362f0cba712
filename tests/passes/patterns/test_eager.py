"""Attention written out: every order of scale, softcap and mask; every near miss."""

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

Rewritten = Callable[..., Any]
B, H, S, T, D = 2, 4, 3, 6, 8
LOWEST = torch.finfo(torch.float32).min


def qkv(kv_heads: int = H, s: int = S, t: int = T, dv: int = D) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, s, D), torch.randn(B, kv_heads, t, D), torch.randn(B, kv_heads, t, dv)


def a_mask(*shape: int) -> Tensor:
    torch.manual_seed(1)
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    return mask


def additive(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, LOWEST)


def causal(s: int = S, t: int = T) -> Tensor:
    return torch.arange(t)[None] <= torch.arange(s)[:, None]


# -- what is taken ---------------------------------------------------------------------------------


def llama(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3 + additive(mask)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def gemma(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    scores = torch.tanh(scores / 5.0) * 5.0 + additive(mask)
    return torch.matmul(F.softmax(scores, dim=-1), v)


def divided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.where(mask, q @ k.mT / math.sqrt(D), LOWEST)
    return scores.softmax(3) @ v


def scaled_before(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q * 0.3) @ k.mT
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


def keys_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (k @ q.mT).mT * 0.3 + additive(mask)
    return scores.softmax(-1) @ v


def einsums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3 + additive(mask)
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v)


def einsums_swapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhkd,bhqd->bhqk", k, q).mul(0.3) + additive(mask)
    return torch.einsum("bhqk,bhkd->bhdq", scores.softmax(-1), v)


def two_masks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3 + additive(causal()) + additive(mask)
    return scores.softmax(-1) @ v


def filled_and_added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.3).masked_fill(~causal(), LOWEST) + additive(mask)
    return scores.softmax(-1) @ v


def forbidden(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.3).masked_fill(mask == 0, -math.inf).softmax(-1) @ v


def biased_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (additive(mask) + q @ k.mT * 0.3).softmax(-1) @ v


def less_maximum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3 + additive(mask)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1) @ v


def scaled_twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ((q @ k.mT * 0.3) / 2 + additive(mask)).softmax(-1) @ v


def scaled_by_a_constant_tensor(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * torch.full((), 0.3) + additive(mask)).softmax(-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3
    scores += additive(mask)
    return scores.softmax(-1) @ v


def safe(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3 + additive(mask)
    return torch.ops.aten._safe_softmax.default(scores, -1) @ v


TAKEN = [
    llama, gemma, divided, scaled_before, keys_first, einsums, einsums_swapped, two_masks,
    filled_and_added, forbidden, biased_first, less_maximum, scaled_twice,
    scaled_by_a_constant_tensor, in_place, safe,
]  # fmt: skip


@pytest.mark.parametrize("fn", TAKEN)
@pytest.mark.parametrize("shape", [(B, 1, S, T), (S, T), (B, H, S, T), (B, 1, 1, T)])
def test_every_spelling_is_taken_and_equal(fn: Any, shape: tuple[int, ...], rewritten: Rewritten) -> None:
    outcome = rewritten(fn, *qkv(), a_mask(*shape))
    outcome.assert_equal()
    site = outcome.site
    assert (site.family, site.heads, site.kv_heads) == ("eager", H, H)
    assert site.softcap == (5.0 if fn is gemma else 0.0)
    assert outcome.decision.plan.count("attention") == 1


@pytest.mark.parametrize("fn", [llama, gemma, einsums])
def test_decode_of_one_row_is_taken_and_equal(fn: Any, rewritten: Rewritten) -> None:
    outcome = rewritten(fn, *qkv(s=1), a_mask(B, 1, 1, T))
    outcome.assert_equal()
    assert len(outcome.sites) == 1


@pytest.mark.parametrize(("s", "t"), [(1, 1), (3, 1), (1, 6)])
@pytest.mark.parametrize("fn", [llama, keys_first, einsums, einsums_swapped])
def test_sizes_of_one_do_not_confuse_roles(fn: Any, s: int, t: int, rewritten: Rewritten) -> None:
    outcome = rewritten(fn, *qkv(s=s, t=t), a_mask(B, 1, s, t))
    outcome.assert_equal()
    assert len(outcome.sites) == 1


@pytest.mark.parametrize("fn", [llama, gemma, divided, keys_first])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_are_read_once(fn: Any, kv_heads: int, rewritten: Rewritten) -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        b, h, t, d = k.shape
        k, v = (x[:, :, None].expand(b, h, H // h, t, d).reshape(b, H, t, d) for x in (k, v))
        result: Tensor = fn(q, k, v, mask)
        return result

    outcome = rewritten(grouped, *qkv(kv_heads=kv_heads), a_mask(B, 1, S, T))
    outcome.assert_equal()
    assert outcome.site.kv_heads == kv_heads


def test_values_may_have_another_width(rewritten: Rewritten) -> None:
    for dv in (1, 5):
        outcome = rewritten(llama, *qkv(dv=dv), a_mask(S, T))
        outcome.assert_equal()
        assert len(outcome.sites) == 1


def test_batched_products_of_rank_three_are_taken(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.bmm(q, k.transpose(1, 2)) * 0.3 + additive(mask)
        return torch.bmm(scores.softmax(-1), v)

    outcome = rewritten(fn, *(x.flatten(0, 1) for x in qkv(dv=5)), a_mask(S, T))
    outcome.assert_equal()
    assert outcome.site.heads == 1


def test_a_causal_mask_built_in_the_graph_is_a_predicate(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT + additive(causal())).softmax(-1) @ v

    outcome = rewritten(fn, *qkv())
    outcome.assert_equal()
    assert print_predicate(outcome.site.mask.predicate) == "kv <= q"


def test_scores_that_are_a_sum_of_two_products_are_right(rewritten: Rewritten) -> None:
    # MLA before absorption: one product is read as the scores, the other as a bias.
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q[..., :4] @ k[..., :4].mT * 0.3 + q[..., 4:] @ k[..., 4:].mT * 0.3
        return (scores + additive(mask)).softmax(-1) @ v

    rewritten(fn, *qkv(), a_mask(B, 1, S, T)).assert_equal()


def test_rows_without_keys_give_zeros_and_leave_other_rows_alone(rewritten: Rewritten) -> None:
    kept = torch.ones(B, 1, S, T, dtype=torch.bool)
    kept[0, :, :2] = False
    outcome = rewritten(llama, *qkv(), kept)
    assert len(outcome.sites) == 1
    actual, expected = outcome.actual, outcome.expected
    assert torch.equal(actual[0, :2], torch.zeros(2, H, D))
    torch.testing.assert_close(actual[0, 2:], expected[0, 2:])
    torch.testing.assert_close(actual[1], expected[1])


def sinks(form: str) -> Callable[..., Tensor]:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sink: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3 + additive(mask)
        per_head = sink.reshape(1, -1, 1, 1).expand(B, -1, S, -1)
        if form == "per query":
            per_head = per_head + torch.arange(S).view(1, 1, S, 1)
        if form == "in front":
            return torch.cat([per_head, scores], dim=-1).softmax(-1)[..., 1:] @ v
        if form == "two columns in one":
            wide = torch.cat([scores, per_head.expand(B, H, S, 2)], dim=-1).softmax(-1)
            return wide[..., :-1] @ F.pad(v, (0, 0, 0, 1), value=1.0)
        if form == "two columns":
            joined = torch.cat([scores, per_head, per_head], dim=-1)
            return joined.softmax(-1)[..., :-2] @ v
        joined = torch.cat([scores, per_head], dim=-1)
        if form == "mask on the sinks":
            joined = joined + F.pad(additive(mask), (0, 1))
        joined = joined - joined.max(dim=-1, keepdim=True).values
        weights = joined.softmax(-1)
        if form == "first column cut":
            return weights[..., 1:] @ v
        if form == "not cut":
            return weights @ F.pad(v, (0, 0, 0, 1))
        if form == "cut twice":
            return weights[..., :-1][..., :-1] @ v[:, :, :-1]
        return weights[..., :-1] @ v

    return fn


def test_attention_sinks_join_the_softmax(rewritten: Rewritten) -> None:
    outcome = rewritten(sinks("gpt_oss"), *qkv(), a_mask(B, 1, S, T), torch.randn(H))
    outcome.assert_equal()
    assert outcome.site.sinks is not None
    assert outcome.site.sinks.root.op == "placeholder"


# -- what is refused -------------------------------------------------------------------------------


def refused(outcome: Any, reason: Reason, detail: str = "") -> None:
    """Checks a refusal's reason, and that the graph still computes what it did."""
    outcome.assert_equal()
    assert outcome.reject.reason is reason, str(outcome.reject)
    assert detail in outcome.reject.detail, outcome.reject.detail
    assert outcome.decision.plan.count("left") == 1


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("first column cut", Reason.LAYOUT),
        ("cut twice", Reason.LAYOUT),
        ("not cut", Reason.SHAPE),
        ("in front", Reason.LAYOUT),
        ("two columns", Reason.LAYOUT),
        ("two columns in one", Reason.LAYOUT),
        ("mask on the sinks", Reason.LAYOUT),
        ("per query", Reason.LAYOUT),
    ],
)
def test_sinks_in_any_other_form_are_refused(form: str, reason: Reason, rewritten: Rewritten) -> None:
    refused(rewritten(sinks(form), *qkv(), a_mask(B, 1, S, T), torch.randn(H)), reason)


def test_rows_joined_to_the_scores_are_no_sinks(rewritten: Rewritten) -> None:
    # With one key, a row more has the shape that a sink's column has.
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return torch.cat([scores, scores.new_zeros(B, H, 1, 1)], dim=2).softmax(-1) @ v

    q, k, v = qkv(t=1)
    outcome = rewritten(fn, q, k, v)
    refused(outcome, Reason.LAYOUT, "aten.cat")


def test_the_last_column_cut_off_without_sinks_is_refused(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1)[..., :-1] @ v[:, :, :-1]

    refused(rewritten(fn, *qkv()), Reason.SHAPE, "columns of the probabilities")


def several_users(at: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        product = q @ k.mT
        scaled = product * 0.3
        ratio = scaled / 5.0
        tanh = torch.tanh(ratio)
        capped = tanh * 5.0
        masked = capped + additive(mask)
        weights = masked.softmax(-1)
        kept = {
            "product": product, "scaled": scaled, "ratio": ratio, "tanh": tanh, "capped": capped,
            "masked": masked, "weights": weights,
        }[at]  # fmt: skip
        return weights @ v, kept

    return fn


@pytest.mark.parametrize("at", ["product", "scaled", "ratio", "tanh", "capped", "masked", "weights"])
def test_an_intermediate_result_that_is_needed_elsewhere_is_refused(at: str, rewritten: Rewritten) -> None:
    refused(rewritten(several_users(at), *qkv(), a_mask(S, T)), Reason.USERS, "is also used by")


def test_reading_the_shape_of_scores_and_probabilities_needs_no_value(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT * 0.3
        scores = scores + torch.zeros_like(scores).masked_fill(~mask, LOWEST)
        weights = scores.softmax(-1)
        return weights @ v, torch.ones_like(weights)

    outcome = rewritten(fn, *qkv(), a_mask(S, T))
    outcome.assert_equal()
    assert outcome.site.family == "eager"


def test_maximum_used_elsewhere_is_refused(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v, scores

    refused(rewritten(fn, *qkv()), Reason.USERS)


def test_a_mask_that_depends_on_the_scores_is_refused(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return scores.masked_fill(~(scores > -1.0), -math.inf).softmax(-1) @ v

    refused(rewritten(fn, *qkv()), Reason.USERS)


def _mask_then_scale(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return ((q @ k.mT + m.float()) * 0.3).softmax(-1) @ v


def _mask_then_softcap(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (torch.tanh((q @ k.mT + m.float()) / 5.0) * 5.0).softmax(-1) @ v


def _softcap_then_scale(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / 5.0) * 5.0 * 0.3).softmax(-1) @ v


def _softcap_twice(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    capped = torch.tanh(q @ k.mT / 5.0) * 5.0
    return (torch.tanh(capped / 3.0) * 3.0).softmax(-1) @ v


def _filled_then_scaled(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(~m, LOWEST) / 2.0).softmax(-1) @ v


@pytest.mark.parametrize(
    "fn",
    [_mask_then_scale, _mask_then_softcap, _softcap_then_scale, _softcap_twice, _filled_then_scaled],
)
def test_scale_softcap_and_mask_in_another_order_are_refused(fn: Any, rewritten: Rewritten) -> None:
    refused(rewritten(fn, *qkv(), a_mask(S, T)), Reason.ORDER)


def test_a_scale_that_is_not_known_is_refused(rewritten: Rewritten) -> None:
    def fn(x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], H, D).transpose(1, 2)
        scale = torch.sym_float(x.shape[1]) ** -0.5
        return (heads @ heads.mT * scale).softmax(-1) @ heads

    outcome = rewritten(fn, torch.randn(2, 5, H * D), symbolic=True, others=[(torch.randn(3, 7, H * D),)])
    refused(outcome, Reason.SCALE, "not a constant")


def test_a_learned_temperature_is_refused(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return (q @ k.mT * t).softmax(-1) @ v

    for temperature in (torch.tensor(0.3), torch.rand(H, 1, 1)):
        refused(rewritten(fn, *qkv(), temperature), Reason.SCALE)


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_a_softmax_over_another_dimension_is_refused(axis: int, rewritten: Rewritten) -> None:
    outcome = rewritten(lambda q, k, v: (q @ k.mT).softmax(axis) @ v, *qkv())
    refused(outcome, Reason.LAYOUT, "does not run over the keys")


def test_other_ranks_are_refused(rewritten: Rewritten) -> None:
    q, k, v = (x.unsqueeze(0).expand(3, -1, -1, -1, -1) for x in qkv())
    refused(rewritten(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, q, k, v), Reason.SHAPE, "rank 5")


@pytest.mark.parametrize("native", [False, True])
def test_dropout_in_training_is_refused(native: bool, rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        if native:
            weights = torch.native_dropout(weights, 0.5, True)[0]
        else:
            weights = F.dropout(weights, 0.5, training=True)
        return weights @ v

    refused(rewritten(fn, *qkv()), Reason.DROPOUT)


def test_dropout_of_nothing_is_no_dropout(rewritten: Rewritten) -> None:
    outcome = rewritten(lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.0, training=True) @ v, *qkv())
    outcome.assert_equal()
    assert len(outcome.sites) == 1


def _sliced(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)[..., 1:] @ v[:, :, 1:]


def _rows_sliced(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)[:, :, 1:] @ v


def _doubled(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * 2.0) @ v


def _masked_after(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * m) @ v


def _renormalised(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return (weights / weights.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("fn", [_sliced, _rows_sliced, _doubled, _masked_after])
def test_probabilities_that_are_changed_are_refused(fn: Any, rewritten: Rewritten) -> None:
    refused(rewritten(fn, *qkv(), a_mask(S, T)), Reason.LAYOUT)


def test_renormalised_probabilities_are_left_alone(rewritten: Rewritten) -> None:
    outcome = rewritten(_renormalised, *qkv(), a_mask(S, T))
    outcome.assert_equal()
    assert not outcome.sites


def _relu(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.relu(q @ k.mT).softmax(-1) @ v


def _finite_fill(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~m, -3.0).softmax(-1) @ v


def _filled_with_zero(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.where(m, q @ k.mT, 0.0).softmax(-1) @ v


def _choice_of_two(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.where(m, q @ k.mT, (q @ k.mT) * 0.5).softmax(-1) @ v


def _reciprocal(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (2.0 / (q @ k.mT)).softmax(-1) @ v


def _subtracted(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (1.0 - q @ k.mT).softmax(-1) @ v


def _mask_subtracted(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (q @ k.mT - m.float()).softmax(-1) @ v


def _scaled_by_other_scores(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return ((q @ k.mT) * (q @ v.mT)).softmax(-1) @ v


def _other_half(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.where(m, LOWEST, q @ k.mT).softmax(-1) @ v


def _mask_twice(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.add(q @ k.mT, m.float(), alpha=2).softmax(-1) @ v


def _wrong_softcap(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / 5.0) * 4.0).softmax(-1) @ v


def _negative_softcap(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / -5.0) * -5.0).softmax(-1) @ v


def _added_constant(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (q @ k.mT + 1.0).softmax(-1) @ v


def _fused_add(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    return torch.baddbmm(m.float().expand(B, S, T), q, k.mT, alpha=0.3).softmax(-1) @ v


def _scaled_in_place(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (q @ k.mT).mul_(0.3).softmax(-1) @ v


def _less_another_maximum(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


ELSEWHERE = [
    _reciprocal, _subtracted, _mask_subtracted, _scaled_by_other_scores, _relu, _finite_fill,
    _filled_with_zero, _choice_of_two, _mask_twice, _wrong_softcap, _negative_softcap,
    _added_constant, _fused_add, _scaled_in_place, _less_another_maximum,
]  # fmt: skip


@pytest.mark.parametrize("fn", ELSEWHERE)
def test_scores_that_go_through_something_else_stay_right(fn: Any, rewritten: Rewritten) -> None:
    outcome = rewritten(fn, *qkv(), a_mask(S, T))
    outcome.assert_equal()
    known = (Reason.LAYOUT, Reason.USERS, Reason.SCALE)
    assert outcome.reject.reason in known, str(outcome.reject)


def test_the_other_half_of_a_where_is_not_taken_for_the_scores(rewritten: Rewritten) -> None:
    mask = a_mask(S, T)
    mask[:, 1] = False
    rewritten(_other_half, *qkv(), mask).assert_equal()


def test_a_boolean_mask_that_is_added_adds_one(rewritten: Rewritten) -> None:
    # scores + mask with a boolean mask is a bias of 1, not a condition.
    outcome = rewritten(lambda q, k, v, m: (q @ k.mT + m).softmax(-1) @ v, *qkv(), a_mask(B, 1, S, T))
    outcome.assert_equal()


def test_an_integer_mask_that_is_added_is_refused(rewritten: Rewritten) -> None:
    outcome = rewritten(lambda q, k, v, m: (q @ k.mT + m.long()).softmax(-1) @ v, *qkv(), a_mask(B, 1, S, T))
    refused(outcome, Reason.MASK)


def test_two_biases_that_cannot_be_one_are_refused(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (q @ k.mT + a + b).softmax(-1) @ v

    refused(rewritten(fn, *qkv(), torch.randn(S, T), torch.randn(H, S, T)), Reason.MASK, "2 masks")


def test_scores_of_integers_are_refused(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.long() @ k.long().mT).float().softmax(-1) @ v

    refused(rewritten(fn, *qkv()), Reason.DTYPE, "scores from torch.int64")


def test_operands_of_several_dtypes_are_refused(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q.double() @ k.double().mT).softmax(-1).float() @ v

    refused(rewritten(fn, *qkv()), Reason.DTYPE, "operands of dtypes")


def test_a_mask_on_reshaped_scores_is_refused(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = ((q @ k.mT) + additive(m)).view(B * H, S, T)
        return torch.bmm(scores.softmax(-1), v.reshape(B * H, T, D))

    refused(rewritten(fn, *qkv(), a_mask(S, T)), Reason.LAYOUT, "reshaped scores")


def test_heads_folded_into_the_batch_stay_right(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT).view(B * H, S, T)
        return torch.bmm(scores.softmax(-1), v.reshape(B * H, T, D))

    rewritten(fn, *qkv()).assert_equal()


def test_permuted_keys_are_read_in_their_own_order(rewritten: Rewritten) -> None:
    # T equals D: only the index tells which dimension of K is summed.
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k).softmax(-1) @ v.mT

    outcome = rewritten(fn, *qkv(t=D))
    outcome.assert_equal()
    assert len(outcome.sites) == 1


def test_keys_of_another_batch_order_are_refused(rewritten: Rewritten) -> None:
    # B equals H here: the key's heads stand where the query's batch is.
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.flip(0).transpose(0, 1).mT).softmax(-1) @ v

    q, k, v = (torch.randn(2, 2, n, D) for n in (S, T, T))
    rewritten(fn, q, k, v).assert_equal()


def test_diagonal_products_are_refused(rewritten: Rewritten) -> None:
    # One set of keys a query row: nothing that attention can read.
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhqd,bhqkd->bhqk", q, k)
        return torch.einsum("bhqk,bhqkd->bhqd", scores.softmax(-1), v)

    q = torch.randn(B, H, S, D)
    k, v = torch.randn(B, H, S, T, D), torch.randn(B, H, S, T, D)
    outcome = rewritten(fn, q, k, v)
    outcome.assert_equal()
    assert not outcome.sites


@pytest.mark.parametrize("operand", ["query", "key", "value"])
def test_an_operand_written_between_its_read_and_its_use_is_refused(
    operand: str, rewritten: Rewritten
) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k[:, :, :T].mT).softmax(-1)
        {"query": q, "key": k, "value": v}[operand].mul_(2.0)
        return weights @ v[:, :, :T]

    refused(rewritten(fn, *qkv()), Reason.MUTATION)


def test_scores_written_through_a_view_are_refused(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores[..., 0] = -5.0
        return scores.softmax(-1) @ v

    refused(rewritten(fn, *qkv()), Reason.USERS)


def test_a_mask_written_after_it_was_added_is_not_read_again(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = q @ k.mT + m
        m.zero_()
        return scores.softmax(-1) @ v

    outcome = rewritten(fn, *qkv(), torch.randn(S, T))
    refused(outcome, Reason.MUTATION, "the mask")


# -- what is no attention at all ---------------------------------------------------------------------


def _router(x: Tensor, gate: Tensor, experts: Tensor) -> Tensor:
    weights, chosen = (x @ gate).softmax(-1).topk(2, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    return (experts[chosen] * weights[..., None]).sum(-2)


def _top_k_first(x: Tensor, gate: Tensor, experts: Tensor) -> Tensor:
    values, chosen = (x @ gate).topk(2, dim=-1)
    scattered = torch.zeros(x.shape[0], gate.shape[1]).scatter(-1, chosen, values.softmax(-1))
    return torch.einsum("ne,ed->nd", scattered, experts)


def _output_distribution(x: Tensor, gate: Tensor, experts: Tensor) -> Tensor:
    return (x @ gate).softmax(-1)


@pytest.mark.parametrize("fn", [_router, _top_k_first, _output_distribution])
def test_routers_and_output_softmaxes_are_no_attention(fn: Any, rewritten: Rewritten) -> None:
    outcome = rewritten(fn, torch.randn(5, D), torch.randn(D, 4), torch.randn(4, 7))
    outcome.assert_equal()
    assert not outcome.sites
    assert not outcome.rejects, [str(r) for r in outcome.rejects]


def test_a_number_of_heads_that_is_not_known_is_refused(rewritten: Rewritten) -> None:
    def fn(x: Tensor) -> Tensor:
        heads = (x[..., None] * torch.arange(1.0, 1.0 + D)).transpose(1, 2)
        return (heads @ heads.mT).softmax(-1) @ heads

    outcome = rewritten(fn, torch.randn(2, 5, 3), symbolic=True, others=[(torch.randn(2, 6, 4),)])
    refused(outcome, Reason.SHAPE, "heads is not static")


def test_two_forbidding_masks_stay_right(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(a == 0, -math.inf).masked_fill(b == 0, LOWEST)
        return scores.softmax(-1) @ v

    outcome = rewritten(fn, *qkv(), a_mask(S, T), a_mask(B, 1, S, T))
    outcome.assert_equal()


def test_a_forbidding_mask_of_unknown_making_stays_right(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = torch.logical_xor(a, b) & ~torch.eye(S, T, dtype=torch.bool)
        hidden[:, 1] = False
        return (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1) @ v

    rewritten(fn, *qkv(), a_mask(S, T), torch.rand(S, T) > 0.5).assert_equal()


def test_a_forbidding_mask_that_is_written_stays_right(rewritten: Rewritten) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(a, -math.inf)
        a.zero_()
        return scores.softmax(-1) @ v

    hidden = ~a_mask(S, T)
    rewritten(fn, *qkv(), hidden).assert_equal()


def test_keys_and_values_whose_repeats_cannot_be_undone_together_stay_right(
    rewritten: Rewritten,
) -> None:
    # Keys of two heads and values of four, of another batch layout.
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.repeat_interleave(2, 1)
        v = v.transpose(0, 1).contiguous().transpose(0, 1)
        return (q @ k.mT).softmax(-1) @ v

    q, k, _ = qkv(kv_heads=2)
    rewritten(fn, q, k, torch.randn(B, H, T, D)).assert_equal()
