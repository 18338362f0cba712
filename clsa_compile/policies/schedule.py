"""Schedules: which layers choose tokens, and which read the choice of an earlier one.

A schedule is a string of one letter a layer, as vLLM, SGLang, TensorRT-LLM and Hugging Face's
`index_topk_pattern` write it: F (full) runs its own indexer, S (shared) reads the index of the last F. Ours
alone is R (reindex): it runs its own indexer over the best tokens of the last F only, and S after it read
its index.
"""

from __future__ import annotations

from collections.abc import Sequence

from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import Layer, Shares

__all__ = ["hugging_face_schedule", "roles", "shares", "shown"]

MOST_SHOWN = 100


def hugging_face_schedule(layers: int, freq: int, offset: int) -> str:
    """Returns the schedule of Hugging Face's `index_topk_freq` and `index_skip_topk_offset`.

    The first `offset` layers are full, then every `freq`-th. Raises OptionError for numbers below 1.
    """
    if min(layers, freq, offset) < 1:
        raise OptionError(
            f"no schedule has {layers} layers, freq {freq} and offset {offset}; accepted: numbers from 1"
        )
    return "".join("F" if max(i - offset + 1, 0) % freq == 0 else "S" for i in range(layers))


def roles(share: int | str, owners: Sequence[int]) -> str:
    """Returns the schedule of the layers of one graph, from the option `share`.

    `owners[i]` is the layer whose index layer i reads in the model as it is: itself where it has an indexer.
    Layers are those that can share, counted in order of execution. A layer without an indexer stays S.
    Raises OptionError where a schedule does not fit.
    """
    own = [owner == i for i, owner in enumerate(owners)]
    if share == "off" or not own:
        return "".join("F" if mine else "S" for mine in own)
    if isinstance(share, int):
        return "".join("F" if mine and i % share == 0 else "S" for i, mine in enumerate(own))
    if len(share) != len(own):
        raise OptionError(
            f"the schedule {shown(share)!r} is for {len(share)} layers; "
            f"this graph has {len(own)} that can share an index"
        )
    without = [i for i, (role, mine) in enumerate(zip(share, own, strict=True)) if role in "FR" and not mine]
    if without:
        raise OptionError(
            f"the schedule {shown(share)!r} has F or R at {', '.join(map(str, without))} (counted from 0), "
            "where the model has no indexer; accepted there: S"
        )
    return share


def shares(share: int | str, pool: int | None, owners: Sequence[int], layers: Sequence[Layer] = ()) -> Shares:
    """Returns whose index each layer reads, itself where it is F or R; see `roles`.

    A layer without an indexer follows the layer that it follows in the model, wherever that one reads now.
    """
    found: list[int] = []
    among: dict[int, int] = {}
    full = last = 0
    for i, role in enumerate(roles(share, owners)):
        last = last if role == "S" else i
        full = i if role == "F" else full
        if role == "R":
            among[i] = full
        found.append(last if owners[i] == i else found[owners[i]])
    return Shares(tuple(found), among, pool)


def shown(schedule: str) -> str:
    """Returns a schedule for a message, cut where it is long."""
    return schedule if len(schedule) <= MOST_SHOWN else f"{schedule[:MOST_SHOWN]}..."
