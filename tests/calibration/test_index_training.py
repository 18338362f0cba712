"""Training an index: the loss is the paper's, row by row in float64; gradients reach the index alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.calibration.given import Model
from clsa_compile.calibration.index_training import FORMS, best_heads, initial, losses
from clsa_compile.calibration.stages import Stages
from clsa_compile.ir.routing import Index, Pool

TOPK = 8
ROWS = torch.tensor([9, 20, 47])


@pytest.fixture
def known(model: Any, tokens: list[Tensor]) -> Model:
    return Model(model, tokens[0][:1], Stages(None))


def pools(score: str, kv_heads: int = 2, first: int = 0) -> tuple[Pool, ...]:
    members = ((0, 1, 2), (3, 4))
    indices = (Index(str(i), FORMS[score], first, kv_heads) for i in range(2))
    return tuple(Pool(m[0], TOPK, {}, m, index=i) for m, i in zip(members, indices, strict=True))


def weights(known: Model, made: tuple[Pool, ...], ids: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    for pool in made:
        assert pool.index is not None
        weight, width = known.forward(ids).product(pool.anchor)
        begun = initial(pool.index, weight, width, 2 * pool.index.kv_heads, ids.shape[1])
        found |= {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in begun.items()}
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def attention(known: Model, ids: Tensor, members: tuple[int, ...]) -> tuple[Tensor, Any]:
    """The mean probabilities [T, T] of some layers in float64, and the first one's operands."""
    calls: dict[int, Any] = {}

    def tap(layer: int, call: Any, out: Tensor, _: Any) -> Tensor:
        calls[layer] = call
        return out

    with torch.no_grad():
        known.forward(ids).graph().run(ids, tap)
    total = 0.0
    for layer in members:
        q, k = calls[layer].q.double(), calls[layer].k.double().repeat_interleave(2, 1)
        scores = (q @ k.mT * calls[layer].scale).masked_fill(~_causal(ids), -torch.inf)
        total = total + scores.softmax(-1)[0].mean(0) / len(members)
    return torch.as_tensor(total), calls[members[0]]


def _causal(ids: Tensor) -> Tensor:
    return torch.ones(ids.shape[1], ids.shape[1]).tril().bool()


@pytest.mark.parametrize("score", FORMS)
@pytest.mark.parametrize(("kv_heads", "first"), [(2, 0), (1, 1)])
def test_the_loss_is_the_divergence_of_each_row(
    score: str, kv_heads: int, first: int, known: Model, tokens: list[Tensor]
) -> None:
    ids = tokens[0][:1]
    made = pools(score, kv_heads, first)
    tensors = weights(known, made, ids)
    probe = known.forward(ids).probe(made, tensors)
    found = losses(probe, made, tensors, ids, ROWS)
    run = probe.run(ids, lambda *a: a[2], tensors)
    for pool, loss, operands in zip(made, found, run.operands, strict=True):
        target, call = attention(known, ids, pool.members)
        q, k, weight = (x[0].detach().double() for x in operands)
        torch.testing.assert_close(k.float(), call.k[0, first : first + kv_heads])
        dot = q @ k.repeat_interleave(2, 0).mT * call.scale
        points = torch.exp(dot + weight[..., None]) if score == "mixture" else dot.relu() * weight[..., None]
        logits = points.sum(0).log() if score == "mixture" else points.sum(0)
        logs = logits.masked_fill(~_causal(ids), -torch.inf).log_softmax(-1)
        wanted = 0.0
        for row in ROWS.tolist():
            t = target[row, : row + 1]
            wanted += float((t * (t.log() - logs[row, : row + 1])).sum()) / len(ROWS)
        assert abs(float(loss.divergence) - wanted) < 1e-4 * max(1.0, wanted)
        assert wanted > 0.01


def test_gradients_reach_all_weights_of_the_index_and_none_of_the_model(
    model: Any, known: Model, tokens: list[Tensor]
) -> None:
    ids = tokens[0][:1]
    made = pools("lightning")
    tensors = weights(known, made, ids)
    probe = known.forward(ids).probe(made, tensors)
    with torch.enable_grad():
        for loss in losses(probe, made, tensors, ids, ROWS):
            loss.divergence.backward()
    assert all(t.grad is not None and bool((t.grad != 0).any()) for t in tensors.values())
    assert all(p.grad is None for p in model.parameters())


def test_a_mixture_begins_as_what_its_first_layer_looks_at(known: Model, tokens: list[Tensor]) -> None:
    """With one head's own queries and any weight, the softmax of its score is that head's attention."""
    ids = tokens[0][:1]
    pool = Pool(0, TOPK, {}, (0,), index=Index("0", FORMS["mixture"], 0, 1))
    weight, width = known.forward(ids).product(0)
    assert pool.index is not None
    tensors = initial(pool.index, weight, width, 2, ids.shape[1])
    bias = tensors["0.bias"]
    bias[1] = -1e4  # the second head counts nothing
    probe = known.forward(ids).probe((pool,), tensors)
    (operands,) = probe.run(ids, lambda *a: a[2], tensors).operands
    q, k, w = operands
    found = (q[0] @ k[0].mT * 0.25 + w[0][..., None]).logsumexp(0).masked_fill(~_causal(ids), -torch.inf)
    _, call = attention(known, ids, (0,))
    head = (call.q[0, 0] @ call.k[0, 0].mT * call.scale).masked_fill(~_causal(ids), -torch.inf)
    torch.testing.assert_close(found.softmax(-1), head.softmax(-1), atol=1e-5, rtol=1e-4)


def test_the_key_heads_that_find_most_are_chosen(known: Model, tokens: list[Tensor]) -> None:
    ids = tokens[0][:1]
    chosen = best_heads(known, pools("mixture", kv_heads=1), [(ids, ROWS)])
    for pool in chosen:
        target, call = attention(known, ids, pool.members)
        q, k = call.q[0].double(), call.k[0].double().repeat_interleave(2, 0)
        scores = (q @ k.mT * call.scale).masked_fill(~_causal(ids), -torch.inf).softmax(-1)
        kept = []
        for head in range(2):
            mass = scores[2 * head : 2 * head + 2].sum(0)[ROWS]
            best = mass.topk(TOPK, -1).indices
            kept.append(float(target[ROWS].gather(-1, best).sum()))
        assert pool.index is not None
        assert abs(kept[0] - kept[1]) > 1e-4
        assert pool.index.first_head == kept.index(max(kept))
