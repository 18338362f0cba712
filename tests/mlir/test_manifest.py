"""A manifest is read as it was written, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from clsa_compile.errors import MlirError
from clsa_compile.mlir.manifest import FileInfo, Manifest, ProgramFiles
from clsa_compile.mlir.program import Argument, Result

PROGRAM = ProgramFiles(
    "decode",
    {"torch": "decode.torch.mlir"},
    (Argument("p_w", "parameter", "w", "float32", (4, 3)), Argument("ids", "input", "", "int64", ("s0", 1))),
    (
        Result("caches_0", "caches_0", "float32", ("s0", 2, "s1", 8)),
        Result("output_0", "", "float32", ("s0",)),
    ),
    {"s0": (1, 64), "s1": (9, None)},
    {"torch.clsa.index_topk": 2},
    {"torch": ("builtin", "func", "torch")},
)
MANIFEST = Manifest(
    {"clsa": "0.1.0"}, {"decode": PROGRAM}, "weights.safetensors", {"decode.torch.mlir": FileInfo(7, "ab")}
)


def test_it_is_read_as_it_was_written() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    without = replace(MANIFEST, weights=None)
    assert Manifest.from_json(without.to_json()) == without


DAMAGED = [
    ("{", "manifest.json is no JSON"),
    ("[]", "does not describe MLIR that clsa wrote"),
    (json.dumps({"format": "other"}), "does not describe MLIR that clsa wrote"),
    (json.dumps({"format": "clsa-mlir", "version": 99}), "of version 99, and this clsa reads version 1"),
    (json.dumps({"format": "clsa-mlir", "version": 1}), "damaged: KeyError"),
]


@pytest.mark.parametrize(("text", "message"), DAMAGED)
def test_what_is_no_manifest_is_refused(text: str, message: str) -> None:
    with pytest.raises(MlirError, match=message):
        Manifest.from_json(text)


@pytest.mark.parametrize(("key", "value"), [("kind", "secret"), ("sizes", 3), ("sizes", None)])
def test_damaged_arguments_are_refused(key: str, value: Any) -> None:
    data = json.loads(MANIFEST.to_json())
    data["programs"]["decode"]["arguments"][0][key] = value
    with pytest.raises(MlirError, match="damaged"):
        Manifest.from_json(json.dumps(data))
