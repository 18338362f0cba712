"""What a plan must know of the device that its kernels will run on."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from clsa_compile.errors import OptionError

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

# Multiplications and additions a second of dense bfloat16 products by the data sheet, in the same way.
RATES = (
    ("H100 PCIe", 7.56e14),
    ("H100 NVL", 8.35e14),
    ("H100", 9.89e14),
    ("H200", 9.89e14),
    ("H800", 9.89e14),
    ("B200", 2.25e15),
    ("A100", 3.12e14),
    ("L40S", 3.62e14),
    ("L40", 1.81e14),
    ("RTX 4090", 1.65e14),
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

    @staticmethod
    def named(name: str) -> Device:
        """Returns a chip by its short name. Raises OptionError with the names that are known."""
        found = NAMED.get(name.lower())
        if found is None:
            raise OptionError(f"no device is called {name!r}; known are {', '.join(NAMED)}")
        return found

    @property
    def rate(self) -> float:
        """Multiplications and additions a second of dense bfloat16 products, by the data sheet."""
        return next((rate for part, rate in RATES if part in self.name), RATES_UNKNOWN)


# NVIDIA H100 80GB HBM3, on which every measurement in benchmarks/ was made.
H100 = Device("NVIDIA H100 80GB HBM3", 132, 3.35e12, 233472, 232448, 65536, 2.85)
RATES_UNKNOWN = 9.89e14

# For predictions where no such chip is at hand: data sheets, with the time between kernels of the H100.
NAMED = {
    "h100": H100,
    "h200": replace(H100, name="NVIDIA H200", bandwidth=4.8e12),
    "b200": replace(H100, name="NVIDIA B200", sms=148, bandwidth=8.0e12),
    "a100": replace(
        H100,
        name="NVIDIA A100-SXM4-80GB",
        sms=108,
        bandwidth=2.04e12,
        shared=167936,
        program_shared=166912,
    ),
}


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
