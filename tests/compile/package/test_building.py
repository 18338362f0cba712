"""export(): a file is written whole or not at all, and what cannot be written is said before it is tried."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import clsa_compile
from clsa_compile.errors import CaptureError, ExportError, OptionError, StrictError
from clsa_compile.package import building

IDS = torch.zeros(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"format": "onnx"}, ExportError, "format is 'onnx'; accepted: 'pt2', 'program', 'mlir'"),
        ({"weights": "none"}, ExportError, "weights is 'none'; accepted: 'inside', 'outside'"),
        ({"path": "a.zip"}, ExportError, "path is 'a.zip'; a package's file ends in .pt2"),
        ({"options": {"tpok": 3}}, OptionError, "unknown option 'tpok'"),
        ({"plan": "plan.json", "options": {"share": 2}}, OptionError, "the plan is given twice"),
        ({"plan": "missing.json"}, OptionError, "missing.json"),
    ],
)
def test_requests_that_cannot_be(
    settings: dict[str, Any], error: type[Exception], reason: str, llama: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        clsa_compile.export(llama, (IDS,), **{"path": tmp_path / "a.pt2", **settings})
    assert not list(tmp_path.iterdir())


class Numbers(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return x + 1, 3


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "argument", "error", "reason"),
    [
        (nn.Linear(2, 2), torch.zeros(2, 2), ExportError, "the model is in training mode"),
        (lambda x: x, torch.zeros(2), ExportError, "a function cannot be exported; give a torch.nn.Module"),
        (Numbers().eval(), torch.zeros(2), ExportError, "the model returns what is no tensor"),
        (nn.ReLU().eval(), torch.zeros(4, 4).T[:3], ExportError, r"sizes \[3, 4\] is not contiguous"),
        (Branches().eval(), torch.zeros(2), CaptureError, "torch.export failed"),
    ],
)
def test_models_that_cannot_be(
    model: Any, argument: Any, error: type[Exception], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        clsa_compile.export(model, (argument,), path=tmp_path / "a.pt2", format="program")
    assert not list(tmp_path.iterdir())


def test_strict_refuses_what_would_be_left(tmp_path: Path) -> None:
    class Weighted(nn.Module):
        def forward(self, q: torch.Tensor) -> Any:
            p = (q @ q.transpose(-1, -2)).softmax(-1)
            return p @ q, p  # the weights are returned

    args = (torch.randn(1, 2, 5, 8),)
    with pytest.raises(StrictError, match="clsa left 1 of 1 attentions"):
        clsa_compile.export(
            Weighted().eval(), args, path=tmp_path / "a.pt2", format="program", options={"strict": True}
        )


def test_a_file_that_cannot_be_written_leaves_nothing(
    product: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, arguments = product
    args, kwargs = arguments(3)
    path = tmp_path / "a.pt2"
    path.write_bytes(b"before")

    def full(*_: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(building, "seal", full)
    with pytest.raises(ExportError, match=r"no package can be written to .*a.pt2': no space left"):
        clsa_compile.export(module, args, kwargs, path=path, format="program")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_what_a_package_holds(small: Any, decoder: Any) -> None:
    with zipfile.ZipFile(decoder.path) as archive:
        names = {entry.filename.partition("/")[2] for entry in archive.infolist()}
        manifest = json.loads(archive.read("decoder/extra/clsa/package.json"))
    texts = {"plan.json", "report.txt", "report.json", "package.json", "layout.txt"}
    graphs = {f"graphs/{p}_{s}.py" for p in ("prefill", "decode") for s in ("before", "after", "lowered")}
    assert {n.removeprefix("extra/clsa/") for n in names if n.startswith("extra/")} == texts | graphs
    assert {"data/clsa/prefill.pt2", "data/clsa/decode.pt2"} <= names
    assert sum(n.startswith("data/aotinductor/decode/") and n.endswith(".so") for n in names) == 1
    # Left out: what a checkpoint holds. Kept: what it does not, as the frequencies of the rotary embedding.
    kept = [key for key, info in manifest["tensors"].items() if info["record"] is not None]
    assert kept == ["model.rotary_emb.inv_freq"]
    (tied,) = [set(e["names"]) for e in manifest["tensors"].values() if "lm_head.weight" in e["names"]]
    assert tied == {"model.embed_tokens.weight", "lm_head.weight"}
    assert manifest["programs"]["decode"]["attentions"] == {"sparse": 0, "attention": 1, "left": 0}
    with zipfile.ZipFile(small.path) as archive:
        assert not [e for e in archive.namelist() if "aotinductor" in e]
        assert len([e for e in archive.namelist() if "data/weights/" in e]) == 2


def test_mlir_is_handed_the_rewritten_programs(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    seen = {}

    def write(programs: Any, path: Path, *, weights: bool, inner: str) -> int:
        seen.update(programs)
        assert (weights, inner) == (True, "model")
        return 7

    module = types.ModuleType("clsa_compile.mlir")
    module.write = write  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "clsa_compile.mlir", module)
    made = clsa_compile.export(llama, (IDS,), path=tmp_path / "a.mlir", format="mlir")
    assert (made.size, set(seen)) == (7, {"prefill", "decode"})
    targets = {str(node.target) for node in seen["decode"].graph.nodes}
    assert "clsa.attention.default" in targets
    assert "aten.index_copy_.default" in targets, "caches are written in place"
