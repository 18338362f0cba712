"""Machines: what native code was made for, and why it may not run here."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "obstacle", "release"]

# What compilers use of a processor, by the names that Linux gives it; other flags say nothing about code.
# fmt: off
_USED = (
    "sse", "ssse3", "avx", "fma", "f16c", "bmi", "abm", "popcnt", "movbe", "adx", "aes", "vaes", "pclmul",
    "vpclmul", "gfni", "sha_ni", "amx", "asimd", "sve",
)
# fmt: on


def describe(device: torch.device) -> dict[str, Any]:
    """Returns what code compiled here for a device depends on, as plain data."""
    made: dict[str, Any] = {
        "torch": str(torch.__version__),
        "platform": sys.platform,
        "machine": platform.machine(),
        "processor": _processor(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        made["cuda"] = str(torch.version.cuda)
        made["capability"] = [properties.major, properties.minor]
        made["name"] = properties.name
    return made


def obstacle(made: Mapping[str, Any], device: torch.device) -> str:
    """Returns why code that was made so cannot run on a device here, and what to do; "" where it can."""
    if device.type != made["device"]:
        return f"it was compiled for {made['device']}; export the model again on {device}"
    if release(made["torch"]) != release(str(torch.__version__)):
        return (
            f"it was compiled under torch {made['torch']}, and this is torch {torch.__version__}: native "
            "code of one release is not run under another; export the model again, or install that torch"
        )
    here = (sys.platform, platform.machine())
    if (made["platform"], made["machine"]) != here:
        return f"it was compiled for {made['platform']} on {made['machine']}, and this is {' on '.join(here)}"
    if lacking := sorted(set(made["processor"]) - set(_processor())):
        return f"it was compiled for a processor with {', '.join(lacking[:4])}, which this one has not"
    return "" if device.type != "cuda" else _gpu_obstacle(made, device)


def release(version: str) -> str:
    """Returns the release of a version: 2.11 of 2.11.0+cu130."""
    return ".".join(version.partition("+")[0].split(".")[:2])


def _gpu_obstacle(made: Mapping[str, Any], device: torch.device) -> str:
    if not torch.cuda.is_available():
        return "it was compiled for cuda, and there is no CUDA device here"
    properties = torch.cuda.get_device_properties(device)
    major, minor = made["capability"]
    # Machine code runs on its own generation only, from its own revision on.
    if properties.major != major or properties.minor < minor:
        wanted, found = f"{major}.{minor}", f"{properties.major}.{properties.minor}"
        return f"its kernels are machine code for sm {wanted} ({made['name']}); {properties.name} is {found}"
    return ""


def _processor() -> list[str]:
    """Returns the processor's extensions that compiled code may use; [] where they cannot be asked for."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))),
        [],
    )
    return sorted(flag for flag in set(flags) if flag.startswith(_USED))
