"""Folders are written whole or not at all, and read as what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from clsa_compile.errors import MlirError
from clsa_compile.mlir import Folder, lowering, write

pytestmark = pytest.mark.mlir


class Tied(nn.Module):
    """Two names of one weight, a view of it, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.other = nn.Linear(4, 4, bias=False)
        self.other.weight = self.inner.weight
        self.register_buffer("row", self.inner.weight.detach()[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.inner(x)) + self.row + torch.tensor([1.0, 2.0, 3.0, 4.0])


def program(module: nn.Module | None = None) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module or Tied(), (torch.ones(2, 4),), strict=False)


@pytest.fixture(scope="module")
def exported() -> ExportedProgram:
    return program()


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_is_read_as_it_was_written(exported: ExportedProgram, tmp_path: Path) -> None:
    size = write({"one": exported, "two": exported}, tmp_path / "out")
    assert sorted(content(tmp_path / "out")) == [
        "manifest.json", "one.linalg.mlir", "one.torch.mlir", "two.linalg.mlir", "two.torch.mlir",
        "weights.safetensors",
    ]  # fmt: skip
    assert size == sum(len(data) for data in content(tmp_path / "out").values())
    assert list(tmp_path.iterdir()) == [tmp_path / "out"], "something was left behind"
    folder = Folder.read(tmp_path / "out")
    assert set(folder.manifest.versions) == {"clsa", "torch", "torch_mlir"}
    weights = folder.weights()
    assert len(weights) == 3, "weights of one name or one tensor are there once"
    x = torch.randn(2, 4)
    wanted = exported.module()(x)
    for name in ("one", "two"):
        torch.testing.assert_close(folder.engine(name)({"x": x})["output_0"], wanted, atol=1e-6, rtol=0)


def test_weights_may_be_left_out_and_given(exported: ExportedProgram, tmp_path: Path) -> None:
    write({"f": exported}, tmp_path / "out", weights=False)
    folder = Folder.read(tmp_path / "out")
    assert not (tmp_path / "out/weights.safetensors").exists()
    with pytest.raises(MlirError, match="were left out of the folder; give them as tensors"):
        folder.engine("f")
    names = [a.tensor for a in folder.manifest.programs["f"].arguments]
    assert names == ["other.weight", "row", "lifted_tensor_0", ""]
    named = {"other.weight": torch.eye(4), "row": torch.zeros(4), "lifted_tensor_0": torch.ones(4)}
    x = torch.randn(2, 4)
    torch.testing.assert_close(folder.engine("f", named)({"x": x})["output_0"], x + 1)


def test_weights_are_named_as_the_model_names_them(tmp_path: Path) -> None:
    write({"f": program(nn.Sequential(nn.Linear(4, 4)))}, tmp_path, forms=("torch",), inner="0")
    assert set(Folder.read(tmp_path).weights()) == {"weight", "bias"}


def test_forms_are_written_alone(exported: ExportedProgram, tmp_path: Path) -> None:
    write({"f": exported}, tmp_path, forms=("torch",))
    assert sorted(content(tmp_path)) == ["f.torch.mlir", "manifest.json", "weights.safetensors"]
    with pytest.raises(MlirError, match="'f' was not written in the form 'linalg'"):
        Folder.read(tmp_path).engine("f")
    with pytest.raises(MlirError, match="no program 'g', but f"):
        Folder.read(tmp_path).parsed("g", "torch")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"forms": ("tosa",)}, r"forms are \('tosa',\) of 1 programs"),
        ({"forms": ()}, "give some of"),
        ({"programs": {}}, "of 0 programs"),
        ({"programs": {"a/b": None}}, "cannot be called 'a/b'"),
    ],
)
def test_requests_that_cannot_be(
    exported: ExportedProgram, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(MlirError, match=message):
        write(**{"programs": {"f": exported}, "path": tmp_path / "out", **settings})
    assert not (tmp_path / "out").exists()


def test_a_folder_of_ours_is_replaced_and_no_other(exported: ExportedProgram, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write({"old": exported}, out, forms=("torch",))
    write({"new": exported}, out, forms=("torch",))
    assert list(Folder.read(out).manifest.programs) == ["new"]
    (out / "manifest.json").write_text("{}")
    before = content(out)
    with pytest.raises(MlirError, match="exists and is no folder of MLIR that clsa wrote"):
        write({"f": exported}, out, forms=("torch",))
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(MlirError, match="exists and is no folder"):
        write({"f": exported}, file, forms=("torch",))
    assert (content(out), file.read_text()) == (before, "mine")


def test_a_failure_leaves_what_was_there(
    exported: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write({"f": exported}, out, forms=("torch",))
    before = content(out)

    def full(path: Path, tensors: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("clsa_compile.mlir.folder._save", full)
    with pytest.raises(MlirError, match=r"no MLIR can be written to .*out': No space left"):
        write({"f": exported}, out, forms=("torch",))
    assert content(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_text_that_reads_otherwise_is_not_written(
    exported: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = lowering.parsed("f", "module {}")
    monkeypatch.setattr(lowering, "parsed", lambda name, text: other)
    with pytest.raises(MlirError, match="not the same after it was written and parsed again"):
        write({"f": exported}, tmp_path / "out", forms=("torch",))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written(exported: ExportedProgram) -> None:
    """Not even by root, which permissions do not stop."""
    with pytest.raises(MlirError, match="no MLIR can be written to"):
        write({"f": exported}, "/proc/out", forms=("torch",))


def test_a_path_below_a_file_cannot_be_written(exported: ExportedProgram, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MlirError, match="no MLIR can be written to"):
        write({"f": exported}, tmp_path / "file/out", forms=("torch",))


def test_weights_without_memory_are_refused(tmp_path: Path) -> None:
    meta = torch.export.export(nn.Linear(4, 4, device="meta"), (torch.ones(2, 4, device="meta"),))
    with pytest.raises(MlirError, match="'weight' is a tensor on the meta device"):
        write({"f": meta}, tmp_path / "out", forms=("torch",))


def test_altered_files_are_refused(exported: ExportedProgram, tmp_path: Path) -> None:
    write({"f": exported}, tmp_path, forms=("torch",))
    for name in ("f.torch.mlir", "weights.safetensors"):
        data = (tmp_path / name).read_bytes()
        for changed in (data[:-1], data[:9] + bytes([data[9] ^ 1]) + data[10:], b""):
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(MlirError, match=rf"{name}' is not what was written"):
                Folder.read(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(MlirError, match="no MLIR can be read from"):
            Folder.read(tmp_path)
        (tmp_path / name).write_bytes(data)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace('"f.torch.mlir"', '"../f.torch.mlir"'))
    with pytest.raises(MlirError, match="a file that is not in its folder"):
        Folder.read(tmp_path)
    Folder.read(Path(_restored(tmp_path, text)))


def _restored(folder: Path, text: str) -> str:
    (folder / "manifest.json").write_text(text)
    return str(folder)
