"""Results that took long: written whole or not at all, so that a call cut off leaves the last ones."""

import os
import uuid
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a text, and makes its folder; as in `clsa_compile.ir.files`, which is not public."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
