"""Stages: what is finished of a long run, kept in a folder, so that a run that was killed goes on there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from clsa_compile.errors import KeepError, OptionError
from clsa_compile.ir import tensors as files
from clsa_compile.ir.files import write_text

__all__ = ["Stages"]

# Raised when what is written changes its meaning: older files are then not found any more.
VERSION = 2


class Stages:
    """A folder of finished results, by name and by all that they depend on; without one it keeps none.

    Raises KeepError where one cannot be written, on a full disk among others; those before it stay.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"no folder can be made at {os.fspath(self._folder)!r}: {error}") from error

    @property
    def keeps(self) -> bool:
        """Whether there is a folder."""
        return self._folder is not None

    def data(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """Returns the plain data that was kept, or makes and keeps it."""
        if self._folder is None:
            return make()
        path = self._path(name, key, "json")
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            pass  # not there, or cut off by a full disk
        content = json.dumps(make())
        with _kept(path):
            write_text(path, content)
        return json.loads(content)

    def tensors(self, name: str, key: Any, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Returns the tensors that were kept, on the CPU, or makes and keeps them."""
        if self._folder is None:
            return make()
        found = self.checkpoint(name, key)
        if found is not None:
            return found
        made = make()
        with _kept(self._path(name, key, "safetensors")):
            self.keep(name, key, made)
        return {name: value.detach().cpu().contiguous() for name, value in made.items()}

    def checkpoint(self, name: str, key: Any) -> Mapping[str, Tensor] | None:
        """Returns the tensors that were kept, on the CPU, or None."""
        if self._folder is None:
            return None
        module = _safetensors()
        try:
            found: Mapping[str, Tensor] = module.torch.load_file(self._path(name, key, "safetensors"))
        except (OSError, module.SafetensorError):
            return None  # not there, or cut off by a full disk
        return found

    def keep(self, name: str, key: Any, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors in place of those before, whole or not at all. Raises OSError."""
        if self._folder is None:
            return
        files.write(self._path(name, key, "safetensors"), tensors, _safetensors())

    def _path(self, name: str, key: Any, ending: str) -> Path:
        assert self._folder is not None
        content = json.dumps([VERSION, key], sort_keys=True)
        return self._folder / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.{ending}"


@contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Says what to do where a file cannot be written."""
    try:
        yield
    except OSError as error:
        raise KeepError(
            f"a finished stage cannot be kept in {os.fspath(path)!r}: {error}. Those before it are kept; "
            "make room and run the same again, and it goes on from there"
        ) from error


def _safetensors() -> Any:
    return files.library(
        OptionError("keeping results in a folder needs safetensors: pip install clsa[search]")
    )
