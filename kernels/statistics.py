"""Statistics of one compiled launch: registers, spills, shared memory, and instructions by kind."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

from clsa_compile.kernels.offline import Launch, compile_for, usage_of

__all__ = ["statistics"]

_PTX = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.]*)[^;:]*;", re.MULTILINE)
_SASS = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SHOWN = 24


def statistics(launch: Launch, capability: int) -> dict[str, Any]:
    """Compiles a launch for sm_<capability>, without a GPU, and counts what it takes."""
    began = time.perf_counter()
    compiled = compile_for(launch, capability)
    usage = usage_of(compiled, time.perf_counter() - began)
    # The body alone: what comes before declares registers and parameters.
    body = compiled.asm["ptx"].partition("{")[2]
    return {
        "sm": capability,
        "registers": usage.registers,
        "stack": usage.stack,
        "shared": usage.shared,
        "num_warps": launch.arguments["num_warps"],
        "num_stages": launch.arguments["num_stages"],
        "ptx": _counts(name for name in _PTX.findall(body)),
        "sass": _counts(_SASS.findall(_disassembled(compiled.asm["cubin"]))),
    }


def _counts(names: Iterable[str]) -> dict[str, int]:
    """Returns how many instructions there are, and of which kind the most."""
    kinds = Counter(".".join(name.split(".")[:2]) for name in names)
    return {"all": sum(kinds.values()), **dict(kinds.most_common(_SHOWN))}


def _disassembled(cubin: bytes) -> str:
    """Returns the machine code as text; "" where Triton came without a disassembler."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.is_file():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=False)
    return done.stdout
