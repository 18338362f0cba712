"""AOTInductor's private parts: the toolkit that the linker needs, and failures that name themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from clsa_compile import aot
from clsa_compile.aot import Runner, compile_module
from clsa_compile.errors import ExportError, PackageError


def test_a_compiler_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("\ng++ is not there\nmore")

    monkeypatch.setattr("torch._inductor.aot_compile", fail)
    with pytest.raises(ExportError, match=r"AOTInductor failed: RuntimeError: g\+\+ is not there$"):
        compile_module(torch.fx.GraphModule({}, torch.fx.Graph()), (), {}, {}, {})


def test_what_is_no_archive_of_native_code(tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    path.write_bytes(b"nothing")
    with pytest.raises(PackageError, match="the program 'decode' cannot be loaded by this torch"):
        Runner(path, "decode", torch.device("cpu"))


def test_the_linker_finds_a_driver_that_has_no_plain_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "lib64/stubs/libcuda.so"
    stub.parent.mkdir(parents=True)
    stub.write_bytes(b"")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("LIBRARY_PATH", "/somewhere")
    with aot._toolkit():
        folder, other = os.environ["LIBRARY_PATH"].split(os.pathsep)
        assert (os.environ["CUDA_HOME"], other) == (str(tmp_path), "/somewhere")
        assert (Path(folder) / "libcuda.so").resolve() == stub
    assert os.environ["LIBRARY_PATH"] == "/somewhere"
    assert "CUDA_HOME" not in os.environ


def test_no_toolkit_is_asked_for_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = dict(os.environ)
    with aot._toolkit():
        assert dict(os.environ) == before
