"""Folders: one numbered folder a graph, each file in it written whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clsa_compile.errors import OptionError
from clsa_compile.ir.files import write_text

__all__ = ["Folder"]


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of one graph."""

    path: Path

    @classmethod
    def new(cls, root: str | os.PathLike[str]) -> Folder:
        """Makes the next numbered folder under `root`. Raises OptionError when that cannot be."""
        base = Path(root)
        try:
            base.mkdir(parents=True, exist_ok=True)
            number = 0
            while True:
                try:
                    (base / f"graph_{number:03d}").mkdir()
                    return cls(base / f"graph_{number:03d}")
                except FileExistsError:
                    number += 1
        except OSError as error:
            raise OptionError(
                f"the option 'dump' is {os.fspath(root)!r}, where no folder can be made: {error}; "
                "give a folder that can be written"
            ) from error

    def write(self, name: str, text: str) -> None:
        """Writes a file whole. Raises OptionError when that cannot be, and then leaves nothing behind."""
        target = self.path / name
        try:
            write_text(target, text)
        except OSError as error:
            raise OptionError(
                f"the option 'dump': {os.fspath(target)!r} cannot be written: {error}; "
                "give a folder that can be written, or leave the option out"
            ) from error

    def write_json(self, name: str, data: Any) -> None:
        """Writes plain data."""
        self.write(name, json.dumps(data, indent=1) + "\n")
