"""The decoder of `examples/yoco_decoder.py`: every variant equals eager, and repeated indexers are one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clsa_compile
from clsa_compile.backend import clsa
from clsa_compile.testing import load_script

ROOT = Path(__file__).parents[2]


EXAMPLE = load_script(ROOT / "examples/yoco_decoder.py")
LAYERS, CROSS, BATCH, PROMPT, STEPS, LENGTH, TOLERANCE = 4, 2, 2, 12, 3, 20, 1e-4
MEMBERS = tuple(range(LAYERS - CROSS, LAYERS))
ops = torch.ops.clsa


def decoder(attention: str) -> Any:
    """A tiny model whose prompt is longer than its windows and its selections.

    With few index heads, ReLU scores tie, and eager's own choice among them is arbitrary.
    """
    torch.manual_seed(0)
    config = EXAMPLE.Config(
        attention=attention, vocabulary=64, layers=LAYERS, hidden=32, ffn=48, heads=4, kv_heads=2,
        head_dim=8, window=6, topk=5, index_heads=32, index_dim=8,
    )  # fmt: skip
    return EXAMPLE.Decoder(config).eval()


@torch.no_grad()
def run(forward: Any, cache: Any, keep: int) -> list[Tensor]:
    """Logits of a prompt and of a few steps."""
    generator = torch.Generator().manual_seed(1)
    found, at = [], 0
    for width in (PROMPT, *[1] * STEPS):
        ids = torch.randint(0, 64, (BATCH, width), generator=generator)
        found.append(forward(ids, torch.arange(at, at + width), cache, keep).clone())
        at += width
    return found


def compare(attention: str, cache: str, backend: Any, keep: int = 0) -> None:
    """Runs eager and compiled, and compares logits and every store."""
    model = decoder(attention)
    length = LENGTH if cache == "static" else None
    caches = [model.new_cache(BATCH, length) for _ in range(2)]
    eager = run(model, caches[0], keep)
    ours = run(torch.compile(model, backend=backend), caches[1], keep)
    torch.testing.assert_close(ours, eager, atol=TOLERANCE, rtol=0)
    stores = [[store.data for store in c.stores if store.data is not None] for c in caches]
    torch.testing.assert_close(stores[1], stores[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("attention", "cache"),
    [
        *((attention, "static") for attention in ("transformer", "yoco", "yoco-dsa", "yoco-clsa")),
        *(pytest.param(a, "growing", marks=pytest.mark.slow) for a in ("transformer", "yoco", "yoco-dsa")),
        ("yoco-clsa", "growing"),
    ],
)
def test_every_variant_equals_eager(attention: str, cache: str, passes: Any) -> None:
    compare(attention, cache, passes)
    assert passes.reasons == []
    selects = attention in ("yoco-dsa", "yoco-clsa")
    indices = {"yoco-dsa": CROSS, "yoco-clsa": 1}.get(attention, 0)
    for counted in passes.rewritten:
        assert counted[ops.index_topk.default] == indices
        assert counted[ops.sparse_attention.default] == (CROSS if selects else 0)
        assert counted[ops.attention.default] == (LAYERS - CROSS if selects else LAYERS)
        if cache == "static" and attention == "yoco-clsa":
            # Keys and values of each self-decoder layer and of the memory, and index keys once.
            assert counted[torch.ops.aten.index_copy_.default] == 2 * (LAYERS - CROSS) + 2 + 1
    for plan in passes.plans:
        groups = {g.kind: g.members for g in plan.groups}
        assert groups.get("kv") == (None if attention == "transformer" else MEMBERS)
        if attention == "yoco-clsa":
            assert groups["index"] == MEMBERS
            assert [g.repeats for g in plan.groups if g.kind == "index"] == [CROSS - 1]
            assert plan.schedule == "F" + "S" * (CROSS - 1)
            assert plan.shares == (), "results are what they were"


def rows(module: Any) -> list[int]:
    """How many rows each projection computes, in order."""
    linear = torch.ops.aten.linear.default
    return [n.meta["val"].shape[1] for n in module.graph.nodes if n.target is linear]


@pytest.mark.parametrize(
    ("attention", "cache"),
    [("yoco", "static"), ("yoco-dsa", "static"), ("yoco-clsa", "static"), ("yoco-clsa", "growing")],
)
def test_a_prompt_runs_the_cross_decoder_for_its_last_token(attention: str, cache: str, passes: Any) -> None:
    compare(attention, cache, passes, keep=1)
    found = rows(passes.modules[0])
    index_keys = {"yoco-dsa": CROSS, "yoco-clsa": 1}.get(attention, 0)
    # Seven projections a self-decoder layer, the memory's keys and values, and the index keys.
    assert found.count(PROMPT) == 7 * (LAYERS - CROSS) + 2 + index_keys
    assert set(found) == {PROMPT, 1}
    assert found[-1] == 1
    # Queries, output and network of a cross layer; the index query, or query and weights in each layer.
    queries = {"yoco-dsa": 2 * CROSS, "yoco-clsa": 1}.get(attention, 0)
    assert found.count(1) == 5 * CROSS + queries + 1


def test_a_prompt_whose_logits_are_all_wanted_runs_whole(passes: Any) -> None:
    compare("yoco-clsa", "static", passes, keep=0)
    assert set(rows(passes.modules[0])) == {PROMPT}


def test_the_report_says_that_equal_indexers_became_one() -> None:
    model = decoder("yoco-clsa")
    ids = torch.zeros(1, PROMPT, dtype=torch.long)
    report = clsa_compile.inspect(model, ids, torch.arange(PROMPT), model.new_cache(1, LENGTH))
    assert report.counts()["index_topk"] == 1
    assert "layers 2, 3 share the index of layer 2: 2 indexers compute the same, one runs" in str(report)


@pytest.mark.exhaustive  # without Inductor: test_a_prompt_runs_the_cross_decoder_for_its_last_token
def test_it_equals_eager_through_inductor() -> None:
    compare("yoco-clsa", "static", clsa, keep=1)


def test_the_example_knows_nothing_of_clsa() -> None:
    source = (ROOT / "examples/yoco_decoder.py").read_text()
    assert "import clsa" not in source
    assert "from clsa" not in source
    assert len(source.splitlines()) < 400


def test_the_presets_are_the_papers_shape_and_a_small_one() -> None:
    paper = {
        "layers": 32, "hidden": 2560, "ffn": 7680, "heads": 20, "kv_heads": 4, "head_dim": 128,
        "window": 512, "topk": 2048,
    }  # fmt: skip
    assert asdict(EXAMPLE.PRESETS["4b"]).items() >= paper.items()
    with torch.device("meta"):
        small = EXAMPLE.Decoder(EXAMPLE.PRESETS["small"])
    assert sum(p.numel() for p in small.parameters()) < 1e7
