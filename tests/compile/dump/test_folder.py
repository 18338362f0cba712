"""Folders: numbered, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from clsa_compile.dump.folder import Folder
from clsa_compile.errors import OptionError


def test_every_graph_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [Folder.new(tmp_path / "a" / "dumps") for _ in range(3)]
    assert [f.path.name for f in folders] == ["graph_000", "graph_001", "graph_002"]


def test_files_are_written_and_written_again(tmp_path: Path) -> None:
    folder = Folder.new(str(tmp_path))
    folder.write("kernels/one.py", "first")
    folder.write("kernels/one.py", "second")
    folder.write_json("plan.json", {"a": [1]})
    assert (folder.path / "kernels" / "one.py").read_text() == "second"
    assert json.loads((folder.path / "plan.json").read_text()) == {"a": [1]}
    assert sorted(p.name for p in folder.path.rglob("*")) == ["kernels", "one.py", "plan.json"]


def test_a_folder_that_cannot_be_made_is_an_error_of_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OptionError, match=r"the option 'dump' is .*file.*; give a folder that can be written"
    ):
        Folder.new(str(tmp_path / "file" / "inner"))


def test_a_file_that_breaks_off_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder.new(tmp_path)
    folder.write("plan.txt", "whole")

    def breaks(path: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", breaks)
    with pytest.raises(OptionError, match=r"plan\.txt' cannot be written: .*No space left"):
        folder.write("plan.txt", "other")
    assert [p.name for p in folder.path.iterdir()] == ["plan.txt"]
    assert (folder.path / "plan.txt").read_text() == "whole"
