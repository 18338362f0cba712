"""Weights: each tensor once, by any of its names; what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clsa_compile.errors import PackageError
from clsa_compile.package.manifest import TensorInfo
from clsa_compile.package.weights import Collected, read

CPU = torch.device("cpu")
HEAD = torch.arange(6.0).view(2, 3)
WANTED = {
    "embed": TensorInfo("float32", (2, 3), (3, 1), ("embed", "head")),
    "turned": TensorInfo("float32", (2, 3), (1, 2), ("turned",)),
}


def test_tensors_that_are_one_lie_there_once() -> None:
    collected = Collected(frozenset({"embed", "head"}))
    constant, other = torch.ones(2), torch.zeros(2)
    assert collected.add("embed", HEAD) == "embed"
    assert collected.add("c_0", constant) == "c_0"
    assert collected.add("embed", HEAD) == "embed"
    # Another program's constant of the same name is another tensor.
    assert collected.add("c_0", other) == "c_0#2"
    collected.name("head", HEAD)
    collected.name("unused", torch.ones(3))
    assert collected.infos["embed"].names == ("embed", "head")
    assert collected.infos["embed"].record is None
    assert [collected.inside[str(i)] is t for i, t in enumerate((constant, other))] == [True, True]
    assert set(collected.infos) == {"embed", "c_0", "c_0#2"}


@pytest.mark.parametrize("form", ["file", "text", "folder", "list", "tensors"])
def test_weights_are_read_from_what_there_is(form: str, tmp_path: Path) -> None:
    tensors = {"head": HEAD, "turned": HEAD + 1, "unused": HEAD}
    save_file({"head": HEAD, "unused": HEAD.clone()}, tmp_path / "a.safetensors")
    save_file({"turned": HEAD + 1}, tmp_path / "b.safetensors")
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "all.st")
    given = {
        "file": tmp_path / "all.st",
        "text": str(tmp_path / "all.st"),
        "folder": tmp_path,
        "list": [tmp_path / "a.safetensors", tmp_path / "b.safetensors"],
        "tensors": tensors,
    }[form]
    found = read(given, WANTED, CPU)
    assert torch.equal(found["embed"], HEAD)
    assert torch.equal(found["turned"], HEAD + 1)
    assert found["turned"].stride() == (1, 2)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"head": HEAD}, "lack 1 of the 2 tensors that the package needs, as 'turned'"),
        ({}, "lack 2 of the 2 tensors"),
        (
            {"head": HEAD.half(), "turned": HEAD},
            r"'head' is float16\[2, 3\]; the package was made for float32",
        ),
        ({"head": HEAD.T, "turned": HEAD}, r"'head' is float32\[3, 2\]"),
    ],
)
def test_weights_that_do_not_fit(tensors: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(PackageError, match=reason):
        read(tensors, WANTED, CPU)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(PackageError, match=r"a.safetensors' cannot be read"):
        read(path, WANTED, CPU)
    path.unlink()
    with pytest.raises(PackageError, match="there is no safetensors file in"):
        read(tmp_path, WANTED, CPU)
