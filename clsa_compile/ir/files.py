"""Files: written whole or not at all, also when several processes write the same one at once."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["check", "write_text", "write_whole"]


def check(path: str | os.PathLike[str]) -> None:
    """Raises OSError where no file can be written at `path`, before there is work for it; leaves no trace."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    # Folders that are missing are made when the file is written: in the nearest one that is there.
    above = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:  # which names a file that nobody has heard of
        raise OSError(error.errno, error.strerror, os.fspath(above)) from error


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Lets `write` fill another file in the same folder, which then takes the place of the one at `path`.

    Makes the folder where there is none. Whatever `write` raises, and OSError, leave nothing behind.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        write(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text in UTF-8, whole or not at all. Raises OSError where that cannot be."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
