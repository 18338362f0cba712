"""Kernels in a dump: their source as it runs, and what they take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import clsa_compile.kernels.statistics
from clsa_compile.dump.code import code_of
from clsa_compile.dump.folder import Folder
from clsa_compile.dump.kernels import write_kernels
from clsa_compile.ir.captured import Captured


def test_sources_and_statistics_of_the_kernels_used_are_kept(for_cuda: Captured, tmp_path: Path) -> None:
    folder = Folder.new(tmp_path)
    write_kernels(folder, for_cuda)
    source, *others = sorted((folder.path / "kernels").iterdir())
    assert source.name.startswith("attention_decode_")
    assert [p.name for p in others] == ["statistics.json"]
    compile(source.read_text(), source.name, "exec")
    assert "@triton.jit" in source.read_text()
    (found,) = json.loads(others[0].read_text())
    assert found["kernel"] == source.stem
    assert 16 <= found["registers"] <= 255
    assert found["shared"] > 0
    assert found["stack"] == 0
    assert found["ptx"]["all"] > 100
    assert sum(n for name, n in found["ptx"].items() if name.startswith(("mma", "wgmma"))) > 0
    assert found["sass"]["all"] > 100


def test_a_launch_is_written_by_its_kernels_name(for_cuda: Captured) -> None:
    text = code_of(for_cuda.module)
    assert "attention_decode_" in text
    assert "kernel_idx" not in text
    assert "[(4, 1, 1)](q_ptr=" in text


def test_a_kernel_that_does_not_compile_is_said_to(
    for_cuda: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("ptxas is missing")

    monkeypatch.setattr(clsa_compile.kernels.statistics, "statistics", broken)
    folder = Folder.new(tmp_path)
    write_kernels(folder, for_cuda)
    (found,) = json.loads((folder.path / "kernels" / "statistics.json").read_text())
    assert found["error"] == "RuntimeError: ptxas is missing"


def test_a_graph_without_kernels_has_no_folder_for_them(tmp_path: Path, for_cuda: Captured) -> None:
    for node in reversed(for_cuda.graph.nodes):
        if node.op == "call_function" and "triton" in str(node.target):
            for_cuda.graph.erase_node(node)
    folder = Folder.new(tmp_path)
    write_kernels(folder, for_cuda)
    assert list(folder.path.iterdir()) == []
