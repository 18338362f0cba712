"""Launches of Triton kernels in a lowered graph, by what they are and not by torch's numbers for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import Node

__all__ = ["Launch", "launch_of"]


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch. `arguments` are nodes and constants by name; `options` num_warps and num_stages."""

    kernel: Any
    grid: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def generated(self) -> bool:
        """Whether the kernel is one of ours, in a file of its own; a model may call others."""
        return self.file.stem.startswith(f"{self.kernel.__name__}_") and "clsa" in self.kernel.__module__

    @property
    def name(self) -> str:
        """The name of the kernel's generated file, which holds a hash of its text; of others the kernel's."""
        return self.file.stem if self.generated else str(self.kernel.__name__)

    @property
    def file(self) -> Path:
        """Where the kernel's source lies."""
        return Path(self.kernel.fn.__code__.co_filename)


def launch_of(node: Node) -> Launch | None:
    """Returns the launch that a node makes, or None for another node."""
    if node.op != "call_function" or "triton_kernel_wrapper" not in str(node.target):
        return None
    # Only there is Triton; torch keeps kernels in a table and their numbers in the graph.
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
    given: Any = node.kwargs["kwargs"]
    options: dict[str, int] = {}
    configs = getattr(kernel, "configs", None)
    if configs:  # a kernel with num_warps is an autotuner with one configuration
        options = {"num_warps": configs[0].num_warps, "num_stages": configs[0].num_stages}
        kernel = kernel.fn
    grids: Any = node.kwargs["grid"]
    return Launch(kernel, grids[0] if len(grids) == 1 else grids, {**given, **constants}, options)
