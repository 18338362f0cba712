"""Distilling: trains one small index for each group of a dense model's layers, or the indexers it has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from clsa_compile.calibration.borrowed import Borrowed
from clsa_compile.calibration.finding import Found, found
from clsa_compile.calibration.given import Model, sequences
from clsa_compile.calibration.index_training import FORMS, TARGETS
from clsa_compile.calibration.judging import Judge
from clsa_compile.calibration.mass_finder import POWER
from clsa_compile.calibration.mixture import Costs, Selection, Table
from clsa_compile.calibration.own import Own
from clsa_compile.calibration.progress import Progress
from clsa_compile.calibration.records import recorded
from clsa_compile.calibration.stages import Stages
from clsa_compile.calibration.trainer import Trainer, Training
from clsa_compile.config import Options, is_budget, is_count
from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import MOST_TOKENS, Request
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.policies import planned
from clsa_compile.policies.anchors import best, grown, pair_cost, uniform

__all__ = ["Wanted", "distill", "train"]

# One of so many sequences only judges, and no more than so many.
HELD_OUT, MOST_HELD_OUT = 4, 16
MOST_SEED = 2**31
# Sequences whose attention says where groups begin.
LOOKED_AT = 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `distill` was asked for. Raises OptionError for what cannot be."""

    topk: int | None = None
    groups: int | tuple[int, ...] | None = None
    budget: float | None = None
    steps: int = 2000
    score: str = "mixture"
    kv_heads: int | None = None
    seed: int = 0
    target: str = "worth"

    def __post_init__(self) -> None:
        if self.topk is not None and self.groups is None and self.budget is None:
            raise OptionError(
                "give 'groups', how many indices there are to be, or a 'budget', or both; a model that has "
                "indexers needs none of them, and no 'topk'"
            )
        several = isinstance(self.groups, tuple) and all(is_count(g, 0) for g in self.groups)
        checks = (
            ("topk", self.topk is None or is_count(self.topk, 1, MOST_TOKENS), f"1 to {MOST_TOKENS}"),
            (
                "groups",
                self.groups is None or is_count(self.groups, 1) or several,
                "their number, or the layers that they begin at, as (0, 8, 15, 22)",
            ),
            ("budget", self.budget is None or is_budget(self.budget), "a number above 0, such as 0.01"),
            ("steps", is_count(self.steps, 1), "a number from 1"),
            ("score", self.score in FORMS, " or ".join(map(repr, FORMS))),
            ("target", self.target in TARGETS, " or ".join(map(repr, TARGETS))),
            ("kv_heads", self.kv_heads is None or is_count(self.kv_heads, 1), "a number from 1, or None"),
            ("seed", is_count(self.seed, 0, MOST_SEED), f"0 to {MOST_SEED}"),
        )
        for name, ok, accepted in checks:
            if not ok:
                raise OptionError(f"{name!r} is {getattr(self, name)!r}; accepted: {accepted}")
        if isinstance(self.groups, tuple) and not _are_starts(self.groups):
            raise OptionError(
                f"groups={self.groups}: the first group begins at layer 0, and each one later than the one "
                "before it, because every layer reads the index of the group that it is in"
            )

    @property
    def count(self) -> int | None:
        """The number of groups, the least where there is a budget; None where only that is given."""
        return len(self.groups) if isinstance(self.groups, tuple) else self.groups

    @property
    def training(self) -> Training:
        """How to train, for a dense model."""
        return Training(self.topk or 0, self.steps, self.score, self.kv_heads, self.seed, target=self.target)

    def check(self, layers: int) -> None:
        """Raises OptionError where a dense model has not enough layers."""
        last = self.groups[-1] + 1 if isinstance(self.groups, tuple) else self.groups
        if last is not None and last > layers:
            raise OptionError(
                f"groups={self.groups!r}, but {layers} layers can share, counted from 0; give fewer, or lower"
            )

    def able(self, layers: int, unable: Mapping[int, str]) -> list[int]:
        """Returns the layers at which groups can begin, of so many; `unable` says why others cannot.

        Raises OptionError where those that can are not enough.
        """
        found = [i for i in range(layers) if i not in unable]
        starts = self.groups if isinstance(self.groups, tuple) else (0,)
        at = next((start for start in starts if start in unable), None)
        if at is None and (self.count or 1) <= len(found):
            return found
        at = min(unable) if at is None else at
        asked = "the first group" if self.groups is None else f"groups={self.groups!r}"
        raise OptionError(
            f"{asked}: an index cannot begin at layer {at}: {unable[at]}. The first group begins at layer 0; "
            f"layers that can begin one: {', '.join(map(str, found)) or 'none'}. Adapters can be merged into "
            "the weights before"
        )

    def check_own(self) -> None:
        """Raises OptionError for what indexers that a model has cannot be asked."""
        plain = Wanted(self.topk, steps=self.steps, seed=self.seed)
        for name in ("groups", "budget", "score", "kv_heads", "target"):
            if getattr(self, name) != getattr(plain, name):
                raise OptionError(
                    f"{name!r} is {getattr(self, name)!r}, but this model has indexers of its own, which are "
                    "trained as they are; leave it out. clsa_compile.search finds which of them need to run"
                )


def distill(
    model: Any,
    batches: Any,
    *,
    topk: int | None = None,
    groups: int | Sequence[int] | None = None,
    budget: float | None = None,
    steps: int = 2000,
    score: str = "mixture",
    target: str = "worth",
    kv_heads: int | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SharingPlan:
    """Trains an index for each group of a dense model's layers, which then attend to `topk` tokens each.

    A model that has indexers keeps their form, their caches and its own `topk`: they learn from the dense
    attention of the layers that read them, and `clsa_compile.apply` puts what they learned into the model.
    What follows is for dense models.

    The model's weights stay as they are. An index ranks the keys that its group's first layer caches anyway,
    all key heads of it or the best `kv_heads`, by queries of its own; it learns what the tokens that the
    group's layers look at are worth to the model's loss or, with the `target` "attention", their mean
    attention (CLSA, arXiv 2606.06467), a sequence a step. `batches` are token ids [B, T] or [T], or what a
    tokenizer returns, many of them; the last quarter of the sequences, 16 at most, only judges. `groups` is
    their number or the layers that they begin at, counted among those that may share. With a `budget`, an
    increase of perplexity (0.01 is one percent), there are more groups until it holds on the sequences that
    judge. `folder` keeps checkpoints: training that was killed goes on. The same arguments and seed give the
    same plan on the same device. Raises OptionError for what cannot be asked, DistillError where training
    fails, KeepError where `folder` is full.
    """
    chosen = groups if groups is None or isinstance(groups, int) else tuple(groups)
    wanted = Wanted(topk, chosen, budget, steps, score, kv_heads, seed, target)
    return train(model, batches, wanted, folder, progress).plan


def train(
    model: Any,
    batches: Any,
    wanted: Wanted,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Found:
    """Does what `distill` says, and returns what was measured too."""
    given = sequences(batches, {"topk": wanted.topk or 0}, model)
    if len(given) < 2:
        raise OptionError("this needs two sequences at least, one to learn from and one to judge by")
    known = Model(model, given[0], Stages(folder))
    known.check_topk(wanted.topk, "its indexers are trained as they are")
    held = min(MOST_HELD_OUT, max(1, round(len(given) / HELD_OUT)))
    with Progress(progress) as shown:
        if known.topk:
            wanted.check_own()
            return _own(known, given[:-held], given[-held:], wanted, shown)
        wanted.check(len(known.layers))
        able = wanted.able(len(known.layers), known.forward(given[0]).unable())
        finder = _Finder(known, given[:-held], given[-held:], wanted, able, shown)
        return found(finder, wanted.count, wanted.budget)


def _own(known: Model, fitted: list[Tensor], held: list[Tensor], wanted: Wanted, shown: Progress) -> Found:
    """Trains the indexers that a model has, and judges them."""
    known.long_enough([*fitted, *held])
    training = replace(wanted.training, topk=known.topk)
    student = Own(known, fitted, training)
    Trainer(known, fitted, student, training).run(shown.stage("training indexers", wanted.steps))
    plan = student.plan()
    judge = Judge(known, held, Options(), weights=plan.tensors)
    judge.dense(shown.stage("dense", len(held)))
    done = shown.stage("judging indexers", len(held))
    quality = judge.quality(*judge.measure(None, plan.digest(), done))
    return Found(replace(plan, quality=quality.numbers()), quality)


class _Finder:
    """Trains indices for groups that begin at some layers, and judges them; see `finding.Finder`.

    Anchors are counted among the layers that are able to begin a group.
    """

    def __init__(
        self,
        known: Model,
        fitted: list[Tensor],
        held: list[Tensor],
        wanted: Wanted,
        able: list[int],
        shown: Progress,
    ) -> None:
        self._known, self._fitted, self._wanted, self._shown = known, fitted, wanted, shown
        self._able = able
        self._numbers = len(held)
        self._options = Options(topk=wanted.topk, keep_first=0, keep_last=0)
        self._judge = Judge(known, held, self._options)
        self._costs: list[list[float]] = []

    @property
    def fewest(self) -> int:
        """The fewest groups: one will do for all layers."""
        return 1

    @property
    def layers(self) -> int:
        """The layers that can begin a group."""
        return len(self._able)

    def anchors(self, count: int) -> tuple[int, ...]:
        """Returns where so many groups begin, exactly the best by what their first layers look at.

        An index knows what that layer knows, so what the layer itself would miss is the measure, by worth.
        """
        if isinstance(self._wanted.groups, tuple) and count == len(self._wanted.groups):
            return tuple(map(self._able.index, self._wanted.groups))
        return best(self._pairs())[count - 1]

    def grown(self, anchors: tuple[int, ...]) -> tuple[int, ...]:
        """Returns one group more: begun where layers then lose least."""
        return grown(anchors, self.layers, self._total)

    def flipped(self, anchors: tuple[int, ...]) -> tuple[int, ...]:
        """Returns them as they are: to try others means to train again."""
        return anchors

    def judged(self, anchors: tuple[int, ...]) -> Found:
        """Returns the plan of indices that were trained for these groups, and its quality."""
        training = self._wanted.training
        starts = tuple(self._able[anchor] for anchor in anchors)
        student = Borrowed(self._known, self._fitted, starts, training)
        trainer = Trainer(self._known, self._fitted, student, training)
        trainer.run(self._shown.stage(f"training {len(anchors)} indices", self._wanted.steps))
        plan = student.plan()
        self._judge.dense(self._shown.stage("dense", self._numbers))
        request = Request(planned.route(plan), prompts=True, tensors=plan.tensors)
        done = self._shown.stage(f"judging {len(anchors)} indices", self._numbers)
        figures, pools = self._judge.measure(request, plan.digest(), done)
        quality = self._judge.quality(figures, pools)
        return Found(replace(plan, quality=quality.numbers()), quality)

    def _pairs(self) -> list[list[float]]:
        """Returns [C, C] of the layers that can begin a group: what is lost where j is in the group of i.

        That is the worth of what layers do not see of what the first of their group looks at most: for j and
        those after it that can begin none, which go where it goes, more than where j begins a group.
        """
        if not self._costs:
            looked_at = self._fitted[:: max(1, len(self._fitted) // LOOKED_AT)][:LOOKED_AT]
            done = self._shown.stage("placing groups", len(looked_at))
            records = recorded(self._known, looked_at, POWER, self._wanted.seed, done)
            assert self._wanted.topk is not None
            table = Table(records, Selection(self._wanted.topk, 0, 0, POWER), self._known.device)
            layers = len(self._known.layers)
            lost = Costs(table, uniform(layers, max(2, layers // 4))).pairs()
            ends = (*self._able[1:], layers)
            self._costs = [
                [
                    sum(lost[i][m] - lost[j][m] for m in range(j, end)) if i < j else 0.0
                    for j, end in zip(self._able, ends, strict=True)
                ]
                for i in self._able
            ]
        return self._costs

    def _total(self, anchors: tuple[int, ...]) -> float:
        return pair_cost(self._pairs(), anchors)


def _are_starts(groups: tuple[int, ...]) -> bool:
    return groups[:1] == (0,) and list(groups) == sorted(set(groups))
