"""Options: frozen, validated, and the only reader of CLSA_* variables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from clsa_compile.errors import OptionError

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Asked for by the design, and not part of this version: an error is better than a silent no-op.
_LATER = ("topk", "scope", "dense_layers", "keep_first", "keep_last", "prefill")


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may ask for.

    share: "off", a number n (every n-th layer runs its indexer, the others read its index), or a schedule of
        the letters F and S. Changes results.
    reclaim: key caches that only indexers read which no longer run are not written either.
    strict: reasons become errors.
    dump: a folder for the graphs of each stage, or None.
    inductor: options handed on to Inductor.
    mode: one of Inductor's modes.
    autotune: kernels are timed while a graph is compiled for CUDA, and the fastest shape is kept on disk.
    """

    share: int | str = "off"
    reclaim: bool = False
    strict: bool = False
    dump: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "default"
    autotune: bool = False

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
            if key in _LATER:
                raise OptionError(f"the option {key!r} is not available in this version of clsa")
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise OptionError(
                    f"unknown option {key!r}{hint} Known options: {', '.join(known)}. "
                    f"Inductor's own options go into options={{'inductor': {{...}}}}"
                )
        if "CLSA_DUMP" in os.environ:
            given.setdefault("dump", os.environ["CLSA_DUMP"])
        if "CLSA_STRICT" in os.environ:
            given.setdefault("strict", os.environ["CLSA_STRICT"] not in ("", "0"))
        checked = cls(**given)
        checked._check()
        return checked

    def _check(self) -> None:
        checks = (
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
        )
        if wrong := _share_problem(self.share):
            accepted = "'off', a number from 1, a schedule such as 'FSSS'"
            raise OptionError(f"the option 'share' is {self.share!r}: {wrong}; accepted: {accepted}")
        for name, ok, accepted in checks:
            if not ok:
                raise OptionError(f"the option {name!r} is {getattr(self, name)!r}; accepted: {accepted}")

        if self.reclaim and self.share == "off":
            raise OptionError("the option 'reclaim' needs 'share': without it every indexer runs")

    def identity(self) -> str:
        """Returns a text that differs whenever what is compiled may differ; part of every cache key."""
        inductor = ",".join(f"{k}={self.inductor[k]!r}" for k in sorted(self.inductor))
        names = ("share", "reclaim", "strict", "mode", "autotune")
        ours = ";".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{ours};inductor={inductor}"


def _share_problem(share: object) -> str:
    """Returns what is wrong with the option `share`, "" if nothing is, before any layer is known."""
    if share == "off":
        return ""
    if isinstance(share, bool) or not isinstance(share, int | str):
        return f"a {type(share).__name__} is no schedule"
    if isinstance(share, int):
        return "" if share >= 1 else "an index is shared by 1 layer at least"
    if not share or set(share) - set("FS"):
        return "a schedule consists of F (runs its indexer) and S (reads the index of the last F)"
    if share[0] != "F":
        return "before the first F there is no index to read"
    return ""
