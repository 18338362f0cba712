"""`torch.compile(...).aot_compile(...)`: a second process starts without compiling."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.aot_compile_types import SerializableCallable

from clsa_compile.backend import clsa
from clsa_compile.saved import Saved, saveable

MODULE = """
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.inner(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def arguments():
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
"""

LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from attention_of_tests import Attention, arguments
import torch._inductor.graph
import torch._inductor.codecache

def refuse(*_, **__):
    raise AssertionError("something was compiled")

torch._inductor.graph.GraphLowering.run = refuse
torch._inductor.graph.GraphLowering.codegen = refuse
with open(sys.argv[2], "rb") as file:
    compiled = torch.compiler.load_compiled_function(file)
model = Attention().eval()
with torch.no_grad():
    difference = (compiled(model, arguments()) - model(arguments())).abs().max()
print(type(compiled._artifacts.compiled_fn).__name__, float(difference) < 1e-6)
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "attention_of_tests.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from attention_of_tests import Attention, arguments  # type: ignore[import-not-found]

    model = Attention().eval()
    # Not monkeypatch, which takes what is at its default for missing, and then deletes it.
    with torch.no_grad(), torch._dynamo.config.patch(enable_aot_compile=True):
        compiled: Any = torch.compile(Attention.forward, backend=clsa, fullgraph=True)
        saved = compiled.aot_compile(((model, arguments()), {}))
        assert isinstance(saved._artifacts.compiled_fn, Saved)
        torch.testing.assert_close(saved(model, arguments()), model(arguments()))
    saved.save_compiled_function(str(tmp_path / "a.bin"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path), str(tmp_path / "a.bin")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Saved", "True"]


def test_only_what_torch_wants_to_save_is_wrapped() -> None:
    class Compiled:
        def serialize(self) -> Any:
            return None

        def __call__(self) -> int:
            return 3

    compiled = Compiled()
    assert saveable(compiled) is compiled
    with torch._functorch.config.patch(bundled_autograd_cache=True):
        wrapped = saveable(compiled)
        assert saveable(print) is print, "it cannot be written"
    assert isinstance(wrapped, SerializableCallable)
    assert wrapped() == 3
    # Otherwise torch wraps it once more, and writes down kernels that lie in no module.
    assert not hasattr(wrapped, "serialize")
