"""Training an index: its weights, its loss on one sequence, and a step that moves them.

The loss is the paper's (CLSA, arXiv 2606.06467): the divergence from the mean attention of a group's layers
and heads to the softmax of the index's score. It is taken in some rows of a sequence, so nothing is T x T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from clsa_compile.calibration.attend import Operands, Tokens
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.graphs import Probe, Probed
from clsa_compile.calibration.records import Taps
from clsa_compile.ir.routing import Index, Pool

__all__ = ["FORMS", "TARGETS", "Loss", "best_heads", "divergence", "initial", "losses"]

# Scores that an index can have, by name. A mixture of softmaxes is what mean attention is: the weight of a
# head is then the logarithm of its part, less the logarithm of its sum.
FORMS = {"mixture": "sum: exp(dot + weight)", "lightning": "sum: weight*Max(0, dot)"}
# What an index may learn, by name: where its layers look, or what that is worth to the loss (`records`).
TARGETS = ("attention", "worth")
# Keeps the mixture's sums near 1, so that no score is too large for single precision.
SPREAD = 1e-4


@dataclass(frozen=True, slots=True)
class Loss:
    """What an index loses on one sequence: the divergence, and what is added to it while training."""

    divergence: Tensor
    added: Tensor


def initial(index: Index, query: Tensor, width: int, heads: int, length: int) -> dict[str, Tensor]:
    """Returns the weights that training begins with: the layer's own queries, and heads that count alike.

    query: the weight that makes the layer's queries; width: of what they are made of; heads: of the index;
    length: of a sequence, whose logarithm a softmax over equal scores has for a sum.
    """
    start = -math.log(heads * length) if index.score == FORMS["mixture"] else 1 / heads
    weights = (query.detach().float().clone(), torch.zeros(heads, width), torch.full((heads,), start))
    return dict(zip(index.tensor_names(), (w.to(query.device) for w in weights), strict=True))


@dataclass(slots=True)
class _Seen:
    """What taps of one forward leave behind in some rows: what the index of each group is to learn."""

    pools: Sequence[Pool]
    rows: Tensor
    targets: dict[int, Tensor] = field(default_factory=dict)
    allowed: dict[int, Tensor | None] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)
    anchors: dict[int, Tensor] = field(default_factory=dict)
    taps: Taps = field(default_factory=Taps)

    def attention(self, layer: int, call: Operands, out: Tensor, _: Tokens | None) -> Tensor:
        """Adds a layer's attention to its group's, and keeps what its first layer's key heads look at."""
        self._mask(layer, call)
        i, pool = self._of(layer)
        with torch.no_grad():
            probabilities = call.probabilities(self.rows, call.k.shape[2])[0]
            seen = probabilities.mean(0)
            self._add(i, seen / len(pool.members))
            if layer == pool.anchor:
                self.anchors[i] = probabilities.view(call.k.shape[1], -1, *seen.shape).sum(1)
        return out

    def worth(self, layer: int, call: Operands, out: Tensor, chosen: Tokens | None) -> Tensor:
        """Keeps a layer until the gradient of its output is known."""
        self._mask(layer, call)
        return self.taps.tap(layer, call, out, chosen)

    def weigh(self, probe: Probe, found: Probed, seed: int) -> None:
        """Makes the targets of what tokens are worth to the loss of the rows, and of those between them."""
        self.taps.backward(probe.logits, found.hidden, found.others, int(self.rows.min()), seed)
        for layer, worth in enumerate(self.taps.worth(self.rows)):
            self._add(self._of(layer)[0], worth)
        for i, total in self.targets.items():
            self.targets[i] = total / total.sum(-1, keepdim=True).clamp(min=1e-30)

    def _add(self, i: int, part: Tensor) -> None:
        self.targets[i] = self.targets[i] + part if i in self.targets else part

    def _mask(self, layer: int, call: Operands) -> None:
        """Keeps what a group's first layer may read, and how its dot products are scaled."""
        i, pool = self._of(layer)
        if layer == pool.anchor:
            self.allowed[i], self.scales[i] = call.allowed(self.rows, call.k.shape[2]), call.scale

    def _of(self, layer: int) -> tuple[int, Pool]:
        return next((i, pool) for i, pool in enumerate(self.pools) if layer in pool.members)


def losses(
    probe: Probe,
    pools: Sequence[Pool],
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    rows: Tensor,
    seed: int | None = None,
) -> list[Loss]:
    """Returns the loss of each pool's index in some rows [n] of ids [1, T].

    What is learned is the mean attention of a pool's layers or, given the seed of the labels that the loss
    of the model is taken with, what tokens are worth to it. Gradients reach `tensors` alone.
    """
    seen = _Seen(pools, rows)
    found = probe.run(ids, seen.attention if seed is None else seen.worth, tensors)
    if seed is not None:
        seen.weigh(probe, found, seed)
    return [
        _loss(pool, found.operands[i], seen.targets[i], seen.allowed[i], seen.scales[i], rows)
        for i, pool in enumerate(pools)
    ]


def _loss(
    pool: Pool,
    operands: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    allowed: Tensor | None,
    scale: float,
    rows: Tensor,
) -> Loss:
    assert pool.index is not None
    q, k, weight = operands
    q, weight = q[0][:, rows].float(), weight[0][:, rows, None].float()
    heads, n, width = q.shape
    grouped = q.reshape(k.shape[1], -1, width)
    dot = (grouped @ k[0].float().transpose(-1, -2)).mul(scale).view(heads, n, -1)
    mixture = pool.index.score == FORMS["mixture"]
    scores = (dot + weight).logsumexp(0) if mixture else (dot.relu() * weight).sum(0)
    if allowed is not None:
        scores = scores.masked_fill(~allowed.reshape(-1, scores.shape[-1]), -math.inf)
    added = SPREAD * scores.logsumexp(-1).square().mean() if mixture else scores.new_zeros(())
    return Loss(divergence(scores, target), added)


def divergence(scores: Tensor, target: Tensor) -> Tensor:
    """Returns the mean over rows of KL(target || softmax(scores)), both [n, T]; scores may be -inf."""
    logs = scores - scores.logsumexp(-1, keepdim=True)
    # What is not a number must stay one: training stops then.
    readable = target != 0
    parts = target * (target.clamp(min=1e-30).log() - logs.masked_fill(~readable, 0.0))
    return torch.where(readable, parts, 0.0).sum(-1).mean()


def best_heads(
    known: Model, pools: Sequence[Pool], looked_at: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Pool, ...]:
    """Returns pools whose indices read the run of key heads that finds most of what their groups look at.

    looked_at: ids [1, T] and rows [n] of some sequences. A run is judged by the anchor's own attention: what
    its best tokens by these heads have of the group's mean attention.
    """
    kept = [torch.zeros(0)] * len(pools)
    for ids, rows in looked_at:
        ids = ids.to(known.device)
        seen = _Seen(pools, rows)
        known.forward(ids).graph().run(ids, seen.attention)
        for i, pool in enumerate(pools):
            found = _recovered(seen.anchors[i], seen.targets[i], pool)
            kept[i] = kept[i] + found if len(kept[i]) else found
    chosen = []
    for pool, found in zip(pools, kept, strict=True):
        assert pool.index is not None
        chosen.append(replace(pool, index=replace(pool.index, first_head=int(found.argmax()))))
    return tuple(chosen)


def _recovered(heads: Tensor, target: Tensor, pool: Pool) -> Tensor:
    """Returns by run of key heads [Hkv, n, T] what its best tokens have of a target [n, T]."""
    assert pool.index is not None
    runs = heads.unfold(0, pool.index.kv_heads, 1).sum(-1)
    best = runs.topk(min(pool.topk, target.shape[-1]), -1).indices
    return target.expand_as(runs).gather(-1, best).sum(-1).mean(-1).cpu()
