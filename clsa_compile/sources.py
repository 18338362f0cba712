"""Sources: the kernels that a graph would launch on CUDA, as text, found without a GPU.

A copy of a plan is carried out: the graph is rewritten and lowered as for CUDA, with launches that are noted
down instead of traced. Nothing is compiled, and the graph is of no use afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clsa_compile.dispatch import kernels
from clsa_compile.errors import ClsaError
from clsa_compile.ir.captured import Captured
from clsa_compile.ir.ops import contract_op
from clsa_compile.ir.variants import Facts, Support, Variant
from clsa_compile.passes.lower import Choice
from clsa_compile.passes.match import module_path
from clsa_compile.passes.pipeline import Decision, carry_out

__all__ = ["Call", "Kernel", "Sources", "sources_of"]


@dataclass(frozen=True, slots=True)
class Call:
    """Contract ops that launch a kernel alike: "attention.decode" from the modules `paths`.

    constants: what the kernel is specialised on at this call, block sizes and warps among them.
    """

    variant: str
    paths: tuple[str, ...]
    constants: Mapping[str, int | float | bool]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One generated kernel: its file's name, which has a hash of its text, the text, and who calls it."""

    name: str
    text: str
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Sources:
    """The generated kernels of a graph. `others`: what runs without any, such as torch's own attention.

    device: the chip that block sizes were chosen for. problem: why nothing is known, "" where something is.
    """

    device: str = ""
    kernels: tuple[Kernel, ...] = ()
    others: tuple[Call, ...] = ()
    problem: str = ""


def sources_of(captured: Captured, decision: Decision) -> Sources:
    """Returns the kernels of a graph that was decided on; of what fails, the reason. Spoils the graph."""
    if all(entry.action == "left" for entry in decision.plan.sites):
        return Sources(problem="no attention is rewritten")
    try:
        return _found(captured, decision)
    except ClsaError as error:
        return Sources(problem=str(error))
    except Exception as error:  # a report says what it can; what it is about is not touched by it
        return Sources(problem=f"{type(error).__name__}: {error}".partition("\n")[0])


def _found(captured: Captured, decision: Decision) -> Sources:
    variants = kernels()  # raises MissingTritonError, before what imports Triton
    from clsa_compile.kernels.device import Device
    from clsa_compile.kernels.offline import Recorder

    device = next(
        value.device for n in captured.graph.nodes if isinstance(value := n.meta.get("val"), torch.Tensor)
    )
    paths: dict[str, str] = {}
    recorder = Recorder()
    starts: list[int] = []

    def note(stage: str, graph: Captured) -> None:
        if stage == "rewritten":
            ops = [node for node in graph.graph.nodes if contract_op(node.target)]
            paths.update((node.name, module_path(node)) for node in ops)

    noted = tuple(_for_cuda(variant, lambda: starts.append(len(recorder.launches))) for variant in variants)
    _, choices = carry_out(captured, decision, noted, recorder, note)
    launched = _launched(choices, starts, recorder.launches)
    return _sorted(choices, launched, paths, Device.of(device).name)


def _for_cuda(variant: Variant, begin: Any) -> Variant:
    """Returns a variant that is chosen as on CUDA, and that calls `begin` before it launches."""

    def supports(facts: Facts) -> Support:
        return variant.supports(replace(facts, device="cuda"))

    def launch(*args: Any, **settings: Any) -> Any:
        begin()
        return variant.launch(*args, **settings)

    return replace(variant, supports=supports, launch=launch)


def _launched(choices: Sequence[Choice], starts: Sequence[int], launches: Sequence[Any]) -> dict[str, Any]:
    """Returns the launches of each node that was lowered first of its like."""
    firsts = [c.node for c in choices if c.like == c.node and c.variant != "reference"]
    ends = [*starts[1:], len(launches)]
    return {node: launches[start:end] for node, start, end in zip(firsts, starts, ends, strict=True)}


def _sorted(
    choices: Sequence[Choice], launched: Mapping[str, Any], paths: Mapping[str, str], device: str
) -> Sources:
    """Groups launches by kernel, and calls that are alike under it."""
    alike: dict[str, list[Choice]] = {}
    for choice in choices:
        alike.setdefault(choice.like, []).append(choice)
    found: dict[Path, list[Call]] = {}
    others = []
    for first, same in alike.items():
        name = f"{same[0].op}.{same[0].variant}"
        modules = tuple(dict.fromkeys(paths[choice.node] for choice in same))
        if not launched.get(first):
            others.append(Call(name, modules, {}))
        for launch in launched.get(first, ()):
            file = Path(inspect.getsourcefile(launch.kernel.fn) or "")
            found.setdefault(file, []).append(Call(name, modules, _constants(launch)))
    texts = tuple(
        Kernel(file.stem, file.read_text(encoding="utf-8"), tuple(_merged(calls)))
        for file, calls in found.items()
    )
    return Sources(device, texts, tuple(_merged(others)))


def _merged(calls: Sequence[Call]) -> list[Call]:
    """Merges calls that differ in nothing but the modules."""
    found: dict[Any, Call] = {}
    for call in calls:
        key = (call.variant, tuple(call.constants.items()))
        before = found.get(key, replace(call, paths=()))
        found[key] = replace(call, paths=tuple(dict.fromkeys((*before.paths, *call.paths))))
    return list(found.values())


def _constants(launch: Any) -> dict[str, int | float | bool]:
    """Returns the constants of one launch by name, strides left out, warps and stages last."""
    fixed = [p.name for p in launch.kernel.params if p.is_constexpr and p.name.isupper()]
    wanted = [*fixed, *(name for name in launch.arguments if name.startswith("num_"))]
    given = {name: launch.arguments[name] for name in wanted if name in launch.arguments}
    return {name: value for name, value in given.items() if isinstance(value, int | float)}
