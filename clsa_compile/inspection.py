"""inspect(): the pipeline up to the plan, as a report; nothing is compiled and no cache advances."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from clsa_compile.backend import examine
from clsa_compile.capture.dynamo import GraphBreak
from clsa_compile.config import Options
from clsa_compile.errors import OptionError
from clsa_compile.ir.plan import Plan
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.layers import layers_of
from clsa_compile.pace import roomy, uncollected
from clsa_compile.prediction import LENGTHS, device_of, predict
from clsa_compile.report import Details, Report
from clsa_compile.sources import sources_of

__all__ = ["Report", "inspect"]


def inspect(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    lengths: Sequence[int] = LENGTHS,
    device: str | None = None,
    **kwargs: Any,
) -> Report:
    """Captures `model(*args, **kwargs)` and reports what `backend="clsa"` would do with it.

    The model does not run: weights may be on the meta device or fake, and caches among the arguments stay
    as they are. Capturing is done under `torch.no_grad()`. The report predicts bytes, flops and time for the
    chip `device` ("h100", "h200", "b200", "a100"; the one at hand, or an H100, where nothing is said) and
    shows them for `lengths`, numbers of tokens in the cache. Raises OptionError for what cannot be.
    """
    chosen = Options.read(options)
    chip = device_of(device)
    shown = _checked(lengths)
    seen = _Seen(chosen, chip, shown)
    try:
        _capture(seen.stop, True, model, args, kwargs)
    except _Stop:
        return seen.report()
    except GraphBreak:
        # Graph breaks: go through all graphs with made-up results instead of stopping at the first.
        seen = _Seen(chosen, chip, shown)
        _capture(seen.imagine, False, model, args, kwargs)
    return seen.report()


def _checked(lengths: Sequence[int]) -> tuple[int, ...]:
    good = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in lengths)
    if not lengths or not good:
        raise OptionError(f"lengths are {lengths!r}; give numbers of tokens, such as {LENGTHS}")
    return tuple(sorted(set(lengths)))


class _Stop(BaseException):
    """Ends a captured call before it has any effect."""


class _Seen:
    """A backend that only looks."""

    def __init__(self, options: Options, device: Any, lengths: tuple[int, ...]) -> None:
        self._options = options
        self._device = device
        self._lengths = lengths
        self._plans: list[Plan] = []
        self._details: list[Details] = []
        self._left: list[str] = []

    def report(self) -> Report:
        share = self._options.share
        sharing = share if isinstance(share, SharingPlan) else None
        return Report(tuple(self._plans), tuple(self._left), tuple(self._details), self._lengths, sharing)

    def _look(self, gm: GraphModule, inputs: Sequence[Any]) -> None:
        result = examine(gm, inputs, self._options)
        if isinstance(result, str):
            self._left.append(result)
            return
        captured, decision = result
        self._plans.append(decision.plan)
        prediction = predict(captured, decision, self._device)
        layers = layers_of(captured, decision)
        # Last: it spoils the graph.
        self._details.append(Details(layers, prediction, sources_of(captured, decision)))

    def stop(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        self._look(gm, inputs)
        raise _Stop

    def imagine(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        self._look(gm, inputs)
        outputs = next(n for n in gm.graph.nodes if n.op == "output").args[0]
        values = [n.meta.get("example_value") if isinstance(n, torch.fx.Node) else n for n in outputs]
        return lambda *_: [_imagined(v) for v in values]


def _imagined(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros([int(s) for s in value.shape], dtype=value.dtype, device=value.device)
    return int(value) if isinstance(value, torch.SymInt) else value


class _CopyTensors(TorchFunctionMode):
    """Makes copy.deepcopy treat tensors with a function of its own."""

    def __init__(self, treat: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._treat = treat

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return self._treat(args[0])
        return func(*args, **(kwargs or {}))


@roomy
def _capture(backend: Any, fullgraph: bool, model: Any, args: Any, kwargs: Any) -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo caches by code object: a code of its own leaves the model's cache alone.
    fresh = types.FunctionType(
        call.__code__.replace(co_name="inspected"), globals(), "inspected", None, call.__closure__
    )
    model, treat = _off_meta(model)
    # Objects such as caches are copied, their tensors are not: what Python does to them is undone.
    with _CopyTensors(treat):
        args, kwargs = copy.deepcopy((args, kwargs))
    if treat is not _as_it_is:
        _devices_off_meta([*args, *kwargs.values()])
    with torch.no_grad(), uncollected():
        torch.compile(fresh, backend=backend, fullgraph=fullgraph)(*args, **kwargs)


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _devices_off_meta(values: Sequence[Any]) -> None:
    """Makes copied objects, such as caches, that remember the meta device remember the CPU."""
    seen: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, list | tuple):
            stack += value
        elif isinstance(value, dict):
            stack += value.values()
        elif not isinstance(value, torch.Tensor | torch.nn.Module | type) and hasattr(value, "__dict__"):
            own = vars(value)
            remembered = [n for n, v in own.items() if isinstance(v, torch.device) and v.type == "meta"]
            own.update(dict.fromkeys(remembered, torch.device("cpu")))
            stack += own.values()


def _off_meta(model: Any) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
    """Returns a model with fake weights on the CPU in place of meta ones, and what does that to a tensor.

    Tensors that a model makes on the meta device while it is captured, as a growing cache does, are refused
    by Dynamo; on a fake CPU they are not.
    """
    if not isinstance(model, torch.nn.Module) or not any(p.is_meta for p in model.parameters()):
        return model, _as_it_is
    mode = FakeTensorMode()
    made: dict[int, torch.Tensor] = {}

    def fake(x: torch.Tensor) -> torch.Tensor:
        if not x.is_meta:
            return x
        if id(x) not in made:
            with mode:
                made[id(x)] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
        return made[id(x)]

    copied = copy.deepcopy(model)
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(fake(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fake(buffer)
    return copied, fake
