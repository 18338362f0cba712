"""Launches in a lowered graph: kernels by name, with the arguments that they get."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from clsa_compile.capture.launches import launch_of
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
