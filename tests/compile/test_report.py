"""Reports as text and as JSON, golden by golden, and as a new user meets them."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import StaticCache

from clsa_compile import Report, inspect
from clsa_compile.report import SCHEMA
from clsa_compile.report_text import WIDTH, ranges
from clsa_compile.testing import tiny

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "inspect"
# Lines of this text stand in the goldens: a file of its own keeps them when tests change.
MODEL = '''\
import math

import torch
import torch.nn.functional as F


class Refused(torch.nn.Module):
    """Attention whose weights are handed out as well."""

    def forward(self, q, k):
        weights = (q @ k.mT).softmax(-1)
        return weights @ k, weights


class Toy(torch.nn.Module):
    """A window over a cache with grouped heads, selected tokens with a softcap, and one that is refused."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64), torch.nn.Identity(), Refused()])

    def forward(self, q, cache, new, at, iq, ik, w):
        cache.index_copy_(2, at, new)
        k = cache.repeat_interleave(2, 1)
        slots = torch.arange(cache.shape[2])[None]
        causal = slots <= at[:, None]
        x = F.scaled_dot_product_attention(q, k, k, attn_mask=causal & (slots > at[:, None] - 16))
        x = self.layers[0](x)

        scores = torch.einsum("bshd,btd->bsht", iq, ik).relu() * 0.25
        scores = torch.einsum("bsh,bsht->bst", w, scores).masked_fill(~causal, -math.inf)
        chosen = torch.full((2, 1, 64), -math.inf).scatter(-1, scores.topk(8, -1).indices, 0.0)
        mask = (chosen + torch.where(causal, 0.0, -math.inf))[:, None]
        scores = 20.0 * torch.tanh((x @ k.mT) * 0.125 / 20.0)
        x = (scores + mask).softmax(-1) @ k
        return self.layers[2](x, k)
'''


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Report:
    (tmp_path / "toy.py").write_text(MODEL)
    spec = importlib.util.spec_from_file_location("toy", tmp_path / "toy.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy", module)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    cache, new = torch.randn(2, 2, 64, 64), torch.randn(2, 2, 1, 64)
    index = [torch.randn(2, 1, 32, 16), torch.randn(2, 64, 16), torch.randn(2, 1, 32)]
    inputs = [torch.randn(2, 4, 1, 64), cache, new, torch.tensor([40]), *index]
    with pytest.warns(UserWarning, match="clsa left 1 of 3 attentions"):
        return inspect(module.Toy(), *inputs, lengths=(64, 4096, 131072), device="h100")


def compare(name: str, text: str) -> None:
    golden = GOLDENS / name
    if os.environ.get("CLSA_ACCEPT") == "1":
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.exists(), "write it with CLSA_ACCEPT=1"
    assert text == golden.read_text(), f"{name}: read the difference; CLSA_ACCEPT=1 accepts it"


def in_terminal(report: Report, width: int) -> str:
    out = io.StringIO()
    Console(width=width, force_terminal=True, color_system=None, file=out).print(report)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def test_the_text_reads_as_it_should(report: Report) -> None:
    compare("toy.txt", f"{report}\n")


def test_a_narrow_terminal_reads_as_it_should(report: Report) -> None:
    text = in_terminal(report, 100)
    assert all(len(line) <= 100 for line in text.splitlines())
    compare("toy_terminal.txt", text)


def test_json_reads_as_it_should(report: Report) -> None:
    compare("toy.json", json.dumps(report.to_dict(), indent=1) + "\n")


def test_from_a_refused_layer_to_the_line_of_the_model(report: Report) -> None:
    """What a new user asks: which layer is left, why, and where is that."""
    (left,) = [layer for layer in report.layers if layer.action == "left"]
    line = next(i for i, text in enumerate(MODEL.splitlines(), 1) if "weights = (q @ k.mT)" in text)
    assert left.path == "layers.2"
    assert left.reason.startswith("users: ")
    assert left.source == f"toy.py:{line} in forward: weights = (q @ k.mT).softmax(-1)"
    lines = str(report).splitlines()
    at = next(
        i for i, text in enumerate(lines) if text.startswith("layer 2 (layers.2) is left as it was: users")
    )
    assert lines[at + 1].strip() == left.source


def test_lines_are_plain_and_as_wide_as_they_are_said_to_be(report: Report) -> None:
    assert "\x1b" not in str(report)
    tables = [line for line in str(report).splitlines() if not line.startswith((" ", "clsa:", "layer"))]
    assert max(map(len, tables)) <= WIDTH


def test_the_schema_has_a_number(report: Report) -> None:
    assert report.to_dict()["schema"] == SCHEMA


def test_layers_that_are_left_for_the_same_reason_are_named_once() -> None:
    model = tiny("llama", attention="eager", num_hidden_layers=4)
    ids = torch.zeros(1, 12, dtype=torch.long)
    with pytest.warns(UserWarning, match="clsa left 4"):
        text = str(inspect(model, ids, use_cache=False, output_attentions=True))
    assert text.count("is left as it was") == 1
    assert "so are layers 1, 2, 3" in text


def test_many_indexers_take_one_line() -> None:
    model = tiny(
        "glm_moe_dsa", num_hidden_layers=5, mlp_layer_types=["dense"] * 5, indexer_types=["full"] * 5
    )
    ids = torch.zeros(1, 12, dtype=torch.long)
    text = str(inspect(model, ids, use_cache=False))
    assert "layers 0-4 have an index of their own each" in text
    assert "has an index of its own" not in text


def test_break_even_of_nothing_sparse_is_not_spoken_of() -> None:
    model: Any = tiny("llama")
    held = StaticCache(config=model.config, max_cache_len=48)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long), past_key_values=held)
    assert "break-even" not in str(inspect(model, torch.zeros(1, 1, dtype=torch.long), past_key_values=held))


def test_layers_that_are_alike_are_one_row_wherever_they_stand() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    model: Any = tiny("gemma2", num_hidden_layers=6, layer_types=kinds)
    text = str(inspect(model, torch.zeros(1, 40, dtype=torch.long), use_cache=False))
    rows = [line.split()[:4] for line in text.splitlines() if line[:1].isdigit()]
    assert rows[0][:3] == ["0,", "2,", "4"]
    assert rows[1][:3] == ["1,", "3,", "5"]


@pytest.mark.parametrize(
    ("numbers", "least", "text"),
    [
        ([], 3, ""),
        ([4], 3, "4"),
        ([0, 1], 3, "0, 1"),
        ([0, 1, 2], 3, "0-2"),
        ([0, 1, 2, 3], 5, "0, 1, 2, 3"),
        ([0, 1, 2, 3, 4, 8, 10, 11], 5, "0-4, 8, 10, 11"),
    ],
)
def test_layers_in_a_row(numbers: list[int], least: int, text: str) -> None:
    assert ranges(numbers, least) == text


def test_layers_that_read_different_indices_are_one_row_too() -> None:
    model = tiny(
        "glm_moe_dsa", num_hidden_layers=4, mlp_layer_types=["dense"] * 4, indexer_types=["full"] * 4
    )
    text = str(inspect(model, torch.zeros(1, 12, dtype=torch.long), use_cache=False, options={"share": 2}))
    rows = [line for line in text.splitlines() if line[:1].isdigit()]
    assert [row.split("  ")[0] for row in rows[:2]] == ["0, 2", "1, 3"]
    assert "the index of" in text
    assert "an earlier layer" in " ".join(text.split())
    assert "layers 2, 3 share the index of layer 2" in text
