"""Weights: the tensors that programs need, each once, by the names that they have in the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clsa_compile.errors import PackageError
from clsa_compile.package.manifest import TensorInfo, dtype_of

__all__ = ["Collected", "Weights", "read"]

# Where weights lie: a safetensors file, a folder of them, several of either, or tensors by name.
Weights = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | Mapping[str, Tensor]


class Collected:
    """Tensors of several programs, those that are one tensor once."""

    def __init__(self, outside: frozenset[str] | None = None) -> None:
        """`outside` are the names of the tensors that are left out of the package; None leaves out none."""
        self._outside = outside or frozenset()
        self._keys: dict[Any, str] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.inside: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> str:
        """Takes a tensor under a name of the model's; returns its key."""
        identity = _identity(value)
        if identity in self._keys:
            self.name(name, value)
            return self._keys[identity]
        # Two programs may call different constants alike.
        key = name if name not in self.infos else f"{name}#{len(self.infos)}"
        self._keys[identity] = key
        dtype = str(value.dtype).removeprefix("torch.")
        record = None if name in self._outside else str(len(self.inside))
        self.infos[key] = TensorInfo(dtype, tuple(value.shape), tuple(value.stride()), (name,), record)
        if record is not None:
            self.inside[record] = value
        return key

    def name(self, name: str, value: Tensor) -> None:
        """Notes another name of a tensor, where it was taken: a checkpoint may know it by that one."""
        key = self._keys.get(_identity(value))
        if key is not None and name not in self.infos[key].names:
            self.infos[key] = replace(self.infos[key], names=(*self.infos[key].names, name))


def _identity(value: Tensor) -> Any:
    return (value.data_ptr() or id(value), value.dtype, value.shape, value.stride())


def read(weights: Weights, wanted: Mapping[str, TensorInfo], device: torch.device) -> dict[str, Tensor]:
    """Returns tensors by key from what a user gives, on a device, laid out as programs want them.

    Raises PackageError where one is missing, or has another shape or dtype.
    """
    found = weights if isinstance(weights, Mapping) else _Files(_files(weights), device)
    made = {}
    for key, info in wanted.items():
        name = next((name for name in info.names if name in found), None)
        if name is None:
            missing = sum(not any(n in found for n in entry.names) for entry in wanted.values())
            raise PackageError(
                f"the weights lack {missing} of the {len(wanted)} tensors that the package needs, as {key!r}"
            )
        made[key] = _fitting(name, found[name], info, device)
    return made


def _fitting(name: str, value: Tensor, info: TensorInfo, device: torch.device) -> Tensor:
    wanted = (info.dtype, info.sizes)
    given = (str(value.dtype).removeprefix("torch."), tuple(value.shape))
    if wanted != given:
        raise PackageError(
            f"the weight {name!r} is {given[0]}{list(given[1])}; the package was made for "
            f"{wanted[0]}{list(wanted[1])}, and another needs a package of its own"
        )
    value = value.detach().to(device)
    if value.stride() == info.strides:
        return value
    laid = torch.empty_strided(info.sizes, info.strides, dtype=dtype_of(info.dtype), device=device)
    return laid.copy_(value)


class _Files:
    """Tensors of safetensors files, by name; one is read when it is asked for."""

    def __init__(self, files: list[Path], device: torch.device) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise PackageError("reading weights needs safetensors: pip install clsa[export]") from error
        self._opened: dict[str, Any] = {}
        for path in files:
            try:
                opened: Any = safe_open(path, framework="pt", device=_place(device))
            except Exception as error:  # safetensors has an exception of its own for a damaged file
                raise PackageError(f"the weights {os.fspath(path)!r} cannot be read: {error}") from error
            self._opened.update(dict.fromkeys(opened.keys(), opened))

    def __contains__(self, name: str) -> bool:
        return name in self._opened

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._opened[name].get_tensor(name)
        return tensor


def _place(device: torch.device) -> str:
    """Returns a device as safetensors names it."""
    return str(device) if device.type == "cpu" or device.index is not None else f"{device.type}:0"


def _files(weights: Any) -> list[Path]:
    given = [weights] if isinstance(weights, str | os.PathLike) else list(weights)
    found: list[Path] = []
    for path in map(Path, given):
        found += sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not found:
        raise PackageError(f"there is no safetensors file in {weights!r}")
    return found
