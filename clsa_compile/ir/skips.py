"""Skips: what a user has left out, to find which pass or layer makes a difference."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from clsa_compile.errors import OptionError

__all__ = ["PASSES", "Skips"]

# Passes that may be left out: without any of them a graph computes the same.
PASSES = {
    "replay": "every call is traced, also those that were traced before",
    "canonicalize": "dead nodes stay",
    "number": "what repeats is computed again",
    "indexer": "selections are applied as masks, as in the model",
    "reclaim": "key caches of indexers that do not run are written",
    "early": "all positions of a prompt go through all layers",
    "tables": "tables of sines are computed again by each reader",
    "mask_bounds": "kernels are not told between which keys a mask lies",
}


@dataclass(frozen=True, slots=True)
class Skips:
    """Names of what is left out.

    A name is that of a pass, of a family of patterns ("eager"), of a kernel variant ("attention.decode"),
    a layer's number as reports print it ("3"), or consecutive parts of a module's path ("layers.3").
    """

    names: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def layer(self, path: str, number: int) -> str:
        """Returns the name by which the layer at a module path is left out, or ""."""
        return next((n for n in self.names if n == str(number) or _is_part(n, path)), "")

    def passes(self, others: Collection[str]) -> tuple[str, ...]:
        """Returns the names of passes among those given; `others` are further names like theirs."""
        return tuple(n for n in self.names if n in PASSES or n in others)

    def unknown(self, others: Collection[str], paths: Iterable[str]) -> tuple[str, ...]:
        """Returns the names that nothing bears, though layers in other graphs may.

        `others` are names besides those of passes, `paths` the module paths of a graph's layers. Raises
        OptionError for a name that is unlike all of them.
        """
        seen = tuple(paths)
        if not seen:
            return ()  # a graph without attention says nothing about names
        numberless = [_NUMBER.sub("0", path) for path in seen]
        missing = []
        for name in self.names:
            if name in PASSES or name in others or any(_is_part(name, path) for path in seen):
                continue
            alike = name.isdigit() or any(_is_part(_NUMBER.sub("0", name), path) for path in numberless)
            if not alike:
                raise OptionError(_no_such(name, [*PASSES, *others], seen))
            missing.append(name)
        return tuple(missing)


_NUMBER = re.compile(r"\d+")


def _is_part(name: str, path: str) -> bool:
    return f".{name}." in f".{path}."


def _no_such(name: str, known: list[str], paths: tuple[str, ...]) -> str:
    pieces = {piece for path in paths for piece in _pieces(path)}
    near = difflib.get_close_matches(name, [*known, *sorted(pieces)], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return (
        f"the option 'skip' (CLSA_SKIP) names {name!r}, which is no pass and no layer{hint} Passes and the "
        f"like: {', '.join(known)}. Layers go by number or by module path, as {paths[0]!r} or a part of it"
    )


def _pieces(path: str) -> set[str]:
    """Returns all runs of consecutive parts of a module path."""
    parts = path.split(".")
    return {
        ".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)
    }  # fmt: skip
