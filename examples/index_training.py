"""What training an index adds to the decoder of yoco_decoder.py: its teacher, its loss, what it recovers.

One forward over whole sequences, without a cache to fill. The decoder's modules are called as they are; only
the cross layers' attention is spelled again here, because the teacher is what the model throws away: the
probabilities of its cross-attention, averaged over layers and heads (arXiv 2606.06467):

    A = 1 / (L H)  sum over layers, heads of softmax(Q K^T),     loss = KL(A || softmax(I))
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from yoco_decoder import Config, Decoder, Indexer, Memory, select, split_heads

Mask = Tensor | None


@dataclass(frozen=True)
class Seen:
    """What a forward over [B, S] tokens leaves behind; all but logits are None where they were not asked for.

    scores: I [B, S, S]. allowed: who may read whom, [S, S] or after a selection [B, S, S]. teacher: the mean
    probabilities [B, S, S] of cross-attention over `allowed`, without a gradient.
    """

    logits: Tensor
    scores: Tensor | None = None
    allowed: Mask = None
    teacher: Tensor | None = None


def new_decoder(config: Config) -> Decoder:
    """Returns a decoder to train: small normal weights, and smaller ones where they add to the residual."""
    if config.attention != "yoco-clsa":
        raise ValueError(f"only yoco-clsa has the one indexer that is trained here, not {config.attention}")
    model = Decoder(config)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
            torch.nn.init.normal_(
                weight, std=0.02 if name.startswith("embedding") else weight.shape[1] ** -0.5
            )
            weight.data.mul_((2 * config.layers) ** -0.5 if adds else 1.0)
    return model


def indexer_of(model: Decoder) -> Indexer:
    """Returns the one indexer that all cross layers hold."""
    found: Any = model.layers[-1].attention
    return found.indexer


def split_weights(model: Decoder) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the weights of the backbone and those of the indexer, each once, by name."""
    own = set(indexer_of(model).parameters())
    named = dict(model.named_parameters())  # shared ones once
    backbone = {name: weight for name, weight in named.items() if weight not in own}
    return backbone, {name: weight for name, weight in named.items() if weight in own}


def look(model: Decoder, ids: Tensor, *, topk: int | None = None, teach: bool = False) -> Seen:
    """Runs the decoder over ids [B, S]: dense, or over the `topk` tokens that the index selects."""
    config = model.config
    positions = torch.arange(ids.shape[1], device=ids.device)
    step = model.new_step(positions, model.new_cache(len(ids)), ids.shape[1])
    x = model.embedding(ids)
    for layer in model.layers[: config.self_layers]:
        x = layer(x, None, step)
    memory = model.remember(x, step)
    scores, allowed = None, step.causal
    if topk is not None or teach:
        scores = index_scores(indexer_of(model), memory.hidden)
    if topk is not None:
        assert scores is not None
        allowed = select(scores.detach(), step.causal, topk)
    sums = torch.zeros(()) if teach else None
    cross = model.layers[config.self_layers :]
    for layer in cross:
        attention: Any = layer.attention
        q = split_heads(attention.query(layer.attention_norm(x)), config.heads)
        if teach:
            sums = sums.to(q.device) + mean_probabilities(q, memory.k, allowed)
        x = x + attention.out(attend(q, memory, None if topk is None else allowed))
        x = x + layer.mlp(layer.mlp_norm(x))
    teacher = sums / len(cross) if teach else None
    return Seen(model.head(model.norm(x)), scores, allowed, teacher)


def index_scores(indexer: Indexer, hidden: Tensor) -> Tensor:
    """Returns I = Q K^T [B, S, S] of H [B, S, hidden], in float32 so that near scores do not tie."""
    q, k = indexer.query(hidden).float(), indexer.key(hidden).float()
    with torch.autocast(q.device.type, enabled=False):
        return q @ k.transpose(-1, -2)


def attend(q: Tensor, memory: Memory, allowed: Mask) -> Tensor:
    """Attends from q [B, H, S, D] to the memory, causally or to what is allowed; returns [B, S, H * D]."""
    # Heads are repeated because the kernel that takes a mask takes no groups.
    groups = q.shape[1] // memory.k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (memory.k, memory.v))
    mask = None if allowed is None else allowed.unsqueeze(-3)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2).flatten(-2)


@torch.no_grad()
def mean_probabilities(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
    """Returns the probabilities [B, S, T] of q [B, H, S, D] over k [B, Hkv, T, D], the mean over heads."""
    groups = q.shape[1] // k.shape[1]
    total = torch.zeros((), device=q.device)
    for head in range(q.shape[1]):  # one [B, S, T] at a time
        scores = (q[:, head] @ k[:, head // groups].transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        total = total + scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return total / q.shape[1]


def divergence(seen: Seen) -> Tensor:
    """Returns KL(teacher || softmax(I)) over what was allowed, in nats, the mean over tokens."""
    assert seen.scores is not None
    assert seen.allowed is not None
    assert seen.teacher is not None
    student = seen.scores.masked_fill(~seen.allowed, -torch.inf).log_softmax(-1)
    student = student.masked_fill(~seen.allowed, 0.0)
    return (torch.xlogy(seen.teacher, seen.teacher) - seen.teacher * student).sum(-1).mean()


def next_token_loss(
    logits: Tensor, ids: Tensor, *, start: int = 0, known: Mask = None, emphasis: float = 1.0
) -> Tensor:
    """Returns the mean cross-entropy in nats of tokens after position `start`; `known` ones count more."""
    wanted = ids[:, start + 1 :]
    losses = F.cross_entropy(logits[:, start:-1].flatten(0, 1).float(), wanted.flatten(), reduction="none")
    if known is None:
        return losses.mean()
    weights = torch.where(known[:, start + 1 :].flatten(), emphasis, 1.0)
    return (losses * weights).sum() / weights.sum()


@dataclass(frozen=True)
class Coverage:
    """The share of dense attention mass that k tokens hold, by who chooses them.

    best: attention's own top k, which no index can pass. recent: the last k tokens. chance: any k.
    """

    index: float
    best: float
    recent: float
    chance: float


@torch.no_grad()
def coverage(seen: Seen, topk: int) -> Coverage:
    """Measures a dense forward with a teacher, in the rows that see more than `topk` tokens."""
    assert seen.scores is not None
    assert seen.teacher is not None
    size = seen.teacher.shape[-1]
    rows = torch.arange(topk, size, device=seen.teacher.device)
    teacher, causal = seen.teacher[:, topk:], seen.allowed[topk:]

    def mass(scores: Tensor) -> float:
        return teacher.masked_fill(~select(scores, causal, topk), 0.0).sum(-1).mean().item()

    age = torch.arange(size, device=rows.device).float().expand_as(teacher)
    chance = (topk / (rows + 1)).mean().item()
    return Coverage(mass(seen.scores[:, topk:]), mass(teacher), mass(age), chance)
