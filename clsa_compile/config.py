"""Options: frozen, validated, and the only reader of CLSA_* variables."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import MOST_TOKENS
from clsa_compile.ir.sharing import SCOPES, SharingPlan
from clsa_compile.ir.skips import Skips

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
PREFILLS = ("dense", "sparse")
# Where the pipeline may stop; the graph as it is then goes to Inductor.
STAGES = ("captured", "canonical", "plan", "rewritten", "lowered")
# What only means something for dense layers, and so needs `topk`.
_DENSE = ("scope", "dense_layers", "dense_below", "keep_first", "keep_last", "prefill")
# What a sharing plan says by itself.
_PLANNED = ("scope", "dense_layers", "keep_first", "keep_last")


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may ask for.

    topk: dense layers attend to this many tokens, chosen by attention mass, 1 to 4096. Changes results.
    share: "off", a number n (every n-th layer runs its indexer, the others read its index), or a schedule of
        the letters F, S and R. Changes results. On dense layers, with `topk`: F attends to all tokens and
        chooses, S attends to what the last F or R chose; "off" lets every layer choose for itself. R chooses
        again, among the `pool` tokens that the last F ranks first; a dense layer attends to these.
    pool: tokens that an R of `share` chooses among, 4096 at most; 4 times as many as are chosen by default.
    scope: "layer" (one set of tokens for all heads) or "kv_head" (one a kv head).
    dense_layers: so many of the first layers stay dense, where `share` is no schedule.
    dense_below: while the tokens that a query may read lie within so many positions, dense layers attend to
        all of them. Decided on the device; `topk` itself by default.
    keep_first, keep_last: tokens at both ends of a sequence that are always selected.
    prefill: "dense" (prompts stay dense) or "sparse".
    reclaim: key caches that only indexers read which no longer run are not written either.
    strict: reasons become errors.
    dump: a folder for the graphs of each stage, or None.
    stop_after: a stage after which the pipeline stops, or None; the graph as it is then goes to Inductor.
    skip: names of passes and layers that are left out; a text with commas between them will do.
    inductor: options handed on to Inductor.
    mode: one of Inductor's modes.
    autotune: kernels are timed while a graph is compiled for CUDA, and the fastest shape is kept on disk.
    """

    topk: int | None = None
    share: int | str | SharingPlan = "off"
    pool: int | None = None
    scope: str = "layer"
    dense_layers: int = 0
    dense_below: int = 0
    keep_first: int = 4
    keep_last: int = 32
    prefill: str = "dense"
    reclaim: bool = False
    strict: bool = False
    dump: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "default"
    autotune: bool = False
    stop_after: str | None = None
    skip: tuple[str, ...] = ()

    @property
    def skips(self) -> Skips:
        """What is left out."""
        return Skips(self.skip)

    @classmethod
    def read(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Validates what came through `torch.compile`. Raises OptionError naming key, value and remedy."""
        given = dict(options or {})
        if mode is not None:
            if given.get("mode", mode) != mode:
                raise OptionError(
                    f"mode={mode!r} and options['mode']={given['mode']!r} contradict each other"
                )
            given["mode"] = mode
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                raise OptionError(
                    f"unknown option {key!r}{_hint(key, known)} Known options: {', '.join(known)}. "
                    f"Inductor's own options go into options={{'inductor': {{...}}}}"
                )
        if "CLSA_DUMP" in os.environ:
            given.setdefault("dump", os.environ["CLSA_DUMP"])
        if "CLSA_STRICT" in os.environ:
            given.setdefault("strict", os.environ["CLSA_STRICT"] not in ("", "0"))
        if os.environ.get("CLSA_STOP_AFTER"):
            given.setdefault("stop_after", os.environ["CLSA_STOP_AFTER"])
        given["skip"] = _names(given.get("skip", os.environ.get("CLSA_SKIP", "")))
        _take_plan(given)
        for key in _DENSE:
            if key in given and given.get("topk") is None:
                raise OptionError(f"the option {key!r} is for dense layers, and needs 'topk'")
        checked = cls(**given)
        checked._check()
        return checked

    def _check(self) -> None:
        checks = (
            (
                "topk",
                self.topk is None or is_count(self.topk, 1, MOST_TOKENS),
                f"1 to {MOST_TOKENS}, or None",
            ),
            (
                "pool",
                self.pool is None or is_count(self.pool, 2, MOST_TOKENS),
                f"2 to {MOST_TOKENS}, or None",
            ),
            ("scope", self.scope in SCOPES, " or ".join(map(repr, SCOPES))),
            ("dense_layers", is_count(self.dense_layers, 0), "a number from 0"),
            ("dense_below", is_count(self.dense_below, 0), "a number from 0"),
            ("keep_first", is_count(self.keep_first, 0), "a number from 0"),
            ("keep_last", is_count(self.keep_last, 0), "a number from 0"),
            ("prefill", self.prefill in PREFILLS, " or ".join(map(repr, PREFILLS))),
            ("reclaim", isinstance(self.reclaim, bool), "True or False"),
            ("strict", isinstance(self.strict, bool), "True or False"),
            (
                "dump",
                self.dump is None or isinstance(self.dump, str | os.PathLike),
                "a folder's path, or None",
            ),
            (
                "inductor",
                isinstance(self.inductor, Mapping) and all(isinstance(k, str) for k in self.inductor),
                "a dict of Inductor's options by name",
            ),
            ("mode", self.mode in MODES, f"one of {', '.join(MODES)}"),
            ("autotune", isinstance(self.autotune, bool), "True or False"),
            (
                "stop_after",
                self.stop_after is None or self.stop_after in STAGES,
                f"one of {', '.join(STAGES)}{_hint(self.stop_after, STAGES)}",
            ),
            (
                "skip",
                isinstance(self.skip, tuple) and all(isinstance(name, str) and name for name in self.skip),
                "names of passes and layers, with commas between them",
            ),
        )
        if wrong := _share_problem(self.share):
            accepted = "'off', a number from 1, a schedule such as 'FSSS', a SharingPlan or its .json file"
            raise OptionError(f"the option 'share' is {self.share!r}: {wrong}; accepted: {accepted}")
        for name, ok, accepted in checks:
            if not ok:
                raise OptionError(f"the option {name!r} is {getattr(self, name)!r}; accepted: {accepted}")
        if self.reclaim and self.share == "off":
            raise OptionError("the option 'reclaim' needs 'share': without it every indexer runs")
        if self.pool is not None and not (isinstance(self.share, str) and "R" in self.share):
            raise OptionError("the option 'pool' needs an R in 'share': no other layer chooses among a pool")
        if self.topk is not None and self.keep_first + self.keep_last > self.topk:
            kept = f"keep_first={self.keep_first} and keep_last={self.keep_last}"
            raise OptionError(
                f"{kept} are more tokens than topk={self.topk} selects; give smaller ones, or a larger 'topk'"
            )
        if self.dense_layers and isinstance(self.share, str) and self.share != "off":
            raise OptionError(
                "'dense_layers' and a schedule in 'share' contradict each other; give one of them"
            )

    def identity(self) -> str:
        """Returns a text that differs whenever what is compiled may differ; part of every cache key."""
        inductor = ",".join(f"{k}={self.inductor[k]!r}" for k in sorted(self.inductor))
        names = ("topk", "pool", *_DENSE, "reclaim", "strict", "mode", "autotune", "stop_after", "skip")
        ours = ";".join(f"{name}={getattr(self, name)!r}" for name in names)
        share = self.share.digest() if isinstance(self.share, SharingPlan) else repr(self.share)
        return f"share={share};{ours};inductor={inductor}"


def _take_plan(given: dict[str, Any]) -> None:
    """Reads a plan's file, and puts what a plan says in place of options that must not contradict it."""
    share = given.get("share")
    if isinstance(share, os.PathLike) or (isinstance(share, str) and share.endswith(".json")):
        given["share"] = share = SharingPlan.load(share)
    if not isinstance(share, SharingPlan):
        return
    for key in _PLANNED:
        if key in given:
            raise OptionError(f"the option {key!r} comes from the plan in 'share'; leave it out")
    if share.kind == "own":
        raise OptionError(
            "the plan in 'share' holds weights of the model's own indexers: clsa_compile.apply(model, plan) "
            "puts them into the model, which then compiles without it"
        )
    if share.kind == "index":
        if given.get("topk") is not None:
            raise OptionError(
                f"topk={given['topk']!r} is for dense layers, and the plan in 'share' is for layers with "
                f"indexers, which select {share.topk} tokens as they were trained to; leave 'topk' out"
            )
        return
    if given.get("topk", share.topk) != share.topk:
        raise OptionError(
            f"topk={given['topk']!r} and the plan's {share.topk} contradict each other; leave 'topk' out, "
            "or search for a plan with that number"
        )
    given.update(topk=share.topk, scope=share.scope, keep_first=share.keep_first, keep_last=share.keep_last)


def _hint(given: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(given), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _names(given: object) -> object:
    """Returns the names in a text, or those that were given one by one."""
    if isinstance(given, str):
        return tuple(name.strip() for name in given.split(",") if name.strip())
    return tuple(given) if isinstance(given, list) else given


def is_count(value: object, least: int, most: float = math.inf) -> bool:
    """Tells whether a value is a whole number between two, both included."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_budget(value: object) -> bool:
    """Tells whether a value can be an increase of perplexity to stay within."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _share_problem(share: object) -> str:
    """Returns what is wrong with the option `share`, "" if nothing is, before any layer is known."""
    if share == "off" or isinstance(share, SharingPlan):
        return ""
    if isinstance(share, bool) or not isinstance(share, int | str):
        return f"a {type(share).__name__} is no schedule"
    if isinstance(share, int):
        return "" if share >= 1 else "an index is shared by 1 layer at least"
    if not share or set(share) - set("FRS"):
        return (
            "a schedule consists of F (runs its indexer), S (reads the index of the last F or R) and R "
            "(chooses among what the last F offers)"
        )
    if share[0] != "F":
        return "before the first F there is no index to read"
    return ""
