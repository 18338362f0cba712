"""Files of pages: written whole or not at all."""

from __future__ import annotations

import os

from clsa_compile.errors import OptionError
from clsa_compile.ir.files import write_text

__all__ = ["write"]


def write(path: str | os.PathLike[str], text: str) -> None:
    """Writes a page whole or not at all. Raises OptionError where it cannot be written."""
    try:
        write_text(path, text)
    except OSError as error:
        raise OptionError(f"no page can be written to {os.fspath(path)!r}: {error}") from error
