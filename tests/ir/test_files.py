"""ir/files.py: whole files or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clsa_compile.ir.files import write_text, write_whole


def test_a_text_is_written_with_the_folders_above_it(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    write_text(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_text(str(path), "other")
    assert path.read_text() == "other"
    assert [p.name for p in path.parent.iterdir()] == ["c.txt"]


def test_what_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")

    def fail(partial: Path) -> None:
        partial.write_text("ne")
        raise ZeroDivisionError("half way")

    with pytest.raises(ZeroDivisionError, match="half way"):
        write_whole(path, fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("c.txt", "old")]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="the disk is full"):
        write_text(tmp_path / "c.txt", "text")
    assert list(tmp_path.iterdir()) == []
