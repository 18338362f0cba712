"""Source lines: those of the model, under names that are the same on every machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from clsa_compile.dump.source import caller_of, line_of, short_path


def test_paths_are_relative_to_where_python_finds_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "inner")])
    assert short_path(str(tmp_path / "a" / "b.py")) == os.path.join("a", "b.py")
    assert short_path(str(tmp_path / "inner" / "b.py")) == "b.py", "the nearest one"
    assert short_path("/somewhere/else/b.py") == "b.py"


def test_the_innermost_line_is_named() -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    assert line_of(node) == ""
    node.meta["stack_trace"] = (
        'File "/a/model.py", line 9, in forward\n    y = self.inner(x)\n'
        'File "/a/inner.py", line 3, in inner\n    return x + 1\n'
    )
    assert line_of(node) == "inner.py:3 in inner: return x + 1"


def test_a_helper_is_called_from_a_line_of_the_model() -> None:
    node = torch.fx.Graph().placeholder("x")
    assert caller_of(node) == ""
    frames = (("model.py", 7, "forward"), ("layer.py", 20, "forward"), ("shared.py", 3, "attend"))
    trace = [f'  File "{path}", line {line}, in {name}\n    code_{line}()\n' for path, line, name in frames]
    node.meta["stack_trace"] = "".join(trace)
    assert line_of(node) == "shared.py:3 in attend: code_3()"
    assert caller_of(node) == "layer.py:20 in forward: code_20()"
    node.meta["stack_trace"] = "".join(trace[:2])
    assert caller_of(node) == "", "the line is the model's own"
