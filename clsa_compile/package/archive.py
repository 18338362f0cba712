"""Archives: a package's records, written by torch's own zip writer, read without it.

`data/aotinductor/` is where torch looks for native code, `extra/` where it keeps texts that are not its own.
"""

from __future__ import annotations

import mmap
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clsa_compile.errors import PackageError

__all__ = ["Archive", "Contents", "write"]

CODE = "data/aotinductor"
EXTRA = "extra/clsa"
PROGRAMS = "data/clsa"
WEIGHTS = "data/weights"
# Before a record's data: a fixed part, then its name and padding, whose lengths stand at 26.
_HEADER, _LENGTHS = 30, 26


@dataclass(slots=True)
class Contents:
    """What goes into an archive: texts and bytes, files of native code by program, and tensors."""

    extra: dict[str, str] = field(default_factory=dict)
    programs: dict[str, bytes] = field(default_factory=dict)
    code: dict[str, Sequence[Path]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


def write(path: Path, contents: Contents) -> None:
    """Writes an archive; each tensor is a record of its raw bytes, at a multiple of 64."""
    from torch.export.pt2_archive import PT2ArchiveWriter

    with PT2ArchiveWriter(os.fspath(path)) as archive:
        for name, text in contents.extra.items():
            archive.write_bytes(f"{EXTRA}/{name}", text.encode())
        for name, data in contents.programs.items():
            archive.write_bytes(f"{PROGRAMS}/{name}.pt2", data)
        for program, files in contents.code.items():
            for file in files:
                archive.write_file(f"{CODE}/{program}/{file.name}", os.fspath(file))
        for key, tensor in contents.weights.items():
            raw = _raw(tensor)
            archive.archive_file.write_record(f"{WEIGHTS}/{key}", raw, raw.nbytes())


def _raw(value: Tensor) -> Any:
    """Returns the storage of a tensor that has one of its own on the CPU."""
    value = value.detach().cpu()
    size = value.numel() * value.element_size()
    if value.untyped_storage().nbytes() != size or value.storage_offset():
        value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
    return value.untyped_storage()


class Archive:
    """The records of an archive that was verified, read from an open file."""

    def __init__(self, file: int, name: str) -> None:
        """Reads the directory of an open file. Raises PackageError for what is no archive of ours."""
        self._file = file
        self._name = name
        try:
            with zipfile.ZipFile(os.fdopen(os.dup(file), "rb")) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise PackageError(f"{name!r} is no archive: {error}") from error
        # torch puts everything into one folder.
        self._entries = {entry.filename.partition("/")[2]: entry for entry in entries}

    def names(self) -> list[str]:
        """Returns the names of all texts."""
        return sorted(n.removeprefix(f"{EXTRA}/") for n in self._entries if n.startswith(f"{EXTRA}/"))

    def text(self, name: str) -> str:
        """Returns a text. Raises PackageError where there is none."""
        return self._read(f"{EXTRA}/{name}").decode("utf-8")

    def program(self, name: str) -> bytes:
        """Returns a rewritten program as torch.export saved it. Raises PackageError where there is none."""
        return self._read(f"{PROGRAMS}/{name}.pt2")

    def tensors(
        self, kept: Mapping[str, tuple[str, torch.dtype, Sequence[int], Sequence[int]]]
    ) -> dict[str, Tensor]:
        """Returns tensors over the file's own pages, by name: record, dtype, sizes and strides of each."""
        if not kept:
            return {}
        # A private mapping: whoever writes a weight does not write the file.
        pages = mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY)
        made = {}
        for name, (record, dtype, sizes, strides) in kept.items():
            start, size = self._place(f"{WEIGHTS}/{record}")
            count = size // dtype.itemsize
            flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=start) if count else None
            empty = torch.empty(0, dtype=dtype)
            made[name] = (empty if flat is None else flat).as_strided(tuple(sizes), tuple(strides))
        return made

    def _read(self, name: str) -> bytes:
        start, size = self._place(name)
        return os.pread(self._file, size, start)

    def _place(self, name: str) -> tuple[int, int]:
        """Returns where a record's data starts in the file, and its length."""
        entry = self._entries.get(name)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise PackageError(f"{self._name!r} holds no {name}")
        header = os.pread(self._file, _HEADER, entry.header_offset)
        lengths = (header[_LENGTHS : _LENGTHS + 2], header[_LENGTHS + 2 : _HEADER])
        return entry.header_offset + _HEADER + sum(
            int.from_bytes(n, "little") for n in lengths
        ), entry.file_size
