"""Where a node comes from, for people: `modeling_llama.py:87 in forward: code`, the same on every machine."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from torch.fx import Node

__all__ = ["caller_of", "line_of", "short_path"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')


def short_path(path: str) -> str:
    """Returns a file relative to where Python finds modules, or to the working folder, or its name alone."""
    homes = [os.path.abspath(home or os.curdir) for home in sys.path]
    inside = [home for home in (*homes, os.getcwd()) if path.startswith(home.rstrip(os.sep) + os.sep)]
    if not inside:
        return os.path.basename(path)
    return os.path.relpath(path, max(inside, key=len))


def line_of(node: Node) -> str:
    """Returns the model's source line that a node comes from, or ""."""
    trace: Any = node.meta.get("stack_trace")
    frames = _FRAME.findall(trace or "")
    return _text(frames[-1]) if frames else ""


def caller_of(node: Node) -> str:
    """Returns the line of the innermost `forward` that calls a helper which a node comes from, or "".

    Models hand attention to functions that they share, whose lines say little.
    """
    trace: Any = node.meta.get("stack_trace")
    frames = _FRAME.findall(trace or "")
    forwards = [frame for frame in frames if frame[2] == "forward"]
    return _text(forwards[-1]) if forwards and forwards[-1] is not frames[-1] else ""


def _text(frame: tuple[str, str, str, str]) -> str:
    path, line, function, code = frame
    return f"{short_path(path)}:{line} in {function}: {code.strip()}".rstrip(": ")
