"""Programs lowered for CUDA, with no GPU: launches survive what export does with graphs; texts are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget

import clsa_compile.backend
from clsa_compile.config import Options
from clsa_compile.ir.variants import SUPPORTED
from clsa_compile.kernels.catalog import VARIANTS
from clsa_compile.package.programs import Source


class H100:
    """Just enough of a driver for Triton to write its first intermediate code."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Step(nn.Module):
    """One step over a cache that is an input, written in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(256, 256, dtype=torch.bfloat16)

    def forward(self, x: Tensor, keys: Tensor, length: Tensor) -> Tensor:
        q = self.inner(x).view(x.shape[0], 1, 4, 64).transpose(1, 2)
        keys.index_copy_(2, length[None], q[:, :2])
        mask = torch.arange(keys.shape[2]) <= length
        length.add_(1)
        out = F.scaled_dot_product_attention(q, keys, keys, attn_mask=mask[None, None, None], enable_gqa=True)
        return self.inner(out.transpose(1, 2).flatten(2))


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not torch.cuda.is_available():
        monkeypatch.setattr(type(triton.runtime.driver), "active", H100())
    forced = tuple(replace(v, supports=lambda _: SUPPORTED) for v in VARIANTS if v.name == "decode")
    monkeypatch.setattr(clsa_compile.backend, "variants_for", lambda *_: forced)
    batch, slots = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("slots", min=2, max=4096)
    x = torch.randn(3, 1, 256, dtype=torch.bfloat16)
    keys = torch.randn(3, 2, 48, 64, dtype=torch.bfloat16)
    shapes = ({0: batch}, {0: batch, 2: slots}, None)
    source = Source.of(Step().eval(), (x, keys, torch.tensor(5)), {}, shapes)
    return source.programs(Options())["forward"]


def test_launches_are_part_of_what_is_compiled(lowered: Any) -> None:
    launches = [n for n in lowered.lowered.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert len(launches) == 2, "the pass over the keys, and what merges its splits"
    targets = {str(n.target) for n in lowered.lowered.graph.nodes}
    assert "aten.index_copy_.default" in targets
    assert not any("clsa" in target for target in targets)


def test_the_sources_of_kernels_are_kept(lowered: Any) -> None:
    kernels = {name: text for name, text in lowered.texts.items() if name.startswith("kernels/")}
    assert {name.partition("_")[0] for name in kernels} == {"kernels/attention", "kernels/combine"}
    assert all("@triton.jit" in text for text in kernels.values())
    assert "attention_decode_" in lowered.texts["graphs/forward_lowered.py"]


def test_the_rewritten_program_knows_nothing_of_kernels(lowered: Any) -> None:
    targets = {str(n.target) for n in lowered.rewritten.graph.nodes}
    assert "clsa.attention.default" in targets
    assert not any("triton" in target for target in targets)
    assert len(lowered.saved()) > 1000
