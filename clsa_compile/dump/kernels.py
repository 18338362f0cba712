"""Kernels of a lowered graph: the source of each, and what it takes when it is compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from clsa_compile.capture.launches import Launch, launch_of
from clsa_compile.dump.folder import Folder
from clsa_compile.ir.captured import Captured

__all__ = ["write_kernels"]

# What kernels are compiled for where no device says otherwise.
_ASSUMED = (9, 0)


def write_kernels(folder: Folder, captured: Captured) -> None:
    """Writes kernels/<name>_<hash>.py for each kernel, and kernels/statistics.json."""
    launches = [launch for n in captured.graph.nodes if (launch := launch_of(n)) and launch.generated]
    if not launches:
        return
    for launch in {launch.name: launch for launch in launches}.values():
        folder.write(f"kernels/{launch.name}.py", launch.file.read_text(encoding="utf-8"))
    folder.write_json("kernels/statistics.json", _statistics(launches))


def _statistics(launches: list[Launch]) -> list[dict[str, Any]]:
    from clsa_compile.kernels import offline
    from clsa_compile.kernels.statistics import statistics

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else _ASSUMED
    distinct: dict[Any, tuple[str, Any]] = {}
    for launch in launches:
        given = {name: _value(argument) for name, argument in launch.arguments.items()}
        made = offline.Launch(launch.kernel, {**given, **launch.options})
        distinct.setdefault(made.key, (launch.name, made))
    found = []
    for name, made in distinct.values():
        try:
            found.append({"kernel": name, **statistics(made, major * 10 + minor)})
        except Exception as error:  # a dump says what it can; the graph is not touched by it
            found.append({"kernel": name, "error": f"{type(error).__name__}: {error}"})
    return found


def _value(argument: Any) -> Any:
    """Returns a tensor without storage, or a number; a size that is not known has its example value."""
    value = argument.meta["val"] if isinstance(argument, Node) else argument
    return int(value.node.hint or 1) if isinstance(value, torch.SymInt) else value
