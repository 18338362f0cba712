"""The indexer behind a selection: its spellings, its near misses, and what becomes of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from clsa_compile.ir.masks import B_, KV_, Q_
from clsa_compile.ir.sites import MaskSpec, Operand, Reason
from clsa_compile.passes.patterns.indexer import implies

Rewritten = Callable[..., Any]
B, H, HI, D, DI, K = 2, 4, 32, 8, 4, 4
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Sizes:
    """Query rows and key slots: a prefill by default."""

    s: int = 10
    t: int = 10


def inputs(sizes: Sizes = Sizes()) -> dict[str, Tensor]:
    torch.manual_seed(0)
    kept = torch.ones(B, sizes.t, dtype=torch.bool)
    kept[0, :2] = False
    return {
        "q": torch.randn(B, H, sizes.s, D),
        "k": torch.randn(B, H, sizes.t, D),
        "v": torch.randn(B, H, sizes.t, D),
        "iq": torch.randn(B, sizes.s, HI, DI),
        "ik": torch.randn(B, sizes.t, DI),
        "w": torch.randn(B, sizes.s, HI),
        "kept": kept,
    }


Env = dict[str, Any]


def causal(e: Env) -> Tensor:
    s, t = e["q"].shape[2], e["k"].shape[2]
    return torch.arange(t)[None] <= torch.arange(s)[:, None] + (t - s)


def visible(e: Env) -> Tensor:
    """What a row may see, [B, S, T]: causal, and no padding."""
    return causal(e)[None] & e["kept"][:, None, :]


# -- how the score is spelled ----------------------------------------------------------------------


def heads_as_rows(e: Env) -> Tensor:
    dot = torch.matmul(e["iq"].transpose(1, 2), e["ik"][:, None].mT) * 0.5
    return (torch.relu(dot) * e["w"].transpose(1, 2)[..., None]).sum(1)


def products(e: Env) -> Tensor:
    dot = torch.einsum("bshd,btd->bsht", e["iq"], e["ik"]) * 0.5
    return torch.einsum("bsh,bsht->bst", e["w"], F.relu(dot))


def matrices(e: Env) -> Tensor:
    dot = torch.matmul(e["iq"].float(), e["ik"].float().mT.unsqueeze(1)) * 0.5
    return torch.matmul(e["w"].unsqueeze(-2), dot.clamp_min(0)).squeeze(-2)


def scaled_after_relu(e: Env) -> Tensor:
    dot = torch.einsum("bshd,btd->bsht", e["iq"], e["ik"])
    return ((F.relu(dot) * 0.5) * e["w"][..., None]).sum(2)


def plain_sum(e: Env) -> Tensor:
    return torch.einsum("bshd,btd->bsht", e["iq"], e["ik"]).sum(dim=2)


def mean_of_heads(e: Env) -> Tensor:
    return torch.einsum("bshd,btd->bsht", e["iq"], e["ik"]).mul(0.3).mean(2)


def largest_head(e: Env) -> Tensor:
    return torch.einsum("bshd,btd->bsht", e["iq"], e["ik"]).amax(2)


def one_head(e: Env) -> Tensor:
    return e["iq"][:, :, 0] @ e["ik"].mT


SCORES = {
    heads_as_rows: "sum: weight*Max(0, dot)",
    products: "sum: weight*Max(0, dot)",
    matrices: "sum: weight*Max(0, dot)",
    scaled_after_relu: "sum: 0.5*weight*Max(0, dot)",
    plain_sum: "sum: dot",
    mean_of_heads: "sum: dot",  # ranks alike
    largest_head: "max: dot",
    one_head: "sum: dot",
}


@dataclass(frozen=True)
class Model:
    """A sparse attention, one part at a time exchangeable."""

    score: Callable[[Env], Tensor] = products
    index_mask: Callable[[Env, Tensor], Tensor] = lambda e, x: x.masked_fill(~visible(e), -math.inf)
    select: Callable[[Env, Tensor], Tensor] = lambda e, x: x.topk(min(K, x.shape[-1]), dim=-1).indices
    scatter: Callable[[Env, Tensor], Tensor] = lambda e, i: torch.zeros(
        B, e["q"].shape[2], e["k"].shape[2], dtype=torch.bool
    ).scatter(-1, i, True)
    attend_mask: Callable[[Env], Tensor] = visible
    written_out: bool = False

    def __call__(self, e: Env) -> Any:
        scores = self.index_mask(e, self.score(e))
        mask = self.scatter(e, self.select(e, scores)) & self.attend_mask(e)
        mask = mask[:, None] if mask.dim() == 3 else mask
        if self.written_out:
            weights = (e["q"] @ e["k"].mT * 0.3).masked_fill(~mask, LOWEST).softmax(-1)
            return weights @ e["v"]
        return F.scaled_dot_product_attention(e["q"], e["k"], e["v"], attn_mask=mask)

    def of(self, values: dict[str, Tensor]) -> Callable[..., Any]:
        return lambda *tensors: self(dict(zip(values, tensors, strict=True)))


def run(rewritten: Rewritten, model: Any, sizes: Sizes = Sizes(), **more: Tensor) -> Any:
    values = inputs(sizes) | more
    return rewritten(lambda *x: model(dict(zip(values, x, strict=True))), *values.values())


def assert_valid_rows_equal(outcome: Any, sizes: Sizes = Sizes()) -> None:
    """Compares rows that may see a token: rows 0 and 1 of sequence 0 see padding alone in a prefill."""
    actual, expected = outcome.actual, outcome.expected
    if isinstance(actual, tuple):
        for one, two in zip(actual[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)
        actual, expected = actual[0], expected[0]
    first = 2 if sizes.s == sizes.t else 0
    torch.testing.assert_close(actual[0, :, first:], expected[0, :, first:], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(actual[1], expected[1], atol=2e-5, rtol=2e-5)
    assert torch.isfinite(actual).all()


# -- what is taken ---------------------------------------------------------------------------------


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(1, 10), Sizes(3, 12)], ids=str)
@pytest.mark.parametrize("written_out", [False, True])
def test_every_spelling_selects_what_the_model_selects(
    score: Any, sizes: Sizes, written_out: bool, rewritten: Rewritten
) -> None:
    outcome = run(rewritten, Model(score=score, written_out=written_out), sizes)
    assert_valid_rows_equal(outcome, sizes)
    site = outcome.site
    assert site.indexer is not None, site.note
    assert site.indexer.topk == K
    assert site.indexer.score.text == SCORES[score]
    (entry,) = outcome.decision.plan.sites
    assert (entry.kind, entry.action, entry.topk) == ("topk", "sparse", K)
    (group,) = [g for g in outcome.decision.plan.groups if g.kind == "index"]
    assert group.members == (0,)
    assert not any("aten.topk" in op for op in outcome.ops), "the model's own selection is gone"


def test_the_selection_matters_only_past_k_tokens_and_is_right_there(rewritten: Rewritten) -> None:
    # A prefill shorter than k selects everything, whatever the score: rows beyond k are the proof.
    sizes = Sizes(10, 10)
    outcome = run(rewritten, Model(), sizes)
    assert_valid_rows_equal(outcome)
    dense = run(rewritten, Model(scatter=lambda e, i: torch.ones(B, 10, 10, dtype=torch.bool)))
    torch.testing.assert_close(outcome.actual[1, :, :K], dense.actual[1, :, :K])
    assert not torch.allclose(outcome.actual[1, :, K:], dense.actual[1, :, K:], atol=1e-2)


@pytest.mark.parametrize("t", [K, K - 1])
def test_a_selection_of_everything_is_plain_attention(t: int, rewritten: Rewritten) -> None:
    outcome = run(rewritten, Model(), Sizes(1, t))
    torch.testing.assert_close(outcome.actual[1], outcome.expected[1])
    assert outcome.site.indexer is None
    assert outcome.site.takes_all
    (entry,) = outcome.decision.plan.sites
    assert (entry.kind, entry.action, entry.takes_all) == ("topk", "attention", True)


@pytest.mark.parametrize("low", [-math.inf, LOWEST])
def test_additive_masks_on_both_sides(low: float, rewritten: Rewritten) -> None:
    def model(e: Env) -> Tensor:
        allow = torch.where(visible(e), 0.0, low)
        indices = (products(e) + allow).topk(K, dim=-1).indices
        chosen = torch.full((B, 10, 10), -math.inf).scatter(-1, indices, 0.0)
        mask = (chosen + allow)[:, None]
        return F.scaled_dot_product_attention(e["q"], e["k"], e["v"], attn_mask=mask)

    outcome = run(rewritten, model)
    actual, expected = outcome.actual, outcome.expected
    torch.testing.assert_close(actual[0, :, 2:], expected[0, :, 2:], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(actual[1], expected[1], atol=2e-5, rtol=2e-5)
    assert outcome.site.indexer is not None, outcome.site.note


def test_a_materialised_mask_that_both_read(rewritten: Rewritten) -> None:
    torch.manual_seed(3)
    mask = torch.where(torch.rand(B, 1, 10, 10) > 0.5, 0.0, -math.inf)
    mask[..., 0] = 0.0

    def model(e: Env) -> Tensor:
        indices = (products(e) + e["mask"][:, 0]).topk(K, dim=-1).indices
        chosen = torch.full((B, 10, 10), -math.inf).scatter(-1, indices, 0.0)
        both = chosen[:, None] + e["mask"]
        return F.scaled_dot_product_attention(e["q"], e["k"], e["v"], attn_mask=both)

    outcome = run(rewritten, model, mask=mask)
    outcome.assert_equal()
    assert outcome.site.indexer is not None, outcome.site.note


def test_a_wider_mask_of_the_indexer_is_no_obstacle(rewritten: Rewritten) -> None:
    # The indexer masks less than attention does: what it picks too much attention drops.
    model = Model(index_mask=lambda e, x: x.masked_fill(~causal(e), -math.inf))
    outcome = run(rewritten, model)
    assert outcome.site.indexer is not None
    assert_valid_rows_equal(outcome)


def test_one_selection_of_several_layers_is_made_once(rewritten: Rewritten) -> None:
    def model(e: Env) -> tuple[Tensor, Tensor]:
        indices = products(e).masked_fill(~visible(e), -math.inf).topk(K, dim=-1).indices
        chosen = torch.zeros(B, 10, 10, dtype=torch.bool).scatter(-1, indices, True)
        mask = (chosen & visible(e))[:, None]
        one = F.scaled_dot_product_attention(e["q"], e["k"], e["v"], attn_mask=mask)
        two = F.scaled_dot_product_attention(e["v"], e["k"], e["q"], attn_mask=mask)
        return one[:, :, 2:], two[:, :, 2:]

    outcome = run(rewritten, model)
    outcome.assert_equal()
    (group,) = [g for g in outcome.decision.plan.groups if g.kind == "index"]
    assert (group.anchor, group.members, group.topk) == (0, (0, 1), K)
    sorts = sum(op.startswith("aten.sort") for op in outcome.ops)
    assert sorts == 2, "one index node: two sorts in the reference"


def test_reading_the_shape_of_scores_and_indices_needs_no_value(rewritten: Rewritten) -> None:
    def model(e: Env) -> Tensor:
        scores = products(e).masked_fill(~visible(e), -math.inf)
        indices = scores.topk(K, dim=-1).indices
        # As wide as the scores, and made of nothing else of theirs.
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)
        mask = (chosen & visible(e))[:, None]
        return F.scaled_dot_product_attention(e["q"], e["k"], e["v"], attn_mask=mask)

    outcome = run(rewritten, model)
    assert outcome.site.indexer is not None, outcome.site.note
    assert_valid_rows_equal(outcome)
    assert not any("zeros_like" in op for op in outcome.ops)


def test_unknown_lengths_keep_the_constant_k(rewritten: Rewritten) -> None:
    def model(x: Tensor, y: Tensor, iq: Tensor, ik: Tensor, w: Tensor) -> Tensor:
        def heads(z: Tensor) -> Tensor:
            return z.view(z.shape[0], z.shape[1], H, D).transpose(1, 2)

        b, s, t = x.shape[0], x.shape[1], y.shape[1]
        allow = torch.arange(t)[None] <= torch.arange(s)[:, None] + (t - s)
        iq = iq.view(b, s, HI, DI)
        scores = torch.einsum("bshd,btd->bsht", iq, ik.view(b, t, DI)).relu()
        scores = (scores * w.view(b, s, HI, 1)).sum(2).masked_fill(~allow, -math.inf)
        indices = scores.topk(torch.sym_min(K, t), dim=-1).indices
        chosen = torch.zeros(b, s, t, dtype=torch.bool).scatter(-1, indices, True)
        mask = (chosen & allow)[:, None]
        return F.scaled_dot_product_attention(heads(x), heads(y), heads(y), attn_mask=mask)

    def arguments(b: int, s: int, t: int) -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(b, n, width) for n, width in ((s, H * D), (t, H * D), (s, HI * DI), (t, DI), (s, HI))
        )

    outcome = rewritten(model, *arguments(2, 9, 11), symbolic=True, others=[arguments(3, 7, 10)])
    outcome.assert_equal()
    assert outcome.site.indexer is not None, outcome.site.note
    assert outcome.site.indexer.topk == K


# -- what is refused: the selection stays a mask ----------------------------------------------------


def as_a_mask(outcome: Any, reason: Reason, detail: str = "") -> None:
    """Checks that attention reads the model's own selection as a mask, says why, and is right."""
    site = outcome.site
    assert site.indexer is None, "the selection was taken"
    assert site.has_selection
    assert site.note.startswith("the selection is applied as a mask")
    assert f": {reason}: " in site.note, site.note
    assert detail in site.note, site.note
    (entry,) = outcome.decision.plan.sites
    assert (entry.kind, entry.action, entry.reason) == ("topk", "attention", site.note)
    assert any("aten.topk" in op for op in outcome.ops), "the model's own selection is kept"
    assert_valid_rows_equal(outcome)


def _per_head(e: Env) -> Any:
    scores = torch.einsum("bshd,btd->bhst", e["iq"][:, :, :H], e["ik"])
    scores = scores.masked_fill(~visible(e)[:, None], -math.inf)
    indices = scores.topk(K, dim=-1).indices
    chosen = torch.zeros(B, H, 10, 10, dtype=torch.bool).scatter(-1, indices, True)
    mask = chosen & visible(e)[:, None]
    return F.scaled_dot_product_attention(e["q"], e["k"], e["v"], attn_mask=mask)


def test_a_selection_of_each_head_stays_a_mask(rewritten: Rewritten) -> None:
    as_a_mask(run(rewritten, _per_head), Reason.TOPK, "one selected set per query row")


def _scores(e: Env) -> Tensor:
    return products(e).masked_fill(~visible(e), -math.inf)


def _attend(e: Env, indices: Tensor) -> Tensor:
    chosen = torch.zeros(B, 10, 10, dtype=torch.bool).scatter(-1, indices, True)
    mask = (chosen & visible(e))[:, None]
    return F.scaled_dot_product_attention(e["q"], e["k"], e["v"], attn_mask=mask)


def _indices_returned(e: Env) -> Any:
    indices = _scores(e).topk(K, dim=-1).indices
    return _attend(e, indices), indices


def _indices_counted(e: Env) -> Any:
    indices = _scores(e).topk(K, dim=-1).indices
    return _attend(e, indices), indices.float().mean()


def _values_returned(e: Env) -> Any:
    values, indices = _scores(e).topk(K, dim=-1)
    return _attend(e, indices), values


def _scores_returned(e: Env) -> Any:
    scores = _scores(e)
    return _attend(e, scores.topk(K, dim=-1).indices), scores


def _head_scores_returned(e: Env) -> Any:
    dot = torch.einsum("bshd,btd->bsht", e["iq"], e["ik"])
    scores = (dot.relu() * e["w"][..., None]).sum(2).masked_fill(~visible(e), -math.inf)
    return _attend(e, scores.topk(K, dim=-1).indices), dot


@pytest.mark.parametrize(
    "model",
    [_indices_returned, _indices_counted, _values_returned, _scores_returned, _head_scores_returned],
)
def test_a_selection_that_is_needed_elsewhere_stays_a_mask(model: Any, rewritten: Rewritten) -> None:
    as_a_mask(run(rewritten, model), Reason.USERS)


def _sigmoid(e: Env) -> Tensor:
    dot = torch.einsum("bshd,btd->bsht", e["iq"], e["ik"])
    return (torch.sigmoid(dot) * e["w"][..., None]).sum(2)


def _after_the_sum(e: Env) -> Tensor:
    return torch.tanh(products(e))


def _weights_of_keys(e: Env) -> Tensor:
    dot = torch.einsum("bshd,btd->bsht", e["iq"], e["ik"]).relu()
    return (dot * e["ik"].sum(-1)[:, None, None, :]).sum(2)


def _two_dimensions(e: Env) -> Tensor:
    dot = torch.einsum("bshd,btd->bsht", e["iq"], e["ik"])
    return dot.view(B, 10, 4, 8, 10).sum((2, 3))


def _no_product(e: Env) -> Tensor:
    return (e["iq"].sum(-1)[..., None] + e["ik"].sum(-1)[:, None, None]).sum(2)


def _shifted_relu(e: Env) -> Tensor:
    dot = torch.einsum("bshd,btd->bsht", e["iq"], e["ik"])
    return (dot.clamp_min(0.5) * e["w"][..., None]).sum(2)


def _bias_inside(e: Env) -> Tensor:
    dot = torch.einsum("bshd,btd->bsht", e["iq"], e["ik"])
    return ((dot + 1.0).relu() * e["w"][..., None]).sum(2)


@pytest.mark.parametrize(
    "score",
    [_sigmoid, _after_the_sum, _weights_of_keys, _two_dimensions, _no_product, _shifted_relu,
     _bias_inside],
)  # fmt: skip
def test_a_score_of_unknown_form_stays_a_mask(score: Any, rewritten: Rewritten) -> None:
    as_a_mask(run(rewritten, Model(score=score)), Reason.SCORE)


def test_keys_of_each_index_head_stay_a_mask(rewritten: Rewritten) -> None:
    def score(e: Env) -> Tensor:
        keys = e["ik"][:, :, None] * torch.arange(1.0, HI + 1)[:, None]
        dot = torch.einsum("bshd,bthd->bsht", e["iq"], keys)
        return (dot.relu() * e["w"][..., None]).sum(2)

    as_a_mask(run(rewritten, Model(score=score)), Reason.LAYOUT, "the index ")


def test_an_attention_that_sees_more_than_its_indexer_stays_a_mask(rewritten: Rewritten) -> None:
    # Rows with fewer than k visible tokens fill up with arbitrary ones, and attention would see them.
    model = Model(attend_mask=lambda e: e["kept"][:, None, :])
    as_a_mask(run(rewritten, model), Reason.MASK, "attention may see tokens")


def test_an_indexer_that_masks_by_other_padding_stays_a_mask(rewritten: Rewritten) -> None:
    other = torch.ones(B, 10, dtype=torch.bool)
    other[1, 3] = False
    model = Model(index_mask=lambda e, x: x.masked_fill(~(causal(e) & e["other"][:, None]), -math.inf))
    as_a_mask(run(rewritten, model, other=other), Reason.MASK, "attention may see tokens")


def test_an_indexer_whose_mask_cannot_be_read_stays_a_mask(rewritten: Rewritten) -> None:
    torch.manual_seed(1)
    a, b = torch.rand(B, 10, 10) > 0.2, torch.rand(B, 10, 10) > 0.2
    a |= torch.eye(10, dtype=torch.bool)
    b |= torch.eye(10, dtype=torch.bool)
    model = Model(index_mask=lambda e, x: x.masked_fill(~(e["a"] & e["b"]), -math.inf))
    as_a_mask(run(rewritten, model, a=a, b=b), Reason.MASK, "cannot be read")


def test_a_k_that_depends_on_the_length_stays_a_mask(rewritten: Rewritten) -> None:
    def model(x: Tensor, iq: Tensor, ik: Tensor) -> Tensor:
        b, t = x.shape[:2]
        heads = x.view(b, t, H, D).transpose(1, 2)
        allow = torch.arange(t)[None] <= torch.arange(t)[:, None]
        scores = torch.einsum("bshd,btd->bsht", iq.view(b, t, HI, DI), ik.view(b, t, DI)).sum(2)
        indices = scores.masked_fill(~allow, -math.inf).topk(t // 2, dim=-1).indices
        chosen = torch.zeros(b, t, t, dtype=torch.bool).scatter(-1, indices, True)
        mask = (chosen & allow)[:, None]
        return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)

    arguments = torch.randn(2, 9, H * D), torch.randn(2, 9, HI * DI), torch.randn(2, 9, DI)
    outcome = rewritten(model, *arguments, symbolic=True)
    outcome.assert_equal()
    assert outcome.site.indexer is None
    assert "not a constant" in outcome.site.note


def test_index_heads_that_are_not_known_stay_a_mask(rewritten: Rewritten) -> None:
    def model(x: Tensor, iq: Tensor, ik: Tensor) -> Tensor:
        b, t = x.shape[:2]
        heads = x.view(b, t, H, D).transpose(1, 2)
        allow = torch.arange(t)[None] <= torch.arange(t)[:, None]
        scores = torch.einsum("bshd,btd->bsht", iq, ik).sum(2).masked_fill(~allow, -math.inf)
        indices = scores.topk(torch.sym_min(K, t), dim=-1).indices
        chosen = torch.zeros(b, t, t, dtype=torch.bool).scatter(-1, indices, True)
        mask = (chosen & allow)[:, None]
        return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)

    arguments = torch.randn(2, 9, H * D), torch.randn(2, 9, 7, 5), torch.randn(2, 9, 5)
    outcome = rewritten(model, *arguments, symbolic=True)
    outcome.assert_equal()
    assert outcome.site.indexer is None
    assert ": shape: " in outcome.site.note


def test_an_index_key_written_between_its_product_and_the_selection_stays_a_mask(
    rewritten: Rewritten,
) -> None:
    def model(e: Env) -> Tensor:
        scores = products(e).masked_fill(~visible(e), -math.inf)
        e["ik"].mul_(2.0)
        return _attend(e, scores.topk(K, dim=-1).indices)

    as_a_mask(run(rewritten, model), Reason.MUTATION, "the index key")


def test_a_mask_on_reshaped_index_scores_stays_a_mask(rewritten: Rewritten) -> None:
    def model(e: Env) -> Tensor:
        scores = products(e).mT.masked_fill(~visible(e).mT, -math.inf).mT
        return _attend(e, scores.topk(K, dim=-1).indices)

    as_a_mask(run(rewritten, model), Reason.LAYOUT, "reshaped scores")


def test_index_query_and_key_of_different_dtypes_stay_right(rewritten: Rewritten) -> None:
    def score(e: Env) -> Tensor:
        dot = torch.einsum("bshd,btd->bsht", e["iq"], e["ik"].half().float())
        return (dot.relu() * e["w"][..., None]).sum(2)

    assert_valid_rows_equal(run(rewritten, Model(score=score)))


def test_widened_index_operands_are_read_in_their_narrow_dtype(rewritten: Rewritten) -> None:
    def score(e: Env) -> Tensor:
        iq, ik = e["iq"].half().float(), e["ik"].half().float()
        return (torch.einsum("bshd,btd->bsht", iq, ik).relu() * e["w"][..., None]).sum(2)

    outcome = run(rewritten, Model(score=score))
    assert_valid_rows_equal(outcome)
    assert outcome.site.indexer.q.root.meta["val"].dtype == torch.float16


def test_opposite_masks_are_not_one(rewritten: Rewritten) -> None:
    # Attention may read what the indexer may not: the same tensor, once as it is and once negated.
    torch.manual_seed(3)
    hidden = torch.rand(B, 10, 10) > 0.6
    hidden |= torch.eye(10, dtype=torch.bool)
    model = Model(
        index_mask=lambda e, x: x.masked_fill(e["hidden"], -math.inf),
        attend_mask=lambda e: e["hidden"],
        scatter=lambda e, i: torch.zeros(B, 10, 10, dtype=torch.bool).scatter(-1, i, True),
    )

    def either(e: Env) -> Tensor:
        scores = e["iq"][:, :, 0] @ e["ik"].mT
        indices = scores.masked_fill(e["hidden"], -math.inf).topk(K, dim=-1).indices
        chosen = torch.zeros(B, 10, 10, dtype=torch.bool).scatter(-1, indices, True)
        mask = (chosen & e["hidden"])[:, None]
        out = F.scaled_dot_product_attention(e["q"], e["k"], e["v"], attn_mask=mask)
        return torch.where(mask.any(-1, keepdim=True), out, 0.0)

    for fn in (model, either):
        outcome = run(rewritten, fn, hidden=hidden)
        outcome.actual, outcome.expected = (torch.nan_to_num(x) for x in (outcome.actual, outcome.expected))
        outcome.assert_equal()


# -- one mask implies another ------------------------------------------------------------------------


def test_implication_holds_only_where_it_is_sure() -> None:
    causal_, window = sympy.Le(KV_, Q_), sympy.Gt(KV_, Q_ - 4)
    both = MaskSpec(sympy.And(causal_, window))
    assert implies(both, MaskSpec(causal_))
    assert implies(both, both)
    assert implies(both, MaskSpec())
    assert not implies(MaskSpec(causal_), both)
    assert not implies(MaskSpec(), MaskSpec(causal_))
    assert not implies(MaskSpec(sympy.Or(causal_, sympy.Eq(B_, 0))), MaskSpec(causal_))


def test_a_tensor_that_forbids_is_not_one_that_allows(trace: Any) -> None:
    captured = trace(lambda a: ~a, torch.rand(B, 10, 10) > 0)
    (a,) = (n for n in captured.graph.nodes if n.op == "placeholder")
    allows = MaskSpec(tensor=Operand(a, (0, None, 1, 2)))
    forbids = replace(allows, forbids=True)
    assert implies(allows, allows)
    assert implies(forbids, forbids)
    assert not implies(allows, forbids)
    assert not implies(forbids, allows)


def test_implication_compares_tensors_by_identity(trace: Any) -> None:
    captured = trace(lambda a, b: a & b, torch.rand(B, 10) > 0, torch.rand(B, 10) > 0)
    a, b = (n for n in captured.graph.nodes if n.op == "placeholder")
    load = sympy.Function("in0", integer=True)(B_, KV_)
    of_a, of_b = (MaskSpec(sympy.Ne(load, 0), (n,)) for n in (a, b))
    assert implies(of_a, of_a)
    assert not implies(of_a, of_b)
    assert not implies(of_a, replace(of_a, inputs=(b,)))
