"""Students over borrowed keys: indices for a dense model, which rank what the layers cache anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from clsa_compile.calibration.fingerprint import data_hash
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.index_training import FORMS, Loss, best_heads, initial, losses
from clsa_compile.calibration.trainer import Training, rows_of
from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import Index, Pool
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.policies.anchors import followers

__all__ = ["Borrowed"]

# Sequences by which key heads are chosen.
LOOKED_AT = 4


class Borrowed:
    """The indices of all groups, which begin at `starts`; they begin as their layers' own queries."""

    def __init__(
        self, known: Model, given: Sequence[Tensor], starts: tuple[int, ...], training: Training
    ) -> None:
        self._known, self._given, self._training = known, given, training
        self.key: Any = list(starts)
        self._pools = self._made(starts)
        self.tensors = self._initial()
        lengths = {ids.shape[1]: ids for ids in given}
        self._probes = {t: known.forward(ids).probe(self._pools, self.tensors) for t, ids in lengths.items()}

    def rates(self) -> Mapping[str, float]:
        """Returns the rates that weights begin with: queries have one, the weights of heads another."""
        training = self._training
        return {
            name: training.query_rate if name.endswith(".query") else training.head_rate
            for name in self.tensors
        }

    def losses(self, ids: Tensor, rows: Tensor) -> list[Loss]:
        """Returns the loss of each group's index in some rows [n] of ids [1, T]."""
        training = self._training
        seed = training.seed if training.target == "worth" else None
        return losses(self._probes[ids.shape[1]], self._pools, self.tensors, ids, rows, seed)

    def plan(self) -> SharingPlan:
        """Returns the plan of the indices as they are now."""
        return SharingPlan(
            topk=self._training.topk,
            layers=self._known.layers,
            pools=self._pools,
            keep_first=0,
            keep_last=0,
            model=self._known.fingerprint,
            data=data_hash(self._given),
            kind="distilled",
            tensors={name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()},
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
        return best_heads(self._known, found, [(ids, rows_of(training, 0, ids)) for ids in looked_at])

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


def _groups(starts: tuple[int, ...], layers: int) -> Mapping[int, tuple[int, ...]]:
    """Returns the layers of each group, the one that it begins at among them."""
    found = followers(starts, layers)
    return {start: (start, *found.get(start, ())) for start in starts}
