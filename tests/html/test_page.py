"""Pages as files: what they say, that they are whole, escaped, and need no network."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clsa_compile import inspect
from clsa_compile.html.layer_graph import COLOURS
from clsa_compile.html.page import _json, pages, render
from clsa_compile.ir.plan import Plan
from clsa_compile.ir.routing import Layer as PlanLayer
from clsa_compile.ir.routing import Pool
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.report import Report
from clsa_compile.sources import Call, Sources
from clsa_compile.testing import tiny

HOSTILE = ["<script>alert(1)</script>", '"><b>', "</title></template>", "&lt;", "{{ graphs }}", "]]>", "';"]
# Machado, Oliveira and Fernandes 2009, severity 1.0, over linear sRGB.
DEFICIENCIES = {
    "none": np.eye(3).tolist(),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def test_the_page_says_what_the_report_says(make: Any, read_page: Any) -> None:
    report = make(8, "mass", left=(6,))
    words = read_page(render({"decode": report}, "toy", "8 layers")).words
    for part in (
        "clsa: toy",
        "8 layers · what",
        "8 attentions in 1 graph: 5 sparse over selected tokens (0 indexers run), 2 dense with each key read "
        "once, 1 left as they were.",
        "one token a sequence, batch 1, predicted for a chip",
        "model.layers.3.self_attn",
        "left as it was users: softmax is also used by amax modeling_toy.py:46 in forward: weights",
        "32/8 heads of 128 bfloat16, scale 0.125",
        "sparse_attention.gather, layers 0-5, 7 H=32, SCALE=0.125, num_warps=4",
        "@triton.jit",
        "# a < b & c",
        "break-even 2,100",
        "us(T)",
        "layer 5 reads what layer 4 chose",
    ):
        assert part in words, part
    assert '"schedule": "FSSS"' in words
    for layer in report.layers:
        assert layer.path in words


def test_figures_are_those_of_the_prediction(make: Any) -> None:
    report = make(8, "mass")
    (page,) = pages("decode", report)
    (found,) = report.predictions
    for figures, tokens in zip(page.figures, report.lengths, strict=True):
        before, after = found.before.at(tokens)[2], found.after.at(tokens)[2]
        assert figures.faster == f"{before / after:.3g}"
    assert page.figures[1].ms == ("22.5 ms", "7.59 ms")
    assert page.rows[1].times[1] == ("2,624.4", "140.1")


def test_the_page_needs_no_network(make: Any, read_page: Any) -> None:
    text = render({"": make(16, "mass", keys=(2, 3))})
    read = read_page(text)
    tags = {tag for tag, _ in read.tags}
    assert tags.isdisjoint({"img", "iframe", "object", "image", "base", "form", "a"})
    names = {name for _, attributes in read.tags for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "xlink:href", "style")}
    assert [(a["rel"], a["href"]) for a in read.all("link")] == [("icon", "data:,")]
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert "@import" not in text
    assert text.count("<script") == text.count("</script") == 1


def test_only_the_pages_own_script_may_run(make: Any, read_page: Any) -> None:
    text = render({"": make(2)})
    policy = next(a["content"] for a in read_page(text).all("meta") if a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/=]+';", policy)
    assert "connect-src" not in policy


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile=st.one_of(st.text(min_size=1), st.sampled_from(HOSTILE)))
def test_whatever_is_shown_is_escaped(hostile: str, make: Any, read_page: Any) -> None:
    def shown(text: str) -> str:
        report = make(3, "mass", left=(2,), path=text)
        (plan,), (details,) = report.plans, report.details
        layers = tuple(
            replace(layer, path=text, mask=text, reason=text, runs=text, source=text, kernels=(text,))
            for layer in details.layers
        )
        assert details.sources is not None
        kernel = details.sources.kernels[0]
        sources = replace(
            details.sources,
            device=text,
            kernels=(replace(kernel, text=text, calls=(Call(text, (text,), {text: 1}),)),),
            others=(Call(text, (text,), {}),),
        )
        prediction = replace(details.prediction, device=text)
        details = replace(details, layers=layers, sources=sources, prediction=prediction)
        return render(
            {text: replace(report, plans=(plan,), details=(details,), left_graphs=(text,))}, text, text
        )

    plain, found = read_page(shown("plain")), read_page(shown(hostile))
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in plain.tags]
    if hostile in HOSTILE:
        assert found.text.count(hostile) >= 10


def seen_with(deficiency: np.ndarray, colour: str) -> np.ndarray:
    """Returns a colour as somebody sees it who lacks one kind of cones, in OKLab."""
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(CONES @ np.clip(deficiency @ linear, 0, 1))
    return np.asarray(OKLAB @ cones)


@pytest.mark.parametrize("name", ["protanopia", "deuteranopia", "tritanopia", "none"])
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_groups_next_to_each_other_can_be_told_apart(scheme: int, name: str) -> None:
    style = (files("clsa_compile.html") / "page.css").read_text()
    pairs = re.findall(r"--g\d: light-dark\((#\w+), (#\w+)\);", style)
    assert len(pairs) == COLOURS
    seen = [seen_with(np.array(DEFICIENCIES[name]), pair[scheme]) for pair in pairs]
    apart = [float(np.linalg.norm(a - b)) for a, b in zip(seen, [*seen[1:], seen[0]], strict=True)]
    assert min(apart) > 0.15, [round(d, 3) for d in apart]


def test_several_graphs_have_names(make: Any, read_page: Any) -> None:
    report = make(3, "dense")
    two = Report(report.plans * 2, details=report.details * 2)
    assert [page.name for page in pages("", two)] == ["graph 1", "graph 2"]
    assert [page.name for page in pages("decode", report)] == ["decode"]
    read = read_page(render({"prefill": two, "decode": report}))
    radios = [a for a in read.all("input") if a.get("name") == "graph"]
    assert len(radios) == 3
    assert sum("checked" in a for a in radios) == 1


def test_a_plan_alone_is_enough(make: Any, read_page: Any) -> None:
    report = make(6, "mass", left=(5,))
    words = read_page(render({"": Report(report.plans)})).words
    assert "What it costs" not in words
    assert "made without looking at kernels" in words
    assert "2048 tokens" in words
    assert "left as it was users: softmax" in words


def test_graphs_that_are_left_whole_are_named(read_page: Any) -> None:
    words = read_page(render({"": Report((), ("autocast: it is on",))})).words
    assert "autocast: it is on" in words
    assert "No attention was seen." in words


def test_where_no_kernel_is_known_the_page_says_why(make: Any, read_page: Any) -> None:
    report = make(2, "dense")
    details = replace(report.details[0], sources=Sources(problem="Triton is not there"))
    words = read_page(render({"": replace(report, details=(details,))})).words
    assert "No kernel can be shown: Triton is not there." in words


def test_what_the_plans_file_says_of_its_quality_is_shown(make: Any, read_page: Any) -> None:
    report = make(8, "mass")
    layers = (PlanLayer(0, 4, 2), PlanLayer(1, 4, 2))
    pool = Pool(0, 64, {0: ((0.25,) * 4,)}, (1,), keep_first=4, keep_last=32)
    quality = {"perplexity_increase": 0.0147, "tokens": 12288.0}
    sharing = SharingPlan(64, layers, (pool,), quality=quality)
    words = read_page(render({"": replace(report, sharing=sharing)})).words
    assert "perplexity increase 0.0147, tokens 12,288." in words


def test_json_can_be_read_and_has_a_line_for_each_entry(make: Any) -> None:
    plan = make(8, "mass").plans[0]
    text = _json(plan.to_dict())
    assert Plan.from_dict(json.loads(text)) == plan
    assert sum("self_attn" in line for line in text.splitlines()) == 8


@pytest.mark.parametrize("options", [None, {"topk": 40, "share": 2}])
def test_a_call_of_a_model_becomes_a_page(options: Any, tmp_path: Path, read_page: Any) -> None:
    torch._dynamo.reset()
    model = tiny("llama", num_hidden_layers=3)
    report = inspect(model, torch.zeros(1, 80, dtype=torch.long), use_cache=False, options=options)
    path = tmp_path / "a folder" / "report.html"
    report.to_html(path, title="three layers")
    read = read_page(path.read_text(encoding="utf-8"))
    assert "clsa: three layers" in read.words
    assert "attention.rows, layers 0-2" in read.words
    assert "def attention_rows(" in read.text
    assert list(path.parent.iterdir()) == [path]
