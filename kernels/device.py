"""What a plan must know of the device that its kernels will run on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Bytes a second that the memory moves at most, by a part of the device's name; the first match counts.
BANDWIDTHS = (
    ("GH200", 4.0e12),
    ("H200", 4.8e12),
    ("H100 PCIe", 2.04e12),
    ("H100 NVL", 3.94e12),
    ("H100", 3.35e12),
    ("H800", 3.35e12),
    ("B200", 8.0e12),
    ("A100-SXM4-80GB", 2.04e12),
    ("A100 80GB PCIe", 1.94e12),
    ("A100", 1.56e12),
    ("L40", 0.864e12),
    ("RTX 4090", 1.01e12),
)


@dataclass(frozen=True, slots=True)
class Device:
    """One chip: SM is a streaming multiprocessor, a program is what CUDA calls a block.

    bandwidth: bytes a second by the data sheet; the cost model knows which share of it is reached.
    shared, program_shared: bytes of shared memory of an SM, and what one program may take of it.
    registers: 32-bit registers of an SM. launch_us: microseconds from one kernel of a CUDA graph to the next.
    """

    name: str
    sms: int
    bandwidth: float
    shared: int
    program_shared: int
    registers: int
    launch_us: float

    @staticmethod
    def of(device: torch.device | None) -> Device:
        """Returns the device that a tensor lies on.

        Where that is no CUDA device, or CUDA is not there (tensors without storage on a machine without a
        GPU), it is the H100 that the project was measured on.
        """
        if device is None or device.type != "cuda" or not torch.cuda.is_available():
            return H100
        return _present(torch.cuda.current_device() if device.index is None else device.index)


# NVIDIA H100 80GB HBM3, on which every measurement in benchmarks/ was made.
H100 = Device("NVIDIA H100 80GB HBM3", 132, 3.35e12, 233472, 232448, 65536, 2.85)


@functools.cache
def _present(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        name=properties.name,
        sms=properties.multi_processor_count,
        bandwidth=bandwidth(properties),
        shared=getattr(properties, "shared_memory_per_multiprocessor", H100.shared),
        program_shared=getattr(properties, "shared_memory_per_block_optin", H100.program_shared),
        registers=getattr(properties, "regs_per_multiprocessor", H100.registers),
        launch_us=H100.launch_us,
    )


def bandwidth(properties: object) -> float:
    """Returns bytes a second from the name of a chip, else from the clock and width of its memory."""
    name = getattr(properties, "name", "")
    for part, known in BANDWIDTHS:
        if part in name:
            return known
    clock = getattr(properties, "memory_clock_rate", 0)  # kHz; two transfers a cycle
    width = getattr(properties, "memory_bus_width", 0)  # bits
    return 2e3 * clock * width / 8 if clock and width else H100.bandwidth
