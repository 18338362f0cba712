"""Launches in a lowered graph: kernels by name, with the arguments that they get."""

from __future__ import annotations

from pathlib import Path

import torch
import triton
import triton.language as tl
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch.fx.experimental.proxy_tensor import make_fx

from clsa_compile.capture.launches import launch_of
from clsa_compile.dump.folder import Folder
from clsa_compile.dump.kernels import write_kernels
from clsa_compile.ir.captured import Captured


def test_a_launch_names_its_kernel_and_arguments(for_cuda: Captured) -> None:
    (launch,) = [found for node in for_cuda.graph.nodes if (found := launch_of(node)) is not None]
    assert launch.name.startswith("attention_decode_")
    assert launch.file.is_file()
    assert f"def {launch.kernel.__name__}(" in launch.file.read_text()
    assert launch.arguments["SCALE"] == 0.125
    assert isinstance(launch.arguments["q_ptr"], torch.fx.Node)
    assert set(launch.arguments) <= set(launch.kernel.arg_names)
    assert set(launch.options) == {"num_warps", "num_stages"}


def test_other_nodes_are_no_launches() -> None:
    module = make_fx(torch.sin)(torch.zeros(2))
    assert [launch_of(node) for node in module.graph.nodes] == [None] * 3


@triton.jit
def of_a_model(x_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


def test_a_models_own_kernel_is_none_of_ours(for_cuda: Captured, tmp_path: Path) -> None:
    (node,) = [n for n in for_cuda.graph.nodes if launch_of(n) is not None]
    node.kwargs = {
        **node.kwargs,
        "kernel_idx": kernel_side_table.add_kernel(of_a_model),
        "grid": [(1,), (2,)],
        "kwargs": {"N": 16},
    }
    launch = launch_of(node)
    assert launch is not None
    assert not launch.generated
    assert launch.name == "of_a_model"
    assert launch.grid == [(1,), (2,)]
    folder = Folder.new(tmp_path)
    write_kernels(folder, for_cuda)
    assert list(folder.path.iterdir()) == []
