"""A graph as Python that can be read, compared and, before it is lowered, run.

Node names are torch's own, which depend on the graph alone. Nothing else that differs between two processes
is written: no addresses, no absolute paths, no numbers of kernels in torch's tables.
"""

from __future__ import annotations

import base64
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node

from clsa_compile.capture.launches import launch_of
from clsa_compile.dump.source import line_of
from clsa_compile.passes.match import module_path

__all__ = ["HEADER", "code_of", "describe"]

HEADER = "import math\nimport operator\n\nimport torch\n"
# Tables that passes made are written down; larger ones are the model's own data.
_SPELLED = 65536
_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
_INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.eq: "==", operator.ne: "!=", operator.lt: "<",
    operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip


def code_of(module: GraphModule, derived: Mapping[str, str] | None = None) -> str:
    """Returns a module class that does what the graph does; each line says what its value looks like.

    `derived` are inputs, by name, that are computed from other inputs instead of being given.
    """
    return "\n".join(_class(module, "Graph", derived or {})) + "\n"


def describe(value: Any) -> str:
    """Returns dtype and sizes of a tensor, its strides where it is not contiguous, and a device with memory.

    Sizes are not compared: that would add guards.
    """
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    if not isinstance(value, Tensor):
        return type(value).__name__ if value is None else str(value)
    text = f"{_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if value.layout is torch.strided and not _is_contiguous(value):
        text += f" strides ({', '.join(map(str, value.stride()))})"
    return text if value.device.type == "cpu" else f"{text} {value.device}"


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    letters = name.rstrip("0123456789")
    return _SHORT[letters] + name[len(letters) :] if letters in _SHORT and letters != name else name


def _is_contiguous(value: Tensor) -> bool:
    wanted: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        n, step = (x.node.expr if isinstance(x, torch.SymInt) else x for x in (size, stride))
        if n != 1 and step != wanted:
            return False
        wanted = wanted * n
    return True


def _class(module: GraphModule, name: str, derived: Mapping[str, str]) -> Iterator[str]:
    yield f"class {name}(torch.nn.Module):"
    inner = [(path, child) for path, child in module.named_children() if isinstance(child, GraphModule)]
    for path, child in inner:
        yield from (f"    {line}" if line else "" for line in _class(child, _class_name(path), {}))
        yield ""
    constants = list(_constants(module))
    if inner or constants:
        yield "    def __init__(self):"
        yield "        super().__init__()"
        yield from (f"        self.{path} = self.{_class_name(path)}()" for path, _ in inner)
        yield from (f"        {line}" for line in constants)
        yield ""
    yield from (f"    {line}" if line else "" for line in _function(module.graph, derived))


def _class_name(path: str) -> str:
    return "".join(part.capitalize() for part in path.split("_"))


def _constants(module: GraphModule) -> Iterator[str]:
    names = {str(n.target): n for n in module.graph.nodes if n.op == "get_attr"}
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, Tensor):
            yield f'self.register_buffer("{name}", {_constant(value)})'


def _constant(value: Tensor) -> str:
    if value.numel() > _SPELLED or type(value) not in (Tensor, torch.nn.Parameter) or value.is_meta:
        sizes = list(map(int, value.shape))
        # Its values are not kept.
        return f"torch.zeros({sizes}, dtype={value.dtype}, device={_text(value.device)})"
    if value.numel() <= 64 and not value.is_complex():
        values = _text(value.tolist())
        return f"torch.tensor({values}, dtype={value.dtype}, device={_text(value.device)})"
    data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    packed = base64.b64encode(data).decode()
    read = f'torch.frombuffer(bytearray(__import__("base64").b64decode("{packed}")), dtype={value.dtype})'
    return f"{read}.reshape({list(value.shape)}).to({_text(value.device)})"


def _function(graph: Graph, derived: Mapping[str, str]) -> Iterator[str]:
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name not in derived]
    yield "def forward("
    yield "    self,"
    yield from (f"    {node.name},  # {describe(node.meta.get('val'))}" for node in inputs)
    yield "):"
    yield from (f"    {name} = {text}" for name, text in derived.items())
    origin = ""
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if (now := _origin(node)) and now != origin:
            origin = now
            yield f"    # {origin}"
        yield f"    {_statement(node)}"
    (output,) = (n for n in graph.nodes if n.op == "output")
    yield f"    return {_text(output.args[0])}"


def _origin(node: Node) -> str:
    path = module_path(node)
    return ", ".join(part for part in (path if path != node.name else "", line_of(node)) if part)


def _statement(node: Node) -> str:
    value = node.meta.get("val", node.meta.get("example_value"))
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}" + ("" if value is None else f"  # {describe(value)}")
    call = _call(node)
    return f"{node.name} = {call}" + ("" if value is None else f"  # {describe(value)}")


def _call(node: Node) -> str:
    launch = launch_of(node)
    if launch is not None:
        given = [f"{name}={_text(value)}" for name, value in launch.arguments.items()]
        return f"{launch.name}[{_text(launch.grid)}]({', '.join(given)})"
    args = [_text(a) for a in node.args]
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join([*args[1:], *_keywords(node)])})"
    if node.op == "call_module":
        return f"self.{node.target}({', '.join([*args, *_keywords(node)])})"
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    if node.target in _INFIX:
        return f"{args[0]} {_INFIX[node.target]} {args[1]}"
    return f"{_target(node.target)}({', '.join([*args, *_keywords(node)])})"


def _keywords(node: Node) -> Iterator[str]:
    return (f"{name}={_text(value)}" for name, value in node.kwargs.items())


def _target(target: Callable[..., Any]) -> str:
    if isinstance(target, OpOverload):
        return f"torch.ops.{target}"
    if isinstance(target, HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    module = getattr(target, "__module__", None) or "torch"
    name = getattr(target, "__name__", str(target))
    if module in ("builtins", "_operator", "math"):
        return name if module == "builtins" else f"{module.lstrip('_')}.{name}"
    # What torch makes public lies elsewhere than where it is written.
    public = next((home for home in ("torch", "torch.nn.functional") if _is_in(home, name, target)), module)
    return f"{public}.{name}"


def _is_in(home: str, name: str, target: Any) -> bool:
    place: Any = torch if home == "torch" else torch.nn.functional
    return getattr(place, name, None) is target


def _text(value: Any) -> str:
    """Returns an argument as Python."""
    if isinstance(value, Node):
        return value.name
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_text(v)}' for k, v in value.items())}}}"
    if isinstance(value, slice):
        return f"slice({_text(value.start)}, {_text(value.stop)}, {_text(value.step)})"
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, float) and not math.isfinite(value):
        return "math.nan" if math.isnan(value) else ("math.inf" if value > 0 else "-math.inf")
    return repr(value)
