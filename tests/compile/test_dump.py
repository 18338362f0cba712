"""Dumps: a numbered folder a graph, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from clsa_compile.dump import Dump
from clsa_compile.errors import OptionError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.plan import Plan, SitePlan
from clsa_compile.passes.lower import Choice


def attend(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def a_graph() -> Captured:
    mode = FakeTensorMode()
    x = mode.from_tensor(torch.randn(1, 2, 3, 4))
    with mode:
        module = make_fx(attend, pre_dispatch=True)(x)
    return Captured(module, mode, "dynamo")


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dump = Dump.open(None)
    dump.graph("captured", a_graph())
    dump.plan(Plan((), ()))
    dump.choices(())
    assert list(tmp_path.iterdir()) == []


def test_every_graph_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [Dump.open(str(tmp_path / "dumps")).folder for _ in range(3)]
    assert [f.name for f in folders if f] == ["graph_000", "graph_001", "graph_002"]


def test_stages_are_written_in_order_and_can_be_read_back(tmp_path: Path) -> None:
    dump = Dump.open(str(tmp_path))
    assert dump.folder is not None
    plan = Plan((SitePlan(0, 3, "layers.3", "dense", "attention", mask="kv <= q"),), ())
    dump.choices((Choice("attention", "attention", "reference", ("decode: not on cpu",)),))
    dump.graph("lowered", a_graph())
    dump.plan(plan)
    dump.graph("captured", a_graph())
    assert [p.name for p in sorted(dump.folder.iterdir())] == [
        "0_captured.py", "1_plan.json", "3_lowered.py", "4_choices.json",
    ]  # fmt: skip
    assert Plan.from_dict(json.loads((dump.folder / "1_plan.json").read_text())) == plan
    (choice,) = json.loads((dump.folder / "4_choices.json").read_text())
    assert choice["variant"] == "reference"
    assert choice["passed_over"] == ["decode: not on cpu"]
    text = (dump.folder / "0_captured.py").read_text()
    assert "torch.ops.aten.scaled_dot_product_attention" in text
    compile(text, "captured", "exec")


def test_a_folder_that_cannot_be_made_is_an_error_of_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"the option 'dump' is .*file"):
        Dump.open(str(tmp_path / "file" / "inner"))
