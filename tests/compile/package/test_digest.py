"""Digests: every byte of a package counts, and a package that was not meant says so."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from clsa_compile.errors import PackageError
from clsa_compile.package.digest import PREFIX, check, is_digest, seal


@pytest.fixture
def sealed(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "a.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/one", b"one" * 50)
        archive.writestr("a/two", bytes(range(256)))
    return path, seal(path)


def checked(path: Path, *trusted: str) -> str:
    file = os.open(path, os.O_RDONLY)
    try:
        return check(file, path.name, trusted)
    finally:
        os.close(file)


def test_a_sealed_archive_is_one_still(sealed: tuple[Path, str]) -> None:
    path, digest = sealed
    assert is_digest(digest)
    assert checked(path) == checked(path, digest) == checked(path, PREFIX + "0" * 64, digest) == digest
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("a/one") == b"one" * 50


def test_every_flipped_byte_is_noticed(sealed: tuple[Path, str]) -> None:
    path, digest = sealed
    good = path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bytes(bad))
        with pytest.raises(PackageError, match=r"is damaged|is no clsa package"):
            checked(path, digest)


def test_every_cut_and_every_addition_is_noticed(sealed: tuple[Path, str]) -> None:
    path, _ = sealed
    good = path.read_bytes()
    for wrong in (*(good[:n] for n in range(0, len(good), 7)), good[:-1], good + b"\n", good + good, b""):
        path.write_bytes(wrong)
        with pytest.raises(PackageError, match=r"is damaged|is no clsa package"):
            checked(path)


def test_a_file_of_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clsa_compile.package.digest._PIECE", 64)
    path = tmp_path / "a.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/one", os.urandom(1000))
    digest = seal(path)
    assert checked(path) == digest
    data = bytearray(path.read_bytes())
    # Two pieces that change places have the same bytes.
    data[64:128], data[128:192] = data[128:192], data[64:128]
    path.write_bytes(bytes(data))
    with pytest.raises(PackageError, match="is damaged"):
        checked(path)


def test_another_package_than_the_trusted_one(sealed: tuple[Path, str]) -> None:
    path, digest = sealed
    other = PREFIX + "1" * 64
    with pytest.raises(PackageError) as error:
        checked(path, other)
    assert f"its digest is {digest}, and trusted is {other}; nothing of it was read" in str(error.value)


@pytest.mark.parametrize("text", ["", "abc", "0" * 64, PREFIX + "0" * 63, PREFIX + "G" * 64])
def test_what_is_no_digest_is_refused(text: str, sealed: tuple[Path, str]) -> None:
    assert not is_digest(text)
    with pytest.raises(PackageError, match="is no digest; they are written as 'clsa1:'"):
        checked(sealed[0], text)


def test_sealing_twice_is_refused(sealed: tuple[Path, str]) -> None:
    with pytest.raises(PackageError, match="is no zip file that can be sealed"):
        seal(sealed[0])
