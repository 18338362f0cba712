"""Stages: made once, found again by all that they depend on, and never half written."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest
import torch

from clsa_compile.calibration.stages import Stages
from clsa_compile.errors import KeepError, OptionError


class Counted:
    """Something that can be made, and counts how often it was."""

    def __init__(self, value: object) -> None:
        self.value, self.times = value, 0

    def __call__(self) -> object:
        self.times += 1
        return self.value


@pytest.mark.parametrize("kind", ["data", "tensors"])
def test_what_is_kept_is_not_made_again(tmp_path: Path, kind: str) -> None:
    made = Counted({"x": 1.25} if kind == "data" else {"x": torch.arange(3.0)})
    for _ in range(2):
        stages = Stages(tmp_path / "new")
        first = getattr(stages, kind)("thing", ["key", 1], made)
        assert torch.equal(torch.as_tensor(first["x"]), torch.as_tensor(made.value["x"]))
    assert made.times == 1
    getattr(stages, kind)("thing", ["key", 2], made)
    getattr(stages, kind)("other", ["key", 1], made)
    assert made.times == 3
    assert not [path for path in (tmp_path / "new").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["data", "tensors"])
def test_what_was_cut_off_is_made_again(tmp_path: Path, kind: str) -> None:
    made = Counted({"x": 1.25} if kind == "data" else {"x": torch.arange(3.0)})
    getattr(Stages(tmp_path), kind)("thing", 0, made)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:5])
    getattr(Stages(tmp_path), kind)("thing", 0, made)
    assert made.times == 2


def test_without_a_folder_nothing_is_kept() -> None:
    made = Counted({"x": 1})
    for _ in range(2):
        Stages(None).data("thing", 0, made)
        Stages(None).tensors("thing", 0, made)
    assert made.times == 4


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    for kind in ("data", "tensors"):
        with pytest.raises(KeyboardInterrupt):
            getattr(Stages(tmp_path), kind)("thing", 0, fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["data", "tensors"])
def test_a_full_disk_names_the_file_and_the_way_out(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Counted({"x": 1.25} if kind == "data" else {"x": torch.arange(3.0)})
    stages = Stages(tmp_path)
    getattr(stages, kind)("thing", 0, made)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(
            KeepError, match=rf"{tmp_path}/other-.*No space left .* make room and run the same"
        ):
            getattr(stages, kind)("other", 0, made)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept
    getattr(stages, kind)("other", 0, made)
    assert made.times == 3


def test_what_fails_while_it_is_made_is_not_said_of_the_folder(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("of the model's own file")

    for kind in ("data", "tensors"):
        with pytest.raises(OSError, match="of the model's own file"):
            getattr(Stages(tmp_path), kind)("thing", 0, fail)


def test_a_folder_that_cannot_be_and_a_missing_package_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="no folder can be made"):
        Stages(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(OptionError, match=r"pip install clsa\[search\]"):
        Stages(tmp_path).tensors("thing", 0, dict)
