"""What a search and an evaluation are given: a model, whose forward is captured, a plan, and tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clsa_compile.backend import requested, sharing
from clsa_compile.calibration.fingerprint import of_model
from clsa_compile.calibration.graphs import Change, Forward, Graph, fitting
from clsa_compile.calibration.stages import Stages
from clsa_compile.config import Options
from clsa_compile.errors import OptionError
from clsa_compile.ir.fingerprint import Fingerprint
from clsa_compile.ir.routing import Pool, offered, role
from clsa_compile.ir.sharing import SharingPlan

__all__ = ["Asked", "Model", "Planned", "asked", "check_length", "sequences"]

# A sequence must have this many tokens more than are selected: with fewer, nothing is left out.
MARGIN = 16

# What becomes of a sequence that is hardly longer than an option says.
_WHY = {
    "topk": "next to nothing would be left out",
    "dense_below": "attention over so few tokens stays dense, and next to no others would be measured",
    "pool": "an R would choose among nearly all of its tokens, as an F does",
}

# A plan, its file, or options of the backend.
Planned = SharingPlan | str | os.PathLike[str] | Mapping[str, Any]


class Model:
    """A model with its captured forwards, one a length, and the folder in which results are kept."""

    def __init__(self, model: Any, first: Tensor, stages: Stages) -> None:
        self.model = model
        self.stages = stages
        self.device = _first(model).device
        self._forwards: dict[int, Forward] = {}
        forward = self.forward(first)
        self.layers, self.topk, self.owners = forward.layers, forward.topk, forward.owners
        self.fingerprint = of_model(model, forward.attentions)
        self._first_forward = forward

    @cached_property
    def key(self) -> Any:
        """What results depend on besides the tokens: all that a forward computes, and where it rounds.

        Nothing where no results are kept: every weight is read for it.
        """
        return [self._first_forward.identity(), self.device.type] if self.stages.keeps else []

    @property
    def choosers(self) -> list[int]:
        """The layers that have an index of the model's own, and read it."""
        return [i for i, owner in enumerate(self.owners) if owner == i]

    def forward(self, ids: Tensor) -> Forward:
        """Returns the forward for the length of ids [1, T]."""
        length = ids.shape[1]
        if length not in self._forwards:
            self._forwards[length] = fitting(self.model, ids.to(self.device))
        return self._forwards[length]

    def check(self, asked: Asked) -> None:
        """Raises PlanError for another model's plan, and OptionError for what this one cannot be asked."""
        if asked.own is not None:
            asked.own.check_model(self.without(asked.own.tensors))
        if isinstance(asked.options.share, SharingPlan):
            asked.options.share.check_model(self.fingerprint)
        self.check_topk(asked.topk or None, "'share' alone lets its layers share an index")

    def without(self, weights: Container[str]) -> Fingerprint:
        """Returns the fingerprint that does not look at the values of some weights."""
        return of_model(self.model, self.fingerprint.layers, weights)

    def check_topk(self, topk: int | None, instead: str) -> None:
        """Raises OptionError where a number of tokens is given and the model has its own, or neither is."""
        if self.topk and topk is not None:
            raise OptionError(
                f"this model selects {self.topk} tokens by itself, with indexers that it was trained with: "
                f"leave 'topk' out; {instead}"
            )
        if not self.topk and topk is None:
            raise OptionError(
                "no layer of this model selects tokens by itself in sequences of this length: give 'topk', "
                "or longer sequences"
            )

    def long_enough(self, given: Sequence[Tensor]) -> None:
        """Raises OptionError where a sequence is hardly longer than what the model selects by itself."""
        check_length(min(ids.shape[1] for ids in given), {"topk": self.topk})

    def pools(self, length: int, identity: str, graph: Callable[[], Graph]) -> tuple[Pool, ...]:
        """Returns who attends to whose tokens in a graph of a length; `identity` names it in the folder."""
        key = [self.key, length, identity]
        kept = self.stages.data("pools", key, lambda: [pool.to_dict() for pool in graph().pools])
        return tuple(map(Pool.from_dict, kept))

    def agreed(self, pools: Mapping[int, tuple[Pool, ...]]) -> tuple[Pool, ...]:
        """Returns who attends to whose tokens at all lengths. Raises OptionError where they differ."""
        (length, first), *others = pools.items()
        for other, found in others:
            if _reads(found) != _reads(first):
                raise OptionError(
                    f"layers do not read the same at all lengths: sequences of {length} tokens run "
                    f"{self.schedule(first)}, of {other} {self.schedule(found)}; give sequences of one length"
                )
        return first

    def schedule(self, pools: Sequence[Pool]) -> str:
        """Returns a letter for each layer, see `ir.routing.role`."""
        return "".join(role(pools, i) for i in range(len(self.layers)))


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be measured: the options of the backend, and what they change, prompts too.

    change is None where only the weights of the model's own indexers are others, those of the plan `own`.
    """

    options: Options
    change: Change | None
    own: SharingPlan | None = None

    @property
    def weights(self) -> Mapping[str, Tensor] | None:
        """The weights of the model's own indexers, where they were trained."""
        return None if self.own is None else self.own.tensors

    @property
    def identity(self) -> str:
        """A text that differs whenever what is measured may differ."""
        return self.options.identity() if self.own is None else self.own.digest()

    @property
    def topk(self) -> int:
        """The tokens that dense layers are to attend to, 0 where the model's own number stands."""
        return self.options.topk or 0

    @property
    def limits(self) -> dict[str, int]:
        """By option, how many tokens a prompt may have and still run as if nothing were asked of it."""
        options = self.options
        if options.topk is None:
            return {"topk": 0}
        found = {"topk": options.topk, "dense_below": options.dense_below}
        again = isinstance(options.share, str) and "R" in options.share
        return {**found, "pool": offered(options.topk, options.pool)} if again else found


def asked(plan: Planned) -> Asked:
    """Returns what a plan, or options, ask for.

    Raises OptionError for options that cannot be, and for those that leave the model as it is.
    """
    if not isinstance(plan, Mapping | SharingPlan):
        plan = SharingPlan.load(plan)
    if isinstance(plan, SharingPlan) and plan.kind == "own":
        return Asked(Options(), None, plan)
    options = Options.read(plan if isinstance(plan, Mapping) else {"share": plan})
    request, shared = requested(options), sharing(options)
    if request is not None:
        return Asked(options, replace(request, prompts=True))
    if shared is None:
        raise OptionError("there is nothing to measure without 'topk' or 'share', or a plan that brings them")
    return Asked(options, shared)


def sequences(batches: Any, limits: Mapping[str, int], model: Any = None) -> list[Tensor]:
    """Returns ids [1, T] of batches: ids [B, T] or [T], or what a tokenizer makes, without its padding.

    Raises OptionError for none, for those that are too short for the `limits` of what is asked, and for ids
    that `model` has no embedding of.
    """
    parts = [batches] if isinstance(batches, Tensor | Mapping) else list(batches)
    found = [row for i, part in enumerate(parts) for row in _rows(part, i)]
    if not found:
        raise OptionError("there are no tokens: give batches of ids [B, T], text of several kinds")
    check_length(min(ids.shape[1] for ids in found), limits)
    known = _vocabulary(model)
    ends = (int(end) for ids in found for end in ids.aminmax())
    wrong = next((end for end in ends if not 0 <= end < known), None)
    if wrong is not None:
        last = "" if known == math.inf else f" to {known - 1}"
        raise OptionError(
            f"there is a token id {wrong}; the model's go from 0{last}: was this its tokenizer?"
        )
    return found


def _rows(part: Any, i: int) -> list[Tensor]:
    """Returns the sequences [1, T] of one batch."""
    mask = None
    if isinstance(part, Mapping):
        if "input_ids" not in part:
            raise OptionError(
                f"batch {i} has {', '.join(map(repr, part)) or 'nothing'}; expected 'input_ids'"
            )
        part, mask = part["input_ids"], part.get("attention_mask")
    ids = _tensor(part, f"batch {i}")
    if ids.dim() not in (1, 2) or ids.is_floating_point():
        raise OptionError(
            f"batch {i} is {ids.dtype} of shape {list(ids.shape)}; expected token ids [B, T] or [T]"
        )
    if not ids.numel():
        return []
    rows = ids.reshape(-1, ids.shape[-1]).long().split(1)
    if mask is None:
        return list(rows)
    kept = _tensor(mask, f"the attention_mask of batch {i}")
    if kept.shape != ids.shape:
        raise OptionError(
            f"batch {i} has ids of shape {list(ids.shape)} and an attention_mask of {list(kept.shape)}"
        )
    return [row[keep != 0][None] for row, keep in zip(rows, kept.reshape(-1, 1, ids.shape[-1]), strict=True)]


def _tensor(given: Any, what: str) -> Tensor:
    try:
        return given if isinstance(given, Tensor) else torch.as_tensor(given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise OptionError(
            f"{what} is no tensor ({error}); expected [B, T] or [T], other lengths in other batches"
        ) from error


def _vocabulary(model: Any) -> float:
    """Returns how many tokens a model of Hugging Face has embeddings of; infinity where it does not say."""
    try:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # transformers' word for a layout of its own
        return math.inf
    return getattr(embeddings, "num_embeddings", math.inf)


def check_length(length: int, limits: Mapping[str, int]) -> None:
    """Raises OptionError for a sequence that is not MARGIN tokens longer than the largest of `limits`."""
    name = max(limits, key=limits.__getitem__)
    least = limits[name] + MARGIN
    if length >= least:
        return
    instead = "" if name == "topk" else f", or a smaller {name!r}"
    raise OptionError(
        f"a sequence of {length} tokens is too short for {name}={limits[name]}: {_WHY[name]}; "
        f"give {least} at least, better {4 * limits[name]}{instead}"
    )


def _reads(pools: Sequence[Pool]) -> set[tuple[int, tuple[int, ...]]]:
    return {(pool.anchor, pool.members) for pool in pools}


def _first(model: Any) -> Tensor:
    """Returns a model's first weight, a number on the CPU for a model without any."""
    found = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    return torch.zeros(()) if found is None else found
