"""The command line: inspects a configuration without weights, and says what cannot be in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clsa_compile.__main__ import main
from clsa_compile.testing import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").config.save_pretrained(tmp_path)
    return tmp_path


def test_a_configuration_is_enough(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "config.json"), "--cache", "64"]) == 0
    assert "2 dense with each key read once" in capsys.readouterr().out


def test_json_holds_the_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--cache", "64", "--tokens", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["attention"] == 2


def test_a_missing_configuration_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "nothing" / "config.json")]) == 2
    assert capsys.readouterr().err.startswith("clsa: cannot make a model from ")
