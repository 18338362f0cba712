"""Distilling: trains one small index for each group of a dense model's layers; its own weights stay."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from clsa_compile.calibration.finding import Found
from clsa_compile.calibration.given import Model, sequences
from clsa_compile.calibration.index_training import FORMS
from clsa_compile.calibration.judging import Judge
from clsa_compile.calibration.progress import Progress
from clsa_compile.calibration.stages import Stages
from clsa_compile.calibration.trainer import Trainer, Training
from clsa_compile.config import Options, is_count
from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import MOST_TOKENS, Request
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.policies import planned
from clsa_compile.policies.anchors import uniform

__all__ = ["Wanted", "distill", "train"]

# One of so many sequences only judges.
HELD_OUT = 4


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `distill` was asked for. Raises OptionError for what cannot be."""

    topk: int
    groups: int | tuple[int, ...] = 4
    steps: int = 2000
    score: str = "mixture"
    kv_heads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.groups, int):
            object.__setattr__(self, "groups", tuple(self.groups))
        several = isinstance(self.groups, tuple) and all(is_count(g, 0) for g in self.groups)
        checks = (
            ("topk", is_count(self.topk, 1, MOST_TOKENS), f"1 to {MOST_TOKENS}"),
            (
                "groups",
                is_count(self.groups, 1) or several,
                "their number, or the layers that they begin at, as (0, 8, 15, 22)",
            ),
            ("steps", is_count(self.steps, 1), "a number from 1"),
            ("score", self.score in FORMS, " or ".join(map(repr, FORMS))),
            ("kv_heads", self.kv_heads is None or is_count(self.kv_heads, 1), "a number from 1, or None"),
            ("seed", is_count(self.seed, 0), "a number from 0"),
        )
        for name, ok, accepted in checks:
            if not ok:
                raise OptionError(f"{name!r} is {getattr(self, name)!r}; accepted: {accepted}")
        if isinstance(self.groups, tuple) and (
            self.groups[:1] != (0,) or list(self.groups) != sorted(set(self.groups))
        ):
            raise OptionError(
                f"groups={self.groups}: the first group begins at layer 0, and each one later than the one "
                "before it, for every layer reads the index of the group that it is in"
            )

    def training(self) -> Training:
        """Returns how to train."""
        return Training(self.topk, self.steps, self.score, self.kv_heads, self.seed)

    def starts(self, layers: int) -> tuple[int, ...]:
        """Returns the layers at which groups begin. Raises OptionError for layers that there are not."""
        if isinstance(self.groups, int) and self.groups <= layers:
            return uniform(layers, self.groups)
        if isinstance(self.groups, tuple) and self.groups[-1] < layers:
            return self.groups
        raise OptionError(f"groups={self.groups!r}, but only {layers} layers can share; give fewer, or lower")


def distill(
    model: Any,
    batches: Any,
    *,
    topk: int,
    groups: int | Sequence[int] = 4,
    steps: int = 2000,
    score: str = "mixture",
    kv_heads: int | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SharingPlan:
    """Trains an index for each group of a dense model's layers, which then attend to `topk` tokens each.

    The model's weights stay as they are. An index ranks the keys that its group's first layer caches anyway,
    all key heads of it or the best `kv_heads`, by queries of its own; it learns from the mean attention of
    the group's layers and heads (CLSA, arXiv 2606.06467). `batches` are token ids [B, T] or [T], many of
    them; the last quarter of the sequences only judges. `groups` is their number or the layers that they
    begin at, counted among those that may share. `folder` keeps checkpoints: training that was killed goes
    on. The same arguments and seed give the same plan. Raises OptionError for what cannot be asked,
    DistillError where training fails.
    """
    asked = Wanted(topk, groups if isinstance(groups, int) else tuple(groups), steps, score, kv_heads, seed)
    return train(model, batches, asked, folder, progress).plan


def train(
    model: Any,
    batches: Any,
    wanted: Wanted,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Found:
    """Does what `distill` says, and returns what was measured too."""
    given = sequences(batches, wanted.topk)
    if len(given) < 2:
        raise OptionError("this needs two sequences at least, one to learn from and one to judge by")
    known = Model(model, given[0], Stages(folder))
    if known.topk:
        raise OptionError(
            f"this model selects {known.topk} tokens by itself, with indexers that it was trained with; "
            "clsa_compile.search finds which of them need to run"
        )
    held = max(1, round(len(given) / HELD_OUT))
    with Progress(progress) as shown:
        starts = wanted.starts(len(known.layers))
        trainer = Trainer(known, given[:-held], starts, wanted.training())
        trainer.run(shown.stage("training", wanted.steps))
        return judged(known, trainer.plan(wanted.topk), given[-held:], shown)


def judged(known: Model, plan: SharingPlan, held: Sequence[Tensor], shown: Progress) -> Found:
    """Returns a plan with its quality on sequences that were held out."""
    options = Options.read({"share": plan, "prefill": "sparse"})
    judge = Judge(known, held, options)
    judge.dense(shown.stage("dense", len(held)))
    request = Request(planned.route(plan), prompts=True, tensors=plan.tensors)
    figures, pools = judge.measure(request, plan.digest(), shown.stage("judging", len(held)))
    quality = judge.quality(figures, pools)
    return Found(replace(plan, quality=quality.numbers()), quality)
