"""Tasks: asks the dense model and a shared one for what synthetic prompts hide, and says how they differ."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from clsa_compile.calibration.fingerprint import sequence_hash
from clsa_compile.calibration.given import Asked, Model, Planned, asked, check_length
from clsa_compile.calibration.graphs import Change, Graph
from clsa_compile.calibration.haystack import TASKS, WITH_DEPTH, Haystack, Sample
from clsa_compile.calibration.progress import Progress
from clsa_compile.calibration.stages import Stages
from clsa_compile.calibration.task_report import TaskCell, TaskReport
from clsa_compile.config import is_count
from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import Pool

__all__ = ["DEPTHS", "LENGTHS", "SAMPLES", "evaluate_tasks"]

LENGTHS = (1024, 2048)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 4


def evaluate_tasks(
    model: Any,
    plan: Planned,
    tokenizer: Any,
    *,
    lengths: int | Iterable[int] = LENGTHS,
    depths: float | Iterable[float] = DEPTHS,
    tasks: str | Iterable[str] = tuple(TASKS),
    samples: int = SAMPLES,
    seed: int = 0,
    filler: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> TaskReport:
    """Measures what a plan costs a model on synthetic tasks, teacher-forced and with sparse prompts.

    `plan` is a SharingPlan, its file, or options such as {"topk": 256, "share": 4}. Each of `tasks`
    (single_needle, multi_key_needle, multi_value_needle, variable_tracking, common_words) is asked `samples`
    times at each of `lengths`, in tokens with the answer, and the first two of them at each of `depths`,
    where 0 is the beginning of the text. `filler` is a text to hide things in, by default sentences of our
    own. Prompts are plain text, without a chat template. The same arguments make the same samples; results
    are kept in `folder` and found there again. Nothing is compiled. Raises OptionError for what cannot be
    measured.
    """
    asks = asked(plan)
    if asks.change is None:
        raise OptionError(
            "tasks say what sharing changes, and this plan holds weights of the model's own indexers: put "
            "them into it with clsa_compile.apply(model, plan), and ask with 'share'"
        )
    wanted = _Wanted(_several(tasks), _several(lengths), _several(depths), samples, seed)
    wanted.check(asks.limits, model)
    haystack = Haystack(tokenizer, filler)
    cells = [(cell, wanted.samples_of(cell, haystack)) for cell in wanted.cells()]
    known = Model(model, _ids(cells[0][1][0]), Stages(folder))
    known.check(asks)
    known.long_enough([_ids(made[0]) for _, made in cells])
    with Progress(progress) as shown:
        asker = _Asker(known, asks)
        done = shown.stage("tasks", samples * len(cells))
        found = [asker.cell(*cell, made, done) for cell, made in cells]
    schedule = known.schedule(known.agreed(asker.pools))
    by_task = sorted(found, key=lambda cell: wanted.tasks.index(cell.task))
    return TaskReport(asks.topk or known.topk, schedule, seed, tuple(by_task))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be measured. Raises OptionError for what cannot be."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int

    def check(self, limits: Mapping[str, int], model: Any) -> None:
        for task in self.tasks:
            if task not in TASKS:
                near = difflib.get_close_matches(str(task), TASKS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise OptionError(f"unknown task {task!r}{hint} Known tasks: {', '.join(TASKS)}")
        checks = (
            ("'tasks' is", self.tasks, bool(self.tasks), "one task at least"),
            ("'lengths' is", self.lengths, bool(self.lengths), "one length at least"),
            ("'depths' is", self.depths, bool(self.depths), "one depth at least"),
            ("'samples' is", self.samples, is_count(self.samples, 1), "a number from 1"),
            ("'seed' is", self.seed, is_count(self.seed, 0), "a number from 0"),
            *(("'lengths' holds", n, is_count(n, 1), "numbers of tokens") for n in self.lengths),
            *(("'depths' holds", d, _is_depth(d), "0, the beginning, to 1, the end") for d in self.depths),
        )
        for name, value, ok, accepted in checks:
            if not ok:
                raise OptionError(f"{name} {value!r}; accepted: {accepted}")
        shortest, longest = min(self.lengths), max(self.lengths)
        check_length(shortest, limits)
        most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if most is not None and longest > most:
            raise OptionError(f"a length of {longest} is more than the {most} tokens that the model takes")

    def cells(self) -> list[tuple[str, int, float | None]]:
        """Returns task, length and depth of each cell, by length: a length is captured once."""
        return [
            (task, length, depth)
            for length in dict.fromkeys(self.lengths)
            for task in dict.fromkeys(self.tasks)
            for depth in (dict.fromkeys(self.depths) if task in WITH_DEPTH else (None,))
        ]

    def samples_of(self, cell: tuple[str, int, float | None], haystack: Haystack) -> list[Sample]:
        task, length, depth = cell
        return [haystack.sample(task, length, depth or 0.0, n, self.seed) for n in range(self.samples)]


class _Asker:
    """Runs samples through the dense graph and the shared one of their length."""

    def __init__(self, model: Model, asks: Asked) -> None:
        self._model = model
        # What names a graph's results in the folder, and what the graph is rewritten for.
        ours = (asks.options.identity(), asks.change)
        self._asked: tuple[tuple[str, Change | None], ...] = (("dense", None), ours)
        self._graphs: dict[tuple[int, str], Graph] = {}
        # By length, who attends to whose tokens in the shared graph.
        self.pools: dict[int, tuple[Pool, ...]] = {}

    def cell(
        self, task: str, length: int, depth: float | None, samples: list[Sample], done: Callable[[], None]
    ) -> TaskCell:
        """Returns the means of one cell; `done` is called after each sample."""
        names = ("dense_accuracy", "accuracy", "dense_logprob", "logprob", "agreement")
        totals = dict.fromkeys(names, 0.0)
        for sample in samples:
            answer = list(sample.ids[sample.start :])
            dense, ours = (self._kept(sample, *wanted) for wanted in self._asked)
            same = sum(a == b for a, b in zip(dense["greedy"], ours["greedy"], strict=True)) / len(answer)
            totals["dense_accuracy"] += dense["greedy"] == answer
            totals["accuracy"] += ours["greedy"] == answer
            totals["dense_logprob"] += dense["logprob"]
            totals["logprob"] += ours["logprob"]
            totals["agreement"] += same
            done()
        if length not in self.pools:
            ids, shared = _ids(samples[0]), self._asked[1]
            self.pools[length] = self._model.pools(length, shared[0], partial(self._graph, ids, *shared))
        means = {name: total / len(samples) for name, total in totals.items()}
        return TaskCell(task, length, depth, len(samples), **means)

    def _kept(self, sample: Sample, identity: str, change: Change | None) -> dict[str, Any]:
        key = [self._model.key, sequence_hash(_ids(sample)), sample.start, identity]
        found = self._model.stages.data("task", key, partial(self._run, sample, identity, change))
        return dict(found)

    @torch.no_grad()
    def _run(self, sample: Sample, identity: str, change: Change | None) -> dict[str, Any]:
        """Returns the greedy token at each position of the answer, and the mean log-probability there."""
        ids = _ids(sample).to(self._model.device)
        graph = self._graph(ids, identity, change)
        hidden, others = graph.run(ids)
        logits = graph.logits(hidden[:, sample.start - 1 : -1], others)[0].float()
        right = logits.log_softmax(-1).gather(1, ids[0, sample.start :, None])
        return {"greedy": logits.argmax(-1).tolist(), "logprob": float(right.double().mean())}

    def _graph(self, ids: torch.Tensor, identity: str, change: Change | None) -> Graph:
        """Returns the graph of a length; those of another one are no longer needed."""
        name = (ids.shape[1], identity)
        if name not in self._graphs:
            self._graphs = {n: graph for n, graph in self._graphs.items() if n[0] == ids.shape[1]}
            self._graphs[name] = self._model.forward(ids).graph(change)
        return self._graphs[name]


def _ids(sample: Sample) -> torch.Tensor:
    return torch.tensor([sample.ids], dtype=torch.long)


def _several(given: Any) -> tuple[Any, ...]:
    """Returns what was given, one or many, as many."""
    return tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)


def _is_depth(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
