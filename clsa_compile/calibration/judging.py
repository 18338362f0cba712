"""Judging: runs the dense model and shared ones over the same tokens, and says how they differ."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clsa_compile.calibration.attend import Operands, Tokens, best
from clsa_compile.calibration.fingerprint import sequence_hash
from clsa_compile.calibration.given import Model, Planned, asked, sequences
from clsa_compile.calibration.graphs import Change, Graph
from clsa_compile.calibration.progress import Progress
from clsa_compile.calibration.quality import LayerQuality, Quality, WorstToken
from clsa_compile.calibration.stages import Stages
from clsa_compile.config import Options
from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import Pool, role

__all__ = ["Judge", "evaluate"]

# Logits of so many rows are held at once.
HEAD_ROWS = 256
# Rows of a sequence whose attention mass is measured.
MASS_ROWS = 16


class Judge:
    """Measures plans on sequences [1, T]; the dense model runs once over each.

    A model with indexers of its own is measured against itself; where `weights` are given for its indexers,
    it is measured with these, against dense attention.
    """

    def __init__(
        self,
        model: Model,
        given: Sequence[Tensor],
        options: Options,
        skip: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._weights = weights
        model.long_enough(given)
        self._model = model
        self._ids = [ids.to(model.device) for ids in given]
        self._skips = [ids.shape[1] // 2 if skip is None else skip for ids in given]
        own = (model.topk, 0, 0)
        self._selection = own if model.topk else (options.topk or 0, options.keep_first, options.keep_last)
        self._dense: list[Mapping[str, Tensor]] = []

    @torch.no_grad()
    def dense(self, done: Callable[[], None] = lambda: None) -> None:
        """Runs the dense model over all sequences, where that has not been done."""
        for number in range(len(self._dense), len(self._ids)):
            key = [self._model.key, self._key(number), *(["attention"] if self._weights is not None else [])]
            self._dense.append(self._model.stages.tensors("dense", key, partial(self._dense_run, number)))
            done()

    @torch.no_grad()
    def measure(
        self, change: Change | None, identity: str, done: Callable[[], None] = lambda: None
    ) -> tuple[list[dict[str, Any]], tuple[Pool, ...]]:
        """Returns the figures of each sequence, and who attends to whose tokens in the graphs that ran.

        `identity` names the change in the folder. Raises OptionError where that differs by length.
        """
        self.dense()
        found = []
        graphs = _Graphs(self._model, change)
        for number in range(len(self._ids)):
            key = [self._model.key, self._key(number), identity]
            make = partial(self._run, number, graphs)
            found.append(self._model.stages.data("judged", key, make))
            done()
        lengths = {ids.shape[1]: ids for ids in self._ids}
        pools = {n: self._model.pools(n, identity, partial(graphs.of, ids)) for n, ids in lengths.items()}
        return found, self._model.agreed(pools)

    def quality(self, figures: Sequence[dict[str, Any]], pools: Sequence[Pool]) -> Quality:
        """Returns the figures of all sequences as one."""
        tokens = sum(f["tokens"] for f in figures)
        by_layer: dict[int, list[float]] = {}
        for layer, share in (pair for f in figures for pair in f["kept"].items()):
            by_layer.setdefault(int(layer), []).append(share)
        kept = {layer: sum(shares) / len(shares) for layer, shares in by_layer.items()}
        anchors = {m: pool.anchor for pool in pools for m in pool.members}
        layers = tuple(
            LayerQuality(
                entry.path,
                role(pools, i),
                anchors.get(i) if i in kept else None,
                kept.get(i),
            )
            for i, entry in enumerate(self._model.layers)
        )
        number = max(range(len(figures)), key=lambda n: figures[n]["worst_kl"])
        worst = figures[number]
        return Quality(
            topk=self._selection[0],
            schedule=self._model.schedule(pools),
            tokens=tokens,
            dense_loss=sum(f["dense"] for f in figures) / tokens,
            loss=sum(f["loss"] for f in figures) / tokens,
            kl=sum(f["kl"] for f in figures) / tokens,
            agreement=sum(f["same"] for f in figures) / tokens,
            layers=layers,
            worst_token=WorstToken(number, worst["worst_at"], worst["worst_kl"], worst["worst_token"]),
            by_sequence=tuple(math.expm1((f["loss"] - f["dense"]) / f["tokens"]) for f in figures),
            serves=self.serves(),
        )

    def _key(self, number: int) -> list[Any]:
        return [sequence_hash(self._ids[number]), self._skips[number], MASS_ROWS]

    def _rows(self, number: int) -> Tensor:
        length = self._ids[number].shape[1]
        return torch.linspace(self._skips[number], length - 1, MASS_ROWS, device=self._model.device).long()

    def _dense_run(self, number: int) -> Mapping[str, Tensor]:
        """Returns the hidden states of the scored rows, and each layer's mass [L, n, T] in a few of them."""
        ids = self._ids[number]
        rows = self._rows(number)
        masses = []

        def tap(_: int, call: Operands, out: Tensor, chosen: Tokens | None) -> Tensor:
            scores = call.scores(rows, call.k.shape[2])
            if chosen is not None:
                scores = scores.masked_fill(~chosen.of(rows), -torch.inf)
            mass = call.softmax(scores, picked=chosen is not None)[0].mean(0)
            masses.append(torch.where((scores[0] > -torch.inf).any(0), mass, -torch.inf))
            return out

        index_tap = None if self._weights is None else _no_index
        hidden, _ = self._model.forward(ids).graph().run(ids, tap, index_tap)
        return {
            "hidden": hidden[0, self._skips[number] : -1].cpu(),
            "masses": torch.stack(masses).half().cpu(),
        }

    def _run(self, number: int, graphs: _Graphs) -> dict[str, Any]:
        """Returns one sequence's sums over the scored tokens, and the mass that each follower keeps."""
        ids, skip = self._ids[number], self._skips[number]
        length = ids.shape[1]
        graph = graphs.of(ids)
        rows = self._rows(number)
        kept: dict[str, float] = {}
        against_itself = self._model.topk and self._weights is None
        own = {m for pool in graph.pools for m in pool.members} if against_itself else None

        def tap(layer: int, call: Operands, out: Tensor, chosen: Tokens | None) -> Tensor:
            if chosen is None or (own is not None and layer not in own):
                return out
            if own is not None:
                # What it would have looked at, had it selected by itself.
                mass = self._dense[number]["masses"][layer].float().clamp(min=0).to(out.device)
                kept[str(layer)] = float((mass * chosen.of(rows)[0, 0]).sum(-1).mean())
            else:
                probabilities = call.probabilities(rows, call.k.shape[2])[0]
                picked = chosen.of(rows)[0]
                picked = picked.repeat_interleave(len(probabilities) // len(picked), 0)
                kept[str(layer)] = float((probabilities * picked).sum(-1).mean())
            return out

        hidden, others = graph.run(ids, tap, tensors=self._weights)
        sums = {"dense": 0.0, "loss": 0.0, "kl": 0.0, "same": 0.0}
        worst = (-math.inf, 0)
        for start in range(skip, length - 1, HEAD_ROWS):
            end = min(start + HEAD_ROWS, length - 1)
            before = self._dense[number]["hidden"][None, start - skip : end - skip].to(hidden)
            ours, theirs = (
                graph.logits(x, others)[0].float().log_softmax(-1) for x in (hidden[:, start:end], before)
            )
            labels = ids[0, start + 1 : end + 1, None]
            kl = (theirs.exp() * (theirs - ours)).sum(-1)
            sums["loss"] -= float(ours.gather(1, labels).double().sum())
            sums["dense"] -= float(theirs.gather(1, labels).double().sum())
            sums["kl"] += float(kl.double().sum())
            sums["same"] += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
            worst = max(worst, (float(kl.max()), start + int(kl.argmax())))
        return {
            **sums,
            "tokens": length - 1 - skip,
            "kept": kept,
            "worst_kl": worst[0],
            "worst_at": worst[1] + 1,
            "worst_token": int(ids[0, worst[1] + 1]),
        }

    def serves(self) -> tuple[tuple[float, ...], ...]:
        """Returns who could serve whom, as `Quality` says it, a mean over sequences."""
        total = sum(_kept(run["masses"].float(), self._selection) for run in self._dense) / len(self._dense)
        assert isinstance(total, Tensor)
        lower = torch.ones_like(total).tril(-1).bool()
        return tuple(map(tuple, total.masked_fill(lower, math.nan).tolist()))


class _Graphs:
    """A model's graphs after a change, one a length, made where they are asked for."""

    def __init__(self, model: Model, change: Change | None) -> None:
        self._model, self._change = model, change
        self._made: dict[int, Graph] = {}

    def of(self, ids: Tensor) -> Graph:
        """Returns the graph for the length of ids [1, T]."""
        length = ids.shape[1]
        if length not in self._made:
            self._made[length] = self._model.forward(ids).graph(self._change)
        return self._made[length]


def _no_index(*_: Any) -> None:
    """Is shown indices whose selection is not asked for."""


def evaluate(
    model: Any,
    plan: Planned,
    batches: Any,
    *,
    tokenizer: Any = None,
    skip: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Quality:
    """Measures what a plan costs a model on token ids, teacher-forced and with sparse prompts.

    `plan` is a SharingPlan, its file, or options such as {"topk": 256, "share": 4}. A plan of weights that
    `distill` trained for the model's own indexers is measured against dense attention, whether `apply` put
    them into the model or not. `batches` are ids [B, T] or [T], or what a tokenizer returns. Tokens before
    position `skip` of a sequence are not scored; by default its first half. With a `tokenizer` the worst
    token has a text. Results are kept in `folder` and found there again. Nothing is compiled. Raises
    OptionError for what cannot be measured.
    """
    wanted = asked(plan)
    given = sequences(batches, wanted.limits, model)
    shortest = min(ids.shape[1] for ids in given)
    if skip is not None and not 0 <= skip < shortest - 1:
        raise OptionError(f"skip={skip!r} leaves nothing to score of {shortest} tokens")
    known = Model(model, given[0], Stages(folder))
    known.check(wanted)
    judge = Judge(known, given, wanted.options, skip, wanted.weights)
    with Progress(progress) as shown:
        judge.dense(shown.stage("dense", len(given)))
        done = shown.stage("shared", len(given))
        figures, pools = judge.measure(wanted.change, wanted.identity, done)
    quality = judge.quality(figures, pools)
    return quality if tokenizer is None else quality.with_text(tokenizer.decode([quality.worst_token.token]))


def _kept(masses: Tensor, selection: tuple[int, int, int]) -> Tensor:
    """Returns [L, L] of masses [L, n, T]: at [a, l] the share of layer l's on what layer a chooses."""
    readable = masses > -torch.inf
    mass = masses.clamp(min=0)
    chosen = best(torch.where(readable, masses, -torch.inf)[None], *selection)[0].float()
    return torch.einsum("ant,lnt->al", chosen, mass) / mass.shape[1]
