"""Files: written whole or not at all, also when several processes write the same one at once."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_text", "write_whole"]


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
