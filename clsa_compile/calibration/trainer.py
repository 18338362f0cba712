"""A trainer: moves the weights of indices along the gradient, and goes on where it was killed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from clsa_compile.calibration.fingerprint import data_hash
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.index_training import FORMS, best_heads, initial, losses
from clsa_compile.errors import DistillError, OptionError
from clsa_compile.ir.routing import Index, Pool
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.policies.anchors import followers

__all__ = ["Trainer", "Training"]

# Steps between two checkpoints.
EVERY = 100
WARM_UP = 20
# Sequences by which key heads are chosen.
LOOKED_AT = 4


@dataclass(frozen=True, slots=True)
class Training:
    """How to train: so many steps, a sequence each, of which so many rows are looked at.

    score: one of `FORMS`. kv_heads: how many key heads an index reads, None for all. query_rate, head_rate:
    what Adam's learning rates begin with; they fall to 0 along a cosine. topk: tokens that will be selected;
    rows that may read no more teach nothing.
    """

    topk: int
    steps: int = 2000
    score: str = "mixture"
    kv_heads: int | None = None
    seed: int = 0
    rows: int = 256
    query_rate: float = 3e-3
    head_rate: float = 1e-2


class Trainer:
    """One training of the indices of all groups, which begin at `starts`."""

    def __init__(
        self, known: Model, given: Sequence[Tensor], starts: tuple[int, ...], training: Training
    ) -> None:
        self._known, self._given, self._training = known, given, training
        self._data = data_hash(given)
        self._key = [known.key, self._data, list(starts), asdict(training)]
        self._pools = self._made(starts)
        self._tensors = self._initial()
        named = self._tensors.items()
        queries = [tensor for name, tensor in named if name.endswith(".query")]
        others = [tensor for name, tensor in named if not name.endswith(".query")]
        groups = ((queries, training.query_rate), (others, training.head_rate))
        self._adam = torch.optim.Adam(
            [{"params": params, "lr": rate, "rate": rate} for params, rate in groups], betas=(0.9, 0.99)
        )
        lengths = {ids.shape[1]: ids for ids in given}
        self._probes = {t: known.forward(ids).probe(self._pools, self._tensors) for t, ids in lengths.items()}
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

    def plan(self) -> SharingPlan:
        """Returns the plan of the indices as they are now."""
        return SharingPlan(
            topk=self._training.topk,
            layers=self._known.layers,
            pools=self._pools,
            keep_first=0,
            keep_last=0,
            model=self._known.fingerprint,
            data=self._data,
            kind="distilled",
            tensors={name: tensor.detach().cpu().clone() for name, tensor in self._tensors.items()},
        )

    def _made(self, starts: tuple[int, ...]) -> tuple[Pool, ...]:
        layers, training = self._known.layers, self._training
        found = []
        for number, (anchor, members) in enumerate(_groups(starts, len(layers)).items()):
            heads = layers[anchor].kv_heads
            count = training.kv_heads or heads
            if count > heads:
                raise OptionError(f"kv_heads={count}, but layer {anchor} has {heads}; give fewer")
            index = Index(str(number), FORMS[training.score], 0, count)
            found.append(Pool(anchor, training.topk, {}, members, index=index))
        if training.kv_heads is None:
            return tuple(found)
        looked_at = self._given[:: max(1, len(self._given) // LOOKED_AT)][:LOOKED_AT]
        return best_heads(self._known, found, [(ids, self._rows(0, ids)) for ids in looked_at])

    def _initial(self) -> dict[str, Tensor]:
        first = self._given[0]
        forward = self._known.forward(first)
        found: dict[str, Tensor] = {}
        for pool in self._pools:
            assert pool.index is not None
            layer = self._known.layers[pool.anchor]
            heads = pool.index.kv_heads * (layer.heads // layer.kv_heads)
            weight, width = forward.product(pool.anchor)
            found |= initial(pool.index, weight, width, heads, first.shape[1])
        return {name: tensor.requires_grad_() for name, tensor in found.items()}

    def _step(self, number: int) -> None:
        ids = self._sequence(number)
        rows = self._rows(number, ids)
        for group in self._adam.param_groups:
            group["lr"] = group["rate"] * _factor(number, self._training.steps)
        with torch.enable_grad():
            found = losses(self._probes[ids.shape[1]], self._pools, self._tensors, ids, rows)
            self._adam.zero_grad(set_to_none=True)
            torch.stack([loss.divergence + loss.added for loss in found]).sum().backward()
        norm = float(clip_grad_norm_(list(self._tensors.values()), 1.0))
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

    def _rows(self, number: int, ids: Tensor) -> Tensor:
        """Returns the rows of a step, spread over those in which tokens have to be chosen."""
        generator = torch.Generator().manual_seed(self._training.seed * 1_000_003 + number)
        first = min(self._training.topk, ids.shape[1] - 1)
        count = min(self._training.rows, ids.shape[1] - first)
        step = (ids.shape[1] - first) / count
        places = torch.arange(count) + torch.rand(count, generator=generator)
        return (first + places * step).long().clamp(max=ids.shape[1] - 1).to(self._known.device)

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


def _groups(starts: tuple[int, ...], layers: int) -> Mapping[int, tuple[int, ...]]:
    """Returns the layers of each group, the one that it begins at among them."""
    found = followers(starts, layers)
    return {start: (start, *found.get(start, ())) for start in starts}


def _factor(number: int, steps: int) -> float:
    """Returns what the rates are multiplied by: a short warm-up, then half a cosine."""
    return min(1.0, (number + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * number / steps))
