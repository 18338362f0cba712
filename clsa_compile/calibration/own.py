"""Students with keys of their own: the indexers that a model has, of whatever form, and caches keys for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clsa_compile.calibration import attend
from clsa_compile.calibration.fingerprint import data_hash
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.graphs import Graph
from clsa_compile.calibration.index_training import Loss, divergence
from clsa_compile.calibration.trainer import Training
from clsa_compile.errors import OptionError
from clsa_compile.ir.scores import Score
from clsa_compile.ir.sharing import SharingPlan

__all__ = ["Own"]


class Own:
    """The indexers of a model, each for the layers that read it. Its weights are copies in single precision.

    Raises OptionError where nothing is the indexers' alone.
    """

    def __init__(self, known: Model, given: Sequence[Tensor], training: Training) -> None:
        self._known, self._given, self._training = known, given, training
        lengths = {ids.shape[1]: ids for ids in given}
        self._graphs = {length: known.forward(ids).graph() for length, ids in lengths.items()}
        self.tensors = _copies(next(iter(self._graphs.values())))
        self.key: Any = "own keys"
        if not self.tensors:
            raise OptionError(
                "no weight of this model is read by its indexers alone, so there is nothing to train"
            )

    def rates(self) -> Mapping[str, float]:
        """Returns the rate that all weights begin with."""
        return dict.fromkeys(self.tensors, self._training.own_rate)

    def losses(self, ids: Tensor, rows: Tensor) -> list[Loss]:
        """Returns the loss of each indexer in some rows [n] of ids [1, T], where layers attend densely."""
        owners = self._known.owners
        seen = _Seen({owner: owners.count(owner) for owner in owners}, owners, rows)
        self._graphs[ids.shape[1]].run(ids, seen.tap, seen.index_tap, self.tensors)
        pairs = zip(seen.scores, seen.targets.values(), strict=True)
        return [Loss(divergence(scores, target), scores.new_zeros(())) for scores, target in pairs]

    def plan(self) -> SharingPlan:
        """Returns the weights as they are now, as a plan that `clsa_compile.apply` puts into the model."""
        return SharingPlan(
            topk=self._known.topk,
            layers=self._known.layers,
            pools=(),
            keep_first=0,
            keep_last=0,
            model=self._known.without(self.tensors),
            data=data_hash(self._given),
            kind="own",
            tensors={name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()},
        )


@dataclass(slots=True)
class _Seen:
    """What the taps of one forward leave behind: by owner the mean attention of those that read its index."""

    members: Mapping[int, int]
    owners: Sequence[int]
    rows: Tensor
    targets: dict[int, Tensor] = field(default_factory=dict)
    scores: list[Tensor] = field(default_factory=list)

    def tap(self, layer: int, call: attend.Operands, out: Tensor, readable: attend.Tokens | None) -> Tensor:
        """Adds a layer's dense attention to its owner's."""
        assert readable is not None
        owner = self.owners[layer]
        with torch.no_grad():
            scores = call.scores(self.rows, call.k.shape[2])
            scores = scores.masked_fill(~readable.of(self.rows), -torch.inf)
            seen = call.softmax(scores, picked=True)[0].mean(0) / self.members[owner]
        self.targets[owner] = self.targets[owner] + seen if owner in self.targets else seen
        return out

    def index_tap(self, call: attend.Operands, weight: Tensor | None, score: Score) -> None:
        """Keeps what an indexer says of the rows; they run in the order of their owners."""
        self.scores.append(attend.index_scores(call, weight, None, score, self.rows, call.k.shape[2])[0, 0])


def _copies(graph: Graph) -> dict[str, Tensor]:
    kept = graph.index_weights()
    given = {name: graph.inputs[at] for at, name in graph.weights.items()}
    return {name: given[name].detach().float().clone().requires_grad_() for name in kept}
