"""Tracing each distinct call once: a deep model makes the same calls in every layer.

Tracing one torch call costs about half a millisecond, most of it in dispatch. What a call becomes is decided
by its target, its arguments that are no tensors, the metadata of those that are, and the grad mode. A call
that agrees in all of these with an earlier one is written down again from what the earlier one became.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._C import DisableTorchFunction, DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.fx import Interpreter, Node, Proxy
from torch.fx.experimental.proxy_tensor import (
    _ProxyTensor,
    disable_proxy_modes_tracing,
    extract_val,
    get_proxy_mode,
    get_proxy_slot,
    set_proxy_slot,
    track_tensor,
)
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import map_arg
from torch.fx.proxy import _COPY_META_FIELDS
from torch.fx.traceback import get_current_meta
from torch.utils._pytree import tree_leaves

__all__ = ["Replaying"]

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_CARRIED = ("stack_trace", *_COPY_META_FIELDS)  # what a tracer gives each node of where it comes from
_SAME = ("tensor_meta", "original_aten")
_HIDDEN = DispatchKeySet(DispatchKey.PreDispatch)

Key = tuple[Any, ...]
Storage = torch.UntypedStorage


class _NotReplayableError(Exception):
    """This call depends on more than a key can say."""


@dataclass(frozen=True, slots=True)
class _Value:
    """One tensor that a call made: what it looks like, and whose storage it lives in.

    `storage` counts the storages of the call: first the distinct ones of its arguments, then new ones.
    """

    like: FakeTensor
    storage: int
    is_new: bool


@dataclass(frozen=True, slots=True)
class _Step:
    """One node that a call became. Nodes among `args` are the earlier nodes themselves."""

    node: Node
    values: _Value | tuple[_Value, ...]


@dataclass(frozen=True, slots=True)
class _Recording:
    """What a call became: steps, the nodes of its tensor arguments, and its result.

    `result` is a tree of positions: those below zero count arguments from the end, the others steps.
    `renamed` are the arguments that a step returned as they were (`x.contiguous()`): whoever reads them next
    reads that step. `symbolic` tells whether a size of a tensor is no number.
    """

    arguments: tuple[Node, ...]
    steps: tuple[_Step, ...]
    result: Any
    renamed: tuple[tuple[int, int], ...]
    symbolic: bool


class Replaying(Interpreter):
    """Runs a graph under `make_fx`; calls made before are not dispatched again.

    What is written is what dispatch would have written: same nodes, same metadata but for what only a
    backward pass reads, same sharing of storage.
    Left to dispatch: calls that write, that make numbers instead of tensors, that read constants, and
    whatever has sizes or arguments that a key cannot hold.
    """

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._recordings: dict[Key, _Recording | None] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs or replays a call of a function."""
        return self._call(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs or replays a call of a tensor's method."""
        return self._call(super().call_method, target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a call of a submodule."""
        return _dispatch(super().call_module, target, args, kwargs)

    def _call(self, run: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mode = get_proxy_mode()
        if mode is None or isinstance(target, torch._ops.HigherOrderOperator):
            return _dispatch(run, target, args, kwargs)
        tracer: Any = mode.tracer
        tensors: list[FakeTensor] = []
        try:
            with DisableTorchFunction():
                seen = _key((args, kwargs), tensors)
                storages = [t.untyped_storage() for t in tensors]
                key = (target, torch.is_grad_enabled(), seen, _sharing(storages))
        except _NotReplayableError:
            return _dispatch(run, target, args, kwargs)
        known = self._recordings.get(key, _UNKNOWN)
        if known is None:
            return _dispatch(run, target, args, kwargs)
        proxies = [get_proxy_slot(t, tracer, None) for t in tensors]
        if not tensors or any(p is None or p.constant is not None for p in proxies):
            return _dispatch(run, target, args, kwargs)
        nodes = [p.proxy.node for p in proxies if p is not None]
        if isinstance(known, _Recording):
            # Without the mode, as an op's own computation: arithmetic on sizes is not written down.
            quiet = disable_proxy_modes_tracing() if known.symbolic else nullcontext()
            with DisableTorchFunction(), quiet:
                return _replay(known, tracer, tensors, storages, nodes)
        last = next(iter(reversed(tracer.graph.nodes)))
        result = _dispatch(run, target, args, kwargs)
        try:
            with DisableTorchFunction(), disable_proxy_modes_tracing():
                self._recordings[key] = _record(tracer, last, tensors, storages, nodes, result)
        except _NotReplayableError:
            self._recordings[key] = None
        return result


_UNKNOWN: Any = object()


def _dispatch(run: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a call, which may change the metadata of its arguments in place.

    A replayed node holds the very tensor that later calls get; before the first call that could change it,
    the node gets a copy of its own.
    """
    mode = get_proxy_mode()
    if mode is None:
        return run(target, args, kwargs)
    tracer: Any = mode.tracer
    with DisableTorchFunction(), disable_proxy_modes_tracing():
        for value in tree_leaves((args, kwargs)):
            slot = get_proxy_slot(value, tracer, None) if type(value) is FakeTensor else None
            if slot is not None and slot.proxy.node.meta.get("val") is value:
                slot.proxy.node.meta["val"] = extract_val(value)
    return run(target, args, kwargs)


def _key(value: Any, tensors: list[FakeTensor]) -> Any:
    """Returns what a call sees of an argument, and collects tensors in order. Raises _NotReplayableError."""
    kind = type(value)
    if kind is FakeTensor:
        # The same tensor twice is not the same call as two tensors that look alike.
        place = next((i for i, t in enumerate(tensors) if t is value), len(tensors))
        if place == len(tensors):
            tensors.append(value)
        return (place, _metadata(value))
    if kind in (tuple, list, immutable_list, torch.Size):
        return (kind, *(_key(v, tensors) for v in value))
    if kind in (dict, immutable_dict):
        return (kind, *((name, _key(v, tensors)) for name, v in value.items()))
    if kind is slice:
        return (kind, *(_key(v, tensors) for v in (value.start, value.stop, value.step)))
    if kind is SymInt:
        return (kind, _size(value))
    if kind in _PLAIN or value is Ellipsis:
        # By text: 0.0 is not -0.0, and NaN is NaN.
        return (kind, repr(value) if kind is float else value)
    raise _NotReplayableError


def _distinct(storages: list[Storage]) -> dict[int, Storage]:
    """Returns the distinct storages by identity, in order."""
    return {storage._cdata: storage for storage in storages}


def _sharing(storages: list[Storage]) -> tuple[int, ...]:
    """Returns which of the distinct storages each tensor lives in: two views of one are not two tensors."""
    order = {identity: i for i, identity in enumerate(_distinct(storages))}
    return tuple(order[storage._cdata] for storage in storages)


def _metadata(x: FakeTensor) -> tuple[Any, ...]:
    if x.constant is not None or x.layout is not torch.strided or x.is_quantized:
        raise _NotReplayableError
    sizes: tuple[Any, ...] = (*x.shape, *x.stride(), x.storage_offset())
    if x._has_symbolic_sizes_strides:
        sizes = tuple(map(_size, sizes))
    return (x.dtype, x.device, sizes, x.requires_grad, x.is_conj(), x.is_neg(), x.is_inference())


def _size(n: Any) -> Any:
    if type(n) is int:
        return n
    if free_unbacked_symbols(n):
        raise _NotReplayableError
    return n.node.expr


def _record(
    tracer: Any,
    last: Node,
    tensors: list[FakeTensor],
    storages: list[Storage],
    arguments: list[Node],
    result: Any,
) -> _Recording:
    """Returns what the nodes after `last` are. Raises _NotReplayableError."""
    order = {identity: i for i, identity in enumerate(_distinct(storages))}
    steps: list[_Step] = []
    node = last.next
    while node is not tracer.graph._root:
        steps.append(_Step(node, _values(node, order)))
        node = node.next
    places = {step.node: i for i, step in enumerate(steps)}
    places |= {n: i - len(arguments) for i, n in enumerate(arguments)}
    renamed = []
    for i, (tensor, before) in enumerate(zip(tensors, arguments, strict=True)):
        now = get_proxy_slot(tensor, tracer)
        if now.constant is not None:
            raise _NotReplayableError
        if now.proxy.node is not before:
            renamed.append((i, places[now.proxy.node]))
    found = _places(result, tracer, tensors, places)
    made = [step.node.meta["val"] for step in steps]
    symbolic = any(t._has_symbolic_sizes_strides for t in (*tensors, *tree_leaves(made)))
    return _Recording(tuple(arguments), tuple(steps), found, tuple(renamed), symbolic)


def _values(node: Node, storages: dict[int, int]) -> _Value | tuple[_Value, ...]:
    target = node.target
    writes = not isinstance(target, OpOverload) or target._schema.is_mutable
    if node.op != "call_function" or (writes and target is not operator.getitem):
        raise _NotReplayableError
    value = node.meta.get("val")
    if isinstance(value, tuple | list):
        return tuple(_value(v, storages) for v in value)
    return _value(value, storages)


def _value(value: Any, storages: dict[int, int]) -> _Value:
    if type(value) is not FakeTensor or value.requires_grad:
        raise _NotReplayableError
    _metadata(value)
    identity = value.untyped_storage()._cdata
    is_new = identity not in storages
    return _Value(value, storages.setdefault(identity, len(storages)), is_new)


def _places(result: Any, tracer: Any, tensors: list[FakeTensor], places: dict[Node, int]) -> Any:
    if type(result) in (tuple, list):
        return type(result)(_places(r, tracer, tensors, places) for r in result)
    if not isinstance(result, Tensor):
        raise _NotReplayableError
    for i, tensor in enumerate(tensors):
        if result is tensor:
            return i - len(tensors)
    slot = get_proxy_slot(result, tracer, None)
    if slot is None or slot.constant is not None or places.get(slot.proxy.node, -1) < 0:
        raise _NotReplayableError
    return places[slot.proxy.node]


def _replay(
    known: _Recording, tracer: Any, tensors: list[FakeTensor], storages: list[Storage], nodes: list[Node]
) -> Any:
    written = dict(zip(known.arguments, nodes, strict=True))
    current = get_current_meta()
    carried = {field: current[field] for field in _CARRIED if field in current}
    storages = list(_distinct(storages).values())
    made = []
    for step in known.steps:
        old = step.node
        args = map_arg(old.args, lambda n: written.get(n, n))
        kwargs = map_arg(old.kwargs, lambda n: written.get(n, n))
        name = tracer.graph._target_to_str(_name(old.target))
        node = tracer.graph.create_node("call_function", old.target, args, kwargs, name)
        node.meta.update(carried)
        if isinstance(step.values, tuple):
            value: Any = type(old.meta["val"])(_fresh(v, storages) for v in step.values)
        else:
            value = _fresh(step.values, storages)
        if isinstance(value, FakeTensor):
            track_tensor(value, Proxy(node, tracer), constant=None, tracer=tracer)
        node.meta["val"] = value
        node.meta.update((field, old.meta[field]) for field in _SAME if field in old.meta)
        written[old] = node
        made.append(node)
    for i, place in known.renamed:
        set_proxy_slot(tensors[i], tracer, _ProxyTensor(Proxy(made[place], tracer), None))
    return _result(known.result, tracer, tensors, made)


def _name(target: Any) -> str:
    return str(target.overloadpacket.__name__) if isinstance(target, OpOverload) else target.__name__


def _result(place: Any, tracer: Any, tensors: list[FakeTensor], made: list[Node]) -> Any:
    if type(place) in (tuple, list):
        return type(place)(_result(p, tracer, tensors, made) for p in place)
    if place < 0:
        return tensors[place]
    return made[place].meta["val"]


def _fresh(value: _Value, storages: list[Any]) -> FakeTensor:
    """Returns a tensor that looks like one recorded, in storage of its own or in that of `storages`."""
    like = value.like
    mode: FakeTensorMode = like.fake_mode
    shape, stride, offset = like.shape, like.stride(), like.storage_offset()
    with _ExcludeDispatchKeyGuard(_HIDDEN), in_kernel_invocation_manager(mode):
        made = torch.empty_strided(shape, stride, dtype=like.dtype, device="meta")
        if value.is_new:
            storages.append(made.untyped_storage())
        else:
            made.set_(storages[value.storage], offset, shape, stride)
    return FakeTensor(mode, made, like.device)
