"""Manifests: what a package says of itself, as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from clsa_compile.errors import PackageError

__all__ = ["FORMAT", "Decoding", "Input", "Manifest", "ProgramInfo", "TensorInfo", "dtype_of"]

# Of the archive; another meaning of a field, or of a record, makes it a new one.
FORMAT = 1
Kind = Literal["pt2", "program"]


@dataclass(frozen=True, slots=True)
class Input:
    """One flat input: a tensor with sizes that are numbers or names, or a constant of the export."""

    name: str
    dtype: str = ""
    sizes: tuple[int | str, ...] = ()
    constant: Any = None

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor; a constant must be what it was."""
        return self.dtype != ""


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """One program: its flat inputs, the ranges of the sizes' names, and which tensor each constant is."""

    inputs: tuple[Input, ...]
    ranges: Mapping[str, tuple[int, int]]
    constants: Mapping[str, str]
    attentions: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor that programs need: its layout, its record where it lies inside, its names in the model."""

    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    names: tuple[str, ...]
    record: str | None = None


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a decoder's caches look: name, dtype and sizes of each, B and T among the latter."""

    caches: tuple[Input, ...]
    is_padded: bool
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a package says of itself; `plan` is the hash of the record plan.json."""

    kind: Kind
    clsa: str
    model: str
    machine: Mapping[str, Any]
    plan: str
    programs: Mapping[str, ProgramInfo]
    tensors: Mapping[str, TensorInfo]
    decoding: Decoding | None = None
    format: int = FORMAT

    def to_json(self) -> str:
        """Returns the manifest as JSON."""
        return json.dumps(asdict(self), indent=1)

    def layout(self) -> str:
        """Returns what runs programs without Python must know, a line a thing, in words with blanks between.

        Caches in order; "padded" where the programs take padding; each constant of each program, with its
        record or "-", its sizes, strides and names in the model, which ";" divides.
        """
        lines = []
        if self.decoding is not None:
            lines += [_words("cache", c.name, c.dtype, *c.sizes) for c in self.decoding.caches]
            lines += ["padded"] if self.decoding.is_padded else []
        for name, program in self.programs.items():
            for constant, key in program.constants.items():
                info = self.tensors[key]
                place = (info.dtype, info.record or "-", *info.sizes, ";", *info.strides, ";", *info.names)
                lines.append(_words("constant", name, constant, *place))
        return "".join(f"{line}\n" for line in lines)

    @classmethod
    def from_json(cls, text: str, name: str) -> Manifest:
        """Reads what `to_json` wrote. Raises PackageError for another format, and for what is no manifest."""
        try:
            data = json.loads(text)
            found = data["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise PackageError(f"{name!r} has no manifest that can be read: {error!r}") from error
        if found != FORMAT:
            age = "an older" if isinstance(found, int) and found < FORMAT else "a newer"
            raise PackageError(
                f"{name!r} was written by {age} clsa ({data.get('clsa')}): its format is {found}, and this "
                f"one reads {FORMAT}; export the model again, or install that clsa"
            )
        try:
            return cls(
                **{
                    **data,
                    "programs": {key: _program(value) for key, value in data["programs"].items()},
                    "tensors": {key: _tensor(value) for key, value in data["tensors"].items()},
                    "decoding": _decoding(data["decoding"]),
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PackageError(
                f"{name!r} has a manifest with fields that are not known: {error!r}"
            ) from error


def dtype_of(name: str) -> torch.dtype:
    """Returns the dtype of a name such as "float32"."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise PackageError(f"the package holds a tensor of {name!r}, which this torch does not know")
    return found


def _words(*words: Any) -> str:
    return " ".join(map(str, words))


def _input(data: Any) -> Input:
    return Input(**{**data, "sizes": tuple(data["sizes"])})


def _program(data: Any) -> ProgramInfo:
    ranges = {name: (low, high) for name, (low, high) in data["ranges"].items()}
    return ProgramInfo(**{**data, "inputs": tuple(map(_input, data["inputs"])), "ranges": ranges})


def _tensor(data: Any) -> TensorInfo:
    lists = {name: tuple(data[name]) for name in ("sizes", "strides", "names")}
    return TensorInfo(**{**data, **lists})


def _decoding(data: Any) -> Decoding | None:
    return None if data is None else Decoding(**{**data, "caches": tuple(map(_input, data["caches"]))})
