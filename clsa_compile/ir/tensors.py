"""Tensors in safetensors files; those that belong to a plan, their digest, and their file beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from clsa_compile.errors import ClsaError, PlanError
from clsa_compile.ir.files import write_whole

__all__ = ["beside", "digest", "library", "placed", "read", "write"]

# By tensor, its copies by device and dtype, for as long as a compiled graph holds them.
_PLACED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256 of tensors: of names, dtypes, shapes and every bit; "" of none."""
    if not tensors:
        return ""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def beside(path: str | os.PathLike[str], identity: str) -> Path:
    """Returns where the tensors of a plan lie; another digest is another file, so no plan loses its own."""
    return Path(path).with_suffix(f".{identity[:12]}.safetensors")


def library(missing: ClsaError | None = None) -> Any:
    """Returns the package safetensors. Raises `missing`, by default what is said of plans, without it."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise missing or PlanError(
            "the weights of a plan need safetensors: pip install clsa[search]"
        ) from error
    return safetensors


def write(path: Path, tensors: Mapping[str, Tensor], safetensors: Any = None) -> None:
    """Writes tensors, whole or not at all, by what `library` returned.

    Raises OSError, and PlanError where neither is there.
    """
    module = safetensors or library()
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        write_whole(path, lambda partial: module.torch.save_file(content, partial))
    except module.SafetensorError as error:  # a full disk among others
        raise OSError(str(error)) from error


def read(path: Path, identity: str) -> dict[str, Tensor]:
    """Returns the tensors of a file. Raises PlanError where it is missing, cut off, or not of that digest."""
    return dict(_read(path, identity))


@lru_cache(maxsize=2)  # each graph of a model asks for them
def _read(path: Path, identity: str) -> dict[str, Tensor]:
    load_file = library().torch.load_file
    try:
        found: dict[str, Tensor] = load_file(path)
    except Exception as error:  # safetensors has an error of its own for each way to be broken
        raise PlanError(
            f"its weights cannot be read from {os.fspath(path)!r}: {error}; copy that file along with it"
        ) from error
    if digest(found) != identity:
        raise PlanError(f"the weights in {os.fspath(path)!r} are not those that the plan was made with")
    return found


def placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns a tensor on a device in a dtype; the same one again while somebody holds it."""
    copies = _PLACED.setdefault(tensor, {})
    kept = copies.get((device, dtype))
    found = None if kept is None else kept()
    if found is None:
        found = tensor.detach().to(device, dtype, copy=True)
        copies[device, dtype] = TensorWeakRef(found)
    return found
