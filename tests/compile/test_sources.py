"""Sources: the kernels that a graph would launch on CUDA, found on a machine that has none."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import StaticCache

import clsa_compile.sources
from clsa_compile import Report, inspect
from clsa_compile.errors import KernelError, MissingTritonError
from clsa_compile.kernels.catalog import VARIANTS
from clsa_compile.kernels.device import H100
from clsa_compile.sources import Sources
from clsa_compile.testing import tiny


def step(name: str = "llama", options: Any = None, **changes: Any) -> Report:
    model: Any = tiny(name, **changes)
    held = StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long), past_key_values=held)
    return inspect(model, torch.zeros(1, 1, dtype=torch.long), past_key_values=held, options=options)


def found(report: Report) -> Sources:
    (details,) = report.details
    assert details.sources is not None
    return details.sources


def test_layers_that_are_alike_call_one_kernel() -> None:
    sources = found(step(num_hidden_layers=3))
    assert (sources.problem, sources.others) == ("", ())
    if not torch.cuda.is_available():
        assert sources.device == H100.name
    names = [kernel.name.rpartition("_")[0] for kernel in sources.kernels]
    assert names[0] == "attention_decode"
    (call,) = sources.kernels[0].calls
    assert call.variant == "attention.decode"
    assert call.paths == tuple(f"model.layers.{i}.self_attn" for i in range(3))
    assert (call.constants["H"], call.constants["HKV"], call.constants["D"]) == (4, 2, 16)
    assert list(call.constants)[-2:] == ["num_warps", "num_stages"]


def test_the_text_is_that_of_the_file_that_would_be_launched() -> None:
    for kernel in found(step()).kernels:
        assert f"def {kernel.name.rpartition('_')[0]}(" in kernel.text
        assert "import triton" in kernel.text


@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {"topk": 40, "share": 2}), ("glm_moe_dsa", None), ("gemma2", None), ("gemma3n_text", None)],
)
def test_variants_are_those_that_the_layers_name(name: str, options: Any) -> None:
    """Two ways to the same choice: from what a site is, and from the graph after the rewrite."""
    report = step(name, options)
    sources = found(report)
    assert sources.problem == ""
    called: dict[str, set[str]] = {}
    for call in [*sources.others, *(call for kernel in sources.kernels for call in kernel.calls)]:
        for path in call.paths:
            called.setdefault(path, set()).add(call.variant)
    for layer in report.layers:
        # An indexer is a module inside of the attention.
        variants = set().union(*(names for path, names in called.items() if path.startswith(layer.path)))
        assert variants - {"mask_bounds.reference"} == set(layer.kernels)


def test_what_has_no_generated_kernel_is_named() -> None:
    x = torch.zeros(1, 4, 80, 16)
    sources = found(inspect(lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True)))
    assert [(call.variant, len(call.paths)) for call in sources.others] == [("attention.sdpa", 1)]
    assert sources.kernels == ()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_prompts_run_what_their_layers_name(name: str) -> None:
    report = inspect(tiny(name), torch.zeros(1, 80, dtype=torch.long), use_cache=False)
    variants = {call.variant for kernel in found(report).kernels for call in kernel.calls}
    assert variants == {"attention.rows"} == {name for layer in report.layers for name in layer.kernels}


def test_reports_with_sources_go_from_process_to_process() -> None:
    report = step()
    assert pickle.loads(pickle.dumps(report)) == report


def test_where_all_is_left_there_are_no_kernels() -> None:
    model = tiny("llama", attention="eager")
    ids = torch.zeros(1, 12, dtype=torch.long)
    with pytest.warns(UserWarning, match="clsa left 2"):
        report = inspect(model, ids, use_cache=False, output_attentions=True)
    assert report.counts()["left"] == 2
    assert [details.sources for details in report.details if details.layers] == [
        Sources(problem="no attention is rewritten")
    ]


def test_without_triton_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise MissingTritonError

    monkeypatch.setattr(clsa_compile.sources, "kernels", missing)
    assert found(step()) == Sources(problem=str(MissingTritonError()))


@pytest.mark.parametrize(
    ("error", "problem"),
    [(KernelError("the folder is full"), "the folder is full"), (ValueError("a\nb"), "ValueError: a")],
)
def test_what_fails_is_said_and_leaves_the_report_whole(
    error: Exception, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(clsa_compile.sources, "carry_out", fails)
    report = step()
    assert found(report) == Sources(problem=problem)
    assert report.counts()["attention"] == 2


def test_the_catalog_is_left_as_it_is() -> None:
    before = [(variant.supports, variant.launch) for variant in VARIANTS]
    step()
    assert [(variant.supports, variant.launch) for variant in VARIANTS] == before
