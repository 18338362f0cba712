"""ir/files.py: whole files or none."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from clsa_compile.ir.files import check, write_text, write_whole


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


def test_what_can_be_written_is_checked_without_a_trace(tmp_path: Path) -> None:
    check(tmp_path / "c.txt")
    check(tmp_path / "a" / "b" / "c.txt")
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / "c.txt", "old")
    check(tmp_path / "c.txt")
    assert (tmp_path / "c.txt").read_text() == "old"


def test_what_cannot_be_written_is_an_error_that_names_what_is_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=rf"{tmp_path}/file'$"):
        check(tmp_path / "file" / "folder" / "c.txt")
    with pytest.raises(IsADirectoryError, match=rf"{tmp_path}'$"):
        check(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/nowhere'$"):
        check(tmp_path / "nowhere" / "c.txt")

    def denied(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere/tmp123")

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    with pytest.raises(PermissionError, match=rf"Permission denied: '{tmp_path}'$"):
        check(tmp_path / "c.txt")
