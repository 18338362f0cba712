"""Digests: one number for all bytes of a package, kept at its end, checked before anything else reads it.

A package is a zip file, and a zip file ends in a comment. Ours holds the digest of every byte before it. The
digest is a tree: SHA-256 of pieces of 8 MiB, side by side in threads, then SHA-256 of the size and of these.
It shows damage; that a package is the one that was meant is shown by a digest that came another way.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clsa_compile.errors import PackageError

__all__ = ["PREFIX", "check", "is_digest", "seal"]

PREFIX = "clsa1:"
_PIECE = 8 << 20
_MAGIC = b"clsa package digest "
# The comment: magic, 64 hexadecimal digits, a line's end.
_LENGTH = len(_MAGIC) + 64 + 1
# The end record of a zip file without a comment, and where the comment's length stands in it.
_END, _END_MAGIC = 22, b"PK\x05\x06"


def is_digest(text: object) -> bool:
    """Tells whether a text is written like a digest: "clsa1:" and 64 hexadecimal digits."""
    if not isinstance(text, str) or not text.startswith(PREFIX):
        return False
    digits = text.removeprefix(PREFIX)
    return len(digits) == 64 and not set(digits) - set("0123456789abcdef")


def seal(path: Path) -> str:
    """Writes the digest of a zip file to its end; returns it. Raises PackageError for one with a comment."""
    with path.open("r+b") as file:
        file.seek(-_END, os.SEEK_END)
        end = file.read(_END)
        if end[:4] != _END_MAGIC or end[-2:] != b"\0\0":
            raise PackageError(f"{path} is no zip file that can be sealed")
        file.seek(-2, os.SEEK_END)
        file.write(_LENGTH.to_bytes(2, "little"))
        file.flush()
        found = _digest(file.fileno(), file.tell())
        file.write(_MAGIC + found.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return PREFIX + found


def check(file: int, name: str, trusted: Collection[str] = ()) -> str:
    """Verifies all bytes of an open file; returns its digest. Raises PackageError.

    `trusted` are digests of which it must be one; with none, any package that is whole will do.
    """
    for entry in trusted:
        if not is_digest(entry):
            raise PackageError(f"{entry!r} is no digest; they are written as '{PREFIX}' and 64 digits")
    size = os.fstat(file).st_size - _LENGTH
    comment = os.pread(file, _LENGTH, size) if size > 0 else b""
    if not comment.startswith(_MAGIC) or not comment.endswith(b"\n"):
        raise PackageError(
            f"{name!r} is no clsa package, or not all of it: it does not end in a digest; export it, or copy "
            "it, again"
        )
    found = _digest(file, size)
    if found.encode() != comment[len(_MAGIC) : -1]:
        raise PackageError(
            f"{name!r} is damaged: its bytes do not have the digest that was written with them; copy it again"
        )
    if trusted and PREFIX + found not in trusted:
        raise PackageError(
            f"{name!r} is not the package that is trusted: its digest is {PREFIX}{found}, and trusted is "
            f"{', '.join(sorted(trusted))}; nothing of it was read"
        )
    return PREFIX + found


def _digest(file: int, size: int) -> str:
    """Returns the digest of the first `size` bytes of an open file."""

    def piece(start: int) -> bytes:
        return hashlib.sha256(os.pread(file, min(_PIECE, size - start), start)).digest()

    whole = hashlib.sha256(size.to_bytes(8, "little"))
    starts = range(0, size, _PIECE)
    if len(starts) == 1:
        whole.update(piece(0))
        return whole.hexdigest()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for part in pool.map(piece, starts):
            whole.update(part)
    return whole.hexdigest()
