"""What lies in a folder of MLIR, as JSON: files with digests, and each program's arguments and results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from clsa_compile.errors import MlirError
from clsa_compile.mlir.program import Argument, Kind, Result

__all__ = ["NAME", "FileInfo", "Manifest", "ProgramFiles"]

NAME = "manifest.json"
_FORMAT, _VERSION = "clsa-mlir", 1
_KINDS = ("parameter", "buffer", "constant", "input")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of the folder: its size in bytes and its sha256."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ProgramFiles:
    """One program.

    files: by form ("torch", "linalg"), its file. arguments, results: in the order of the function, which has
    the program's name; `tensor` of an argument is its name in the file of weights. ranges: of each symbol in
    sizes, the least and the largest value, None for any. operators: custom ops that the form "torch" keeps.
    dialects: by form.
    """

    name: str
    files: Mapping[str, str]
    arguments: tuple[Argument, ...]
    results: tuple[Result, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    operators: Mapping[str, int]
    dialects: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of a folder. weights: the file of weights, None where they were left out."""

    versions: Mapping[str, str]
    programs: Mapping[str, ProgramFiles]
    weights: str | None
    files: Mapping[str, FileInfo]

    def to_json(self) -> str:
        """Returns the manifest's text."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads a manifest. Raises MlirError for anything that is none, or of another version."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise MlirError(f"{NAME} is no JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise MlirError(f"{NAME} does not describe MLIR that clsa wrote")
        if data.get("version") != _VERSION:
            raise MlirError(
                f"{NAME} is of version {data.get('version')!r}, and this clsa reads version {_VERSION}; "
                "export the model again"
            )
        try:
            return cls(
                {str(k): str(v) for k, v in data["versions"].items()},
                {str(name): _program(value) for name, value in data["programs"].items()},
                None if data["weights"] is None else str(data["weights"]),
                {str(k): FileInfo(int(v["bytes"]), str(v["sha256"])) for k, v in data["files"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MlirError(f"{NAME} is damaged: {type(error).__name__}: {error}") from error


def _program(data: Any) -> ProgramFiles:
    return ProgramFiles(
        str(data["name"]),
        {str(form): str(file) for form, file in data["files"].items()},
        tuple(_argument(value) for value in data["arguments"]),
        tuple(
            Result(str(v["name"]), str(v["writes"]), str(v["dtype"]), _sizes(v["sizes"]))
            for v in data["results"]
        ),
        {
            str(k): (int(low), None if high is None else int(high))
            for k, (low, high) in data["ranges"].items()
        },
        {str(k): int(v) for k, v in data["operators"].items()},
        {str(form): tuple(map(str, names)) for form, names in data["dialects"].items()},
    )


def _argument(data: Any) -> Argument:
    if data["kind"] not in _KINDS:
        raise ValueError(f"the kind {data['kind']!r}")
    kind = cast(Kind, data["kind"])
    return Argument(str(data["name"]), kind, str(data["tensor"]), str(data["dtype"]), _sizes(data["sizes"]))


def _sizes(data: Any) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in data)
