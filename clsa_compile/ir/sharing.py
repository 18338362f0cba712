"""SharingPlan: a found sharing of one model, as a file that says for whom it is and how good it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from clsa_compile.errors import ExpressionError, PlanError
from clsa_compile.ir import tensors as files
from clsa_compile.ir.files import write_text
from clsa_compile.ir.fingerprint import Fingerprint, middles
from clsa_compile.ir.routing import MOST_TOKENS, Index, Layer, Pool, role
from clsa_compile.ir.schema import count, each, integer_keys, named, number, record, refuse, text

__all__ = ["SCOPES", "SharingPlan"]

FORMAT = "clsa sharing plan"
# Before version 3 a few weights only told a plan's model from others.
VERSION = 3
SCOPES = ("layer", "kv_head")
KINDS = ("mass", "index", "distilled", "own")
_AGAIN = "search again (clsa search), or distill (clsa distill), or take a whole copy of the file"
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class SharingPlan:
    """Which layers choose tokens for which, by heads and weights; `clsa_compile.search` makes it.

    topk: tokens of a set. layers: those that may share, in order of execution; their `ordinal` counts from 0
    and everything below names layers by it. pools: see `ir.routing.Pool`. keep_first, keep_last: tokens at
    both ends that are always in a set. scope: one set for all heads ("layer") or one a kv head ("kv_head").
    power: mass is the probability raised to it. model, data: whose plan it is, and the sha256 of the tokens
    that it was made from. quality: what was measured on tokens that were not used to make it.

    kind: "mass" where layers that attend to all tokens choose, "index" where layers with indexers of their
    own do, whose pools are layers that read the anchor's index, and nothing else. "distilled" where indices
    do that `clsa_compile.distill` trained; no layer attends to all tokens then, and `tensors` are their
    weights, which lie in a file beside the plan's. "own" where it trained the indexers that the model has:
    `tensors` then take the place of weights of the model, by their names. weights: the sha256 of `tensors`.

    Raises PlanError where parts contradict each other.
    """

    topk: int
    layers: tuple[Layer, ...]
    pools: tuple[Pool, ...]
    keep_first: int = 4
    keep_last: int = 32
    scope: str = "layer"
    power: float = 1.0
    model: Fingerprint | None = None
    data: str = ""
    quality: Mapping[str, float] = field(default_factory=dict)
    kind: str = "mass"
    weights: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.tensors:
            object.__setattr__(self, "weights", files.digest(self.tensors))
        for problem in _problems(self):
            raise PlanError(f"{problem}; {_AGAIN}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SharingPlan:
        """Reads a file that `save` wrote. Raises PlanError naming the file and what is wrong in it."""
        try:
            content = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"the plan {os.fspath(path)!r} cannot be read: {error}") from error
        try:
            data = json.loads(content)
        # Not only JSONDecodeError: Python reads no number of thousands of digits, and no thousand levels.
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan {os.fspath(path)!r} is no whole JSON ({error}); {_AGAIN}") from error
        try:
            _check_version(data)
            return cls.from_dict(data, _weights(path, data))
        except PlanError as error:
            raise PlanError(f"the plan {os.fspath(path)!r}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, whole or not at all, after its weights, where it has any.

        Raises PlanError where that cannot be.
        """
        try:
            if self.tensors:
                files.write(files.beside(path, self.weights), self.tensors)
            write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise PlanError(f"the plan cannot be written to {os.fspath(path)!r}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain data, ready for JSON."""
        kept = ("anchor", "members", "sources", "rows", "index")
        layers = [{k: v for k, v in asdict(layer).items() if k != "ordinal"} for layer in self.layers]
        changed = {
            "layers": layers,
            "pools": [{name: pool.to_dict()[name] for name in kept} for pool in self.pools],
            "model": None if self.model is None else asdict(self.model),
            "quality": {name: float(value) for name, value in self.quality.items()},
        }
        names = [f.name for f in fields(self) if f.name != "tensors"]
        data = {name: changed.get(name, getattr(self, name)) for name in names}
        return {"format": FORMAT, "version": VERSION, **data}

    @classmethod
    def from_dict(cls, data: Any, tensors: Mapping[str, Tensor] | None = None) -> SharingPlan:
        """Reads what `to_dict` returned, with the weights that are not in it.

        Raises PlanError naming the field that does not fit.
        """
        _check_version(data)
        given = _PLAN(data, "")
        del given["format"], given["version"]
        same = {name: given[name] for name in ("topk", "keep_first", "keep_last", "power")}
        given["layers"] = tuple(Layer(ordinal=i, **layer) for i, layer in enumerate(given["layers"]))
        given["pools"] = tuple(Pool(**pool, **same) for pool in given["pools"])
        return cls(**given, tensors=tensors or {})

    def digest(self) -> str:
        """Returns the sha256 of the content: it differs whenever what is compiled may differ."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def at(self, topk: int) -> SharingPlan:
        """Returns the plan for another number of tokens; what was measured is not known for it.

        For indices only, which rank all tokens: weights of heads were fitted to a number of them. Raises
        PlanError.
        """
        if self.kind != "distilled":
            raise PlanError(f"this plan is for {self.topk} tokens; {_AGAIN}")
        pools = tuple(replace(pool, topk=topk) for pool in self.pools)
        return replace(self, topk=topk, pools=pools, quality={})

    def check_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Raises PlanError where weights, by name, are not those of the plan's model; some may be missing."""
        if self.model is not None:
            _refuse_model(self.model.departs(middles(weights)))

    def check_model(self, found: Fingerprint) -> None:
        """Raises PlanError for a model that is not the plan's."""
        if self.model is not None:
            _refuse_model(self.model.difference(found))

    def pattern(self) -> str:
        """Returns the schedule, a letter a layer: S attends to tokens that the last F, or I, chose.

        For layers with indexers it is what vLLM, SGLang and TensorRT-LLM take as `index_topk_pattern`.
        """
        return "".join(role(self.pools, layer.ordinal) for layer in self.layers)

    def __repr__(self) -> str:
        return f"SharingPlan({self.pattern()}, topk={self.topk}, {self.digest()[:12]})"


def _refuse_model(why: str) -> None:
    if why:
        raise PlanError(f"the plan is for another model than this one: {why}; search for a plan for it")


def _check_version(data: Any) -> None:
    """Guards the reader: what another version wrote may mean something else."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise PlanError(f"this is no sharing plan: its 'format' is not {FORMAT!r}")
    if data.get("version") != VERSION:
        raise PlanError(
            f"its version is {data.get('version')!r}, and this clsa reads version {VERSION}: search again, "
            "or use the clsa that wrote it"
        )


def _weights(path: str | os.PathLike[str], data: Any) -> dict[str, Tensor]:
    """Returns the weights that belong to a plan's data, none where it has none."""
    identity = data.get("weights", "")
    if identity == "":
        return {}
    if not isinstance(identity, str) or not _DIGEST.fullmatch(identity):
        raise refuse(identity, "weights", "a sha256 in hexadecimal digits")
    return files.read(files.beside(path, identity), identity)


def _problems(plan: SharingPlan) -> list[str]:
    """Returns what contradicts itself in a plan."""
    found = []
    if isinstance(plan.topk, bool) or not isinstance(plan.topk, int) or not 1 <= plan.topk <= MOST_TOKENS:
        return [f"topk is {plan.topk!r}; accepted: 1 to {MOST_TOKENS}"]
    if plan.kind not in KINDS:
        return [f"kind is {plan.kind!r}; accepted: {' or '.join(map(repr, KINDS))}"]
    if plan.scope not in SCOPES:
        found.append(f"scope is {plan.scope!r}; accepted: {' or '.join(map(repr, SCOPES))}")
    if min(plan.keep_first, plan.keep_last) < 0 or plan.keep_first + plan.keep_last > plan.topk:
        kept = f"keep_first={plan.keep_first} and keep_last={plan.keep_last}"
        found.append(f"{kept} do not fit into topk={plan.topk}")
    if not plan.power > 0:
        found.append(f"power is {plan.power}; accepted: numbers above 0")
    if not plan.layers:
        found.append("it has no layers")
    if [layer.ordinal for layer in plan.layers] != list(range(len(plan.layers))):
        found.append("its layers are not counted from 0")
    if found:
        return found
    if plan.kind == "own":
        return _own_problems(plan)
    taken: set[int] = set()
    for i, pool in enumerate(plan.pools):
        found += [f"pools[{i}]: {problem}" for problem in _pool_problems(plan, pool)]
        if taken & set(pool.members):
            found.append(f"pools[{i}]: a layer attends to the tokens of one pool only")
        taken |= set(pool.members)
    for i, pool in enumerate(plan.pools):
        if pool.anchor in taken - set(pool.members):
            found.append(f"pools[{i}]: layer {pool.anchor} chooses, and attends to what another one chose")
    names = [pool.index.name for pool in plan.pools if pool.index is not None]
    if len(set(names)) < len(names):
        found.append("two of its indices have one name")
    return found


def _pool_problems(plan: SharingPlan, pool: Pool) -> list[str]:
    found = []
    number_of = len(plan.layers)
    named_layers = {pool.anchor, *pool.members, *pool.sources, *pool.rows}
    if not named_layers <= set(range(number_of)):
        return [f"it names a layer outside of 0 to {number_of - 1}"]
    ours = (pool.topk, pool.keep_first, pool.keep_last, pool.power)
    if ours != (plan.topk, plan.keep_first, plan.keep_last, plan.power):
        found.append("its topk, keep_first, keep_last or power is not the plan's")
    if not pool.members or min(pool.members) < pool.anchor:
        found.append(f"its members must come after layer {pool.anchor}, which chooses")
    if plan.kind == "index":
        if pool.members != tuple(range(pool.anchor + 1, pool.anchor + 1 + len(pool.members))):
            found.append(f"its members must be those right after layer {pool.anchor}, whose index they read")
        return [*found, "it weighs heads, which no indexer asks for"] if pool.sources or pool.rows else found
    if plan.kind == "distilled":
        return found + _index_problems(plan, pool)
    if pool.index is not None:
        found.append("it has an index, which is for plans of the kind 'distilled'")
    if not pool.sources or max(pool.sources) > pool.anchor:
        found.append(f"its sources must be layers up to {pool.anchor}, which chooses")
        return found
    sets = pool.sets
    for layer, rows in pool.sources.items():
        heads = plan.layers[layer].heads
        if len(rows) != sets or sets < 1 or any(len(row) != heads for row in rows):
            found.append(f"layer {layer} needs {sets} rows of {heads} weights, one a head")
        elif any(weight < 0 for row in rows for weight in row):
            found.append(f"a weight of layer {layer} is below 0")
    for layer, chosen in pool.rows.items():
        if len(chosen) != plan.layers[layer].kv_heads or not all(0 <= row < sets for row in chosen):
            found.append(f"rows of layer {layer} must name one of {sets} sets for each kv head")
    return found


def _own_problems(plan: SharingPlan) -> list[str]:
    """Returns what contradicts itself in a plan of the weights of a model's own indexers."""
    if plan.pools:
        return ["its layers read indexers of their own, so it has no pools"]
    if not plan.tensors:
        return ["the weights of its indexers are missing"]
    if not all(bool(tensor.isfinite().all()) for tensor in plan.tensors.values()):
        return ["the weights of its indexers are not all numbers"]
    return []


def _index_problems(plan: SharingPlan, pool: Pool) -> list[str]:
    """Returns what contradicts itself in a pool whose index was trained."""
    from clsa_compile.ir.scores import parse_score  # needs sympy, for which loading a package does not wait

    if pool.index is None or pool.sources or pool.rows:
        return ["it needs an index, and nothing else"]
    index, layer = pool.index, plan.layers[pool.anchor]
    found = []
    if pool.members != tuple(range(pool.anchor, pool.anchor + len(pool.members))):
        found.append(f"layer {pool.anchor} chooses: its members must be that one and those right after it")
    if index.kv_heads < 1 or index.first_head + index.kv_heads > layer.kv_heads:
        found.append(f"its index reads key heads that layer {pool.anchor} has not")
    try:
        parse_score(index.score)
    except ExpressionError as error:
        found.append(str(error))
    heads = index.kv_heads * (layer.heads // max(1, layer.kv_heads))
    query, head, bias = (plan.tensors.get(name) for name in index.tensor_names())
    if query is None or head is None or bias is None:
        return [*found, f"the weights of the index {index.name!r} are missing"]
    if query.dim() != 2 or head.dim() != 2 or head.shape[0] != heads or bias.shape != (heads,):
        found.append(f"the weights of the index {index.name!r} have other shapes than {heads} heads need")
    elif head.shape[1] not in query.shape:
        found.append(f"the weights of the index {index.name!r} are for states of different widths")
    if not all(bool(tensor.isfinite().all()) for tensor in (query, head, bias)):
        found.append(f"the weights of the index {index.name!r} are not all numbers")
    return found


_LAYER = record(
    {
        "path": text,
        "heads": count,
        "kv_heads": count,
        "width": count,
        "value_width": count,
        "scale": number,
        "softcap": number,
    }
)
_INDEX = record({"name": text, "score": text, "first_head": count, "kv_heads": count})
_POOL = record(
    {
        "anchor": count,
        "members": each(count),
        "sources": integer_keys(each(each(number))),
        "rows": integer_keys(each(count)),
        "index": lambda value, where: None if value is None else Index(**_INDEX(value, where)),
    }
)
_MODEL = record(
    {"name": text, "layers": count, "shapes": text, "weights": named(number), "tables": named(number)}
)
_PLAN = record(
    {
        "format": text,
        "version": count,
        "topk": count,
        "layers": each(_LAYER),
        "pools": each(_POOL),
        "keep_first": count,
        "keep_last": count,
        "scope": text,
        "power": number,
        "model": lambda value, where: None if value is None else Fingerprint(**_MODEL(value, where)),
        "data": text,
        "quality": named(number),
        "kind": text,
        "weights": text,
    }
)
