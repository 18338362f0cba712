"""Manifests: what was written is read, and another format is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from clsa_compile.errors import PackageError
from clsa_compile.package.manifest import (
    FORMAT,
    Decoding,
    Input,
    Manifest,
    ProgramInfo,
    TensorInfo,
    dtype_of,
)

INFO = ProgramInfo((Input("ids", "int64", ("s0", 1)), Input("n", constant=3)), {"s0": (1, 8)}, {"a.w": "w"})
MANIFEST = Manifest(
    kind="pt2",
    clsa="0.1.0",
    model="M",
    machine={"torch": "2.13.0", "device": "cpu"},
    plan="f" * 64,
    programs={"decode": INFO},
    tensors={"w": TensorInfo("float32", (2, 3), (3, 1), ("w", "v"), "0")},
    decoding=Decoding((Input("0.keys", "float32", ("B", 2, "T", 16)),), True, 128),
)


@pytest.mark.parametrize("manifest", [MANIFEST, replace(MANIFEST, decoding=None, kind="program")])
def test_a_manifest_comes_back(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json(), "a.pt2") == manifest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": FORMAT + 1}, "written by a newer clsa"),
        ({"format": 0}, "written by an older clsa"),
        ({"extra": 1}, "fields that are not known"),
        ({"programs": {"decode": {}}}, "fields that are not known"),
        ({"tensors": []}, "fields that are not known"),
    ],
)
def test_another_format_is_refused(change: dict[str, Any], reason: str) -> None:
    data = {**json.loads(MANIFEST.to_json()), **change}
    with pytest.raises(PackageError, match=reason):
        Manifest.from_json(json.dumps(data), "a.pt2")


@pytest.mark.parametrize("text", ["", "[]", "{}", "3"])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(PackageError, match=r"'a.pt2' has no manifest that can be read"):
        Manifest.from_json(text, "a.pt2")


def test_the_layout_is_the_same_in_words() -> None:
    assert MANIFEST.layout().splitlines() == [
        "cache 0.keys float32 B 2 T 16",
        "padded",
        "constant decode a.w float32 0 2 3 ; 3 1 ; w v",
    ]
    left_out = replace(MANIFEST.tensors["w"], record=None)
    assert "float32 - 2 3" in replace(MANIFEST, decoding=None, tensors={"w": left_out}).layout()


def test_dtypes_by_name() -> None:
    assert dtype_of("bfloat16") is torch.bfloat16
    with pytest.raises(PackageError, match="a tensor of 'load'"):
        dtype_of("load")
