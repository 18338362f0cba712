"""Archives: what torch's writer wrote is read back without torch, tensors in place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from clsa_compile.errors import PackageError
from clsa_compile.package.archive import Archive, Contents, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    code = tmp_path / "a.wrapper.so"
    code.write_bytes(b"code")
    weights = {
        "0": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "1": torch.arange(12.0).view(3, 4)[1:, :],  # part of another tensor's memory
        "2": torch.empty(0),
        "3": torch.tensor([True, False]),
    }
    path = tmp_path / "b.pt2"
    write(path, Contents({"x.txt": "é"}, {"y": b"\0\1\xff"}, {"decode": [code]}, weights))
    return path


def opened(path: Path) -> Archive:
    return Archive(os.open(path, os.O_RDONLY), path.name)


def test_records_come_back(path: Path) -> None:
    archive = opened(path)
    assert (archive.text("x.txt"), archive.program("y"), archive.names()) == ("é", b"\0\1\xff", ["x.txt"])


def test_tensors_lie_in_the_file_and_writing_them_does_not_change_it(path: Path) -> None:
    before = path.read_bytes()
    kept = {
        "a": ("0", torch.bfloat16, (2, 3), (3, 1)),
        "b": ("1", torch.float32, (2, 4), (4, 1)),
        "c": ("2", torch.float32, (0,), (1,)),
        "d": ("3", torch.bool, (2,), (1,)),
    }
    found = opened(path).tensors(kept)
    assert torch.equal(found["a"], torch.arange(6, dtype=torch.bfloat16).view(2, 3))
    assert torch.equal(found["b"], torch.arange(12.0).view(3, 4)[1:])
    assert found["c"].shape == (0,)
    assert found["d"].tolist() == [True, False]
    assert found["a"].data_ptr() % 64 == 0
    found["b"].zero_()
    assert path.read_bytes() == before


def test_torch_finds_the_archive_as_its_own(path: Path) -> None:
    from torch.export.pt2_archive import PT2ArchiveReader, is_pt2_package

    assert is_pt2_package(str(path))
    with PT2ArchiveReader(str(path)) as reader:
        assert reader.read_bytes("data/aotinductor/decode/a.wrapper.so") == b"code"


def test_a_missing_record(path: Path) -> None:
    with pytest.raises(PackageError, match=r"'b.pt2' holds no extra/clsa/z"):
        opened(path).text("z")


def test_what_is_no_archive(tmp_path: Path) -> None:
    other = tmp_path / "c.pt2"
    other.write_bytes(b"no zip file")
    with pytest.raises(PackageError, match=r"'c.pt2' is no archive"):
        opened(other)
