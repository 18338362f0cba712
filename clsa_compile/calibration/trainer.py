"""A trainer: moves the weights of indices along the gradient, and goes on where it was killed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from clsa_compile.calibration.fingerprint import data_hash
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.index_training import Loss
from clsa_compile.errors import DistillError

__all__ = ["Student", "Trainer", "Training", "rows_of"]

# Steps between two checkpoints.
EVERY = 100
WARM_UP = 20


@dataclass(frozen=True, slots=True)
class Training:
    """How to train: so many steps, a sequence each, of which so many rows are looked at.

    score, target: names in `index_training.FORMS` and `TARGETS`. kv_heads: how many key heads an index reads,
    None for all. query_rate, head_rate: what Adam's learning rates begin with; they fall to 0 along a cosine;
    own_rate: the same, for indexers that the model has.
    topk: tokens that will be selected; rows that may read no more teach nothing.
    """

    topk: int
    steps: int = 2000
    score: str = "mixture"
    kv_heads: int | None = None
    seed: int = 0
    rows: int = 512
    query_rate: float = 1e-2
    head_rate: float = 3e-2
    own_rate: float = 3e-3
    target: str = "worth"


class Student(Protocol):
    """Indices that learn."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Their weights, by name."""

    @property
    def key(self) -> Any:
        """What they depend on besides model and data, as plain data."""

    def rates(self) -> Mapping[str, float]:
        """Returns what the learning rate of each weight begins with."""

    def losses(self, ids: Tensor, rows: Tensor) -> list[Loss]:
        """Returns the loss of each index in some rows [n] of ids [1, T]."""


class Trainer:
    """One training of a student on some sequences."""

    def __init__(self, known: Model, given: Sequence[Tensor], student: Student, training: Training) -> None:
        self._known, self._given, self._student, self._training = known, given, student, training
        self._key = [known.key, data_hash(given), student.key, asdict(training)]
        self._tensors = student.tensors
        groups: dict[float, list[Tensor]] = {}
        for name, rate in student.rates().items():
            groups.setdefault(rate, []).append(self._tensors[name])
        self._adam = torch.optim.Adam(
            [{"params": params, "lr": rate, "rate": rate} for rate, params in groups.items()],
            betas=(0.9, 0.99),
        )
        self.losses: list[float] = []

    def run(self, done: Callable[[], None] = lambda: None) -> None:
        """Trains from the last checkpoint on. Raises DistillError for a loss that is no number."""
        start = self._restore()
        for _ in range(start):
            done()
        for number in range(start, self._training.steps):
            self._step(number)
            if (number + 1) % EVERY == 0 or number + 1 == self._training.steps:
                self._keep(number + 1)
            done()

    def _step(self, number: int) -> None:
        ids = self._sequence(number)
        rows = rows_of(self._training, number, ids)
        learning = list(self._tensors.values())
        for group in self._adam.param_groups:
            group["lr"] = group["rate"] * _factor(number, self._training.steps)
        with torch.enable_grad():
            found = self._student.losses(ids, rows)
            total = torch.stack([loss.divergence + loss.added for loss in found]).sum()
        # Of these weights alone: what else the loss was computed from has no use for one.
        for tensor, gradient in zip(learning, torch.autograd.grad(total, learning), strict=True):
            tensor.grad = gradient
        norm = float(clip_grad_norm_(learning, 1.0))
        value = float(torch.stack([loss.divergence.detach() for loss in found]).mean())
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise DistillError(
                f"the loss is {value} in step {number}, and training stopped; the last checkpoint is as it "
                "was. Try dtype float32, or look at what the model makes of these tokens"
            )
        self._adam.step()
        self.losses.append(value)

    def _sequence(self, number: int) -> Tensor:
        """Returns the sequence of a step: all of them in an order of its own in every round."""
        turn, place = divmod(number, len(self._given))
        generator = torch.Generator().manual_seed(self._training.seed * 1_000_003 + turn)
        order = torch.randperm(len(self._given), generator=generator)
        return self._given[int(order[place])].to(self._known.device)

    def _restore(self) -> int:
        """Takes over the last checkpoint; returns its step."""
        kept = self._known.stages.checkpoint("distilling", self._key)
        if kept is None:
            return 0
        for name, tensor in self._tensors.items():
            tensor.data.copy_(kept[name])
            moments = {m: kept[f"{name}.{m}"].to(tensor.device) for m in ("exp_avg", "exp_avg_sq")}
            self._adam.state[tensor] = {"step": kept["step"].float(), **moments}
        self.losses = kept["losses"].tolist()
        return int(kept["step"])

    def _keep(self, step: int) -> None:
        content = {
            "step": torch.tensor(step),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            **self._tensors,
        }
        for name, tensor in self._tensors.items():
            content |= {f"{name}.{m}": self._adam.state[tensor][m] for m in ("exp_avg", "exp_avg_sq")}
        try:
            self._known.stages.keep("distilling", self._key, content)
        except OSError as error:
            raise DistillError(
                f"the checkpoint of step {step} cannot be written: {error}. The one before it is as it was; "
                "make room and run the same again"
            ) from error


def rows_of(training: Training, number: int, ids: Tensor) -> Tensor:
    """Returns the rows of a step over ids [1, T], spread over those in which tokens have to be chosen."""
    generator = torch.Generator().manual_seed(training.seed * 1_000_003 + number)
    first = min(training.topk, ids.shape[1] - 1)
    count = min(training.rows, ids.shape[1] - first)
    step = (ids.shape[1] - first) / count
    places = torch.arange(count) + torch.rand(count, generator=generator)
    return (first + places * step).long().clamp(max=ids.shape[1] - 1).to(ids.device)


def _factor(number: int, steps: int) -> float:
    """Returns what the rates are multiplied by: a short warm-up, then half a cosine."""
    return min(1.0, (number + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * number / steps))
