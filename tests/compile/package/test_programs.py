"""Programs: what native code could not do is refused while there is a model to change."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clsa_compile.config import Options
from clsa_compile.errors import ExportError
from clsa_compile.package.programs import Source

ROOT = Path(__file__).parents[3]


@torch.library.custom_op("clsa_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.clsa_tests.doubled(x)


class Sized(nn.Module):
    def forward(self, x: Tensor, n: int) -> Tensor:
        return x * n


def forward(module: nn.Module, *args: Any, shapes: Any = None) -> Any:
    return Source.of(module.eval(), args, {}, shapes).programs(Options())["forward"]


def test_ops_that_exist_in_python_only() -> None:
    program = forward(Doubled(), torch.zeros(2))
    with pytest.raises(ExportError, match="calls clsa_tests::doubled, an op that exists in Python only"):
        program.compile("0" * 64)
    assert program.files == []


def test_constants_and_tensors_among_the_inputs() -> None:
    rows = torch.export.Dim("rows", min=2, max=9)
    program = forward(Sized(), torch.zeros(3, 2), 4, shapes={"x": {0: rows}, "n": None})
    tensor, number = program.inputs
    assert (number.is_tensor, number.constant) == (False, 4)
    name, width = tensor.sizes
    assert (tensor.dtype, width, program.ranges[name]) == ("float32", 2, (2, 9))


def test_numbers_that_may_vary() -> None:
    with pytest.raises(ExportError, match="'n' is a number that may vary; give a tensor"):
        forward(Sized(), torch.zeros(3), 4, shapes={"x": None, "n": torch.export.Dim.DYNAMIC})


def test_saved_programs_hold_no_weights() -> None:
    program = forward(nn.Linear(512, 512), torch.zeros(3, 512))
    assert len(program.saved()) < 100_000
    assert set(program.tensors()) >= {"weight", "bias"}


def test_a_dump_of_a_program_reproduces_it(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q = self.inner(x)[:, None]
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    source = Source.of(Attention().eval(), (torch.randn(2, 5, 16),), {}, None)
    source.programs(Options.read({"dump": str(tmp_path)}))
    (folder,) = tmp_path.iterdir()
    assert {"repro.py", "01_canonical.py", "04_plan.json", "06_lowered.py", "timings.json"} <= {
        file.name for file in folder.iterdir()
    }
    command = [sys.executable, "-W", "ignore", str(folder / "repro.py"), "--backend", "eager"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
