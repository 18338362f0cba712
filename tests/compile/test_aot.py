"""AOTInductor's private parts: what the linker is shown, and failures that name themselves."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from clsa_compile import aot
from clsa_compile.aot import Runner, compile_module
from clsa_compile.errors import ExportError, PackageError
from clsa_compile.package.archive import Contents, write


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
    with aot._linking():
        folder, other = os.environ["LIBRARY_PATH"].split(os.pathsep)
        assert (os.environ["CUDA_HOME"], other) == (str(tmp_path), "/somewhere")
        assert (Path(folder) / "libcuda.so").resolve() == stub
    assert os.environ["LIBRARY_PATH"] == "/somewhere"
    assert "CUDA_HOME" not in os.environ


def test_no_driver_is_shown_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = dict(os.environ)
    with aot._linking():
        assert {name for name in os.environ if os.environ[name] != before.get(name)} == {"LIBRARY_PATH"}
        assert not (Path(os.environ["LIBRARY_PATH"].split(os.pathsep)[0]) / "libcuda.so").exists()
    assert dict(os.environ) == before


def test_a_library_that_this_process_has_not_loaded() -> None:
    assert aot._loaded("libnothing.so") is None


@pytest.mark.slow
def test_a_compiler_that_links_its_own_library_into_everything(tmp_path: Path) -> None:
    """Two of C++'s libraries in one process end it; found on a machine that has the static form only."""
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-shared*) set -- "$@" -static-libstdc++;; esac\nexec env g++ "$@"\n'
    )
    compiler.chmod(0o755)
    x = torch.randn(2, 3)
    program = torch.export.export(torch.nn.Linear(3, 4).eval(), (x,))
    settings = {"cpp.cxx": (None, str(compiler))}
    files = compile_module(program.module(), (x,), {}, {}, settings)  # type: ignore[arg-type]
    (library,) = (file for file in files if file.suffix == ".so")
    needed = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True).stdout
    assert "NEEDED               libstdc++.so.6" in needed
    write(tmp_path / "linear.pt2", Contents(code={"linear": files}))
    assert "weight" in Runner(tmp_path / "linear.pt2", "linear", torch.device("cpu")).constants()
