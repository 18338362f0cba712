"""A folder of MLIR: written whole or not at all, and read back as what it was."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import clsa_compile
from clsa_compile.errors import MlirError
from clsa_compile.ir.tensors import library
from clsa_compile.ir.tensors import write as write_tensors
from clsa_compile.mlir import lowering
from clsa_compile.mlir.engine import Engine
from clsa_compile.mlir.manifest import NAME, FileInfo, Manifest, ProgramFiles
from clsa_compile.mlir.program import Argument, functional

__all__ = ["FORMS", "Folder", "write"]

FORMS = ("torch", "linalg")
_WEIGHTS = "weights.safetensors"
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def write(
    programs: Mapping[str, ExportedProgram],
    path: str | os.PathLike[str],
    *,
    forms: Sequence[str] = FORMS,
    weights: bool = True,
    inner: str = "",
) -> int:
    """Writes rewritten programs, contract ops and writes in place included, into a folder; returns its bytes.

    forms: "torch" keeps contract ops as `torch.operator "torch.clsa.*"`, "linalg" decomposes them. Each
    program is a function of its own file. Weights are its leading arguments; they lie in one safetensors file
    beside, unless `weights` says that they are left out. `inner` is the attribute under which a wrapper holds
    the model: weights are named as the model names them.

    Every text is parsed again from its file, in a context of its own, before the folder takes its place. A
    folder that was written before is replaced; any other is an error. Raises MlirError, and MissingMlirError
    without torch-mlir; then nothing is written.
    """
    target = Path(path)
    _check(programs, forms, target)
    versions = {"clsa": clsa_compile.__version__, "torch_mlir": lowering.version(), "torch": _torch_version()}
    modules, found = {}, {}
    tensors = _Tensors(inner)
    for name, program in programs.items():
        modules[name], found[name] = _made(name, program, forms, tensors)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        partial.mkdir(parents=True)
        for name, texts in modules.items():
            for form, text in texts.items():
                file = partial / found[name].files[form]
                file.write_text(text, encoding="utf-8")
                _same(name, text, file)
        if weights:
            _save(partial / _WEIGHTS, tensors.found)
        infos = {file.name: _info(file) for file in sorted(partial.iterdir())}
        manifest = Manifest(versions, found, _WEIGHTS if weights else None, infos)
        (partial / NAME).write_text(manifest.to_json(), encoding="utf-8")
        size = sum(file.stat().st_size for file in partial.iterdir())
        _put(partial, target)
    except OSError as error:
        raise MlirError(f"no MLIR can be written to {os.fspath(target)!r}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return size


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that was read: `manifest` says what is in it."""

    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Folder:
        """Reads a folder's manifest, and compares every file with it. Raises MlirError."""
        folder = Path(path)
        try:
            manifest = Manifest.from_json((folder / NAME).read_text(encoding="utf-8"))
            for name, info in manifest.files.items():
                if Path(name).name != name:
                    raise MlirError(f"{NAME} names a file that is not in its folder: {name!r}")
                if _info(folder / name) != info:
                    raise MlirError(
                        f"{os.fspath(folder / name)!r} is not what was written; export the model again"
                    )
        except (OSError, UnicodeDecodeError) as error:
            raise MlirError(f"no MLIR can be read from {os.fspath(folder)!r}: {error}") from error
        return cls(folder, manifest)

    def parsed(self, program: str, form: str) -> lowering.Module:
        """Returns a program's module, verified. Raises MlirError."""
        file = self._program(program).files.get(form)
        if file is None:
            raise MlirError(f"the program {program!r} was not written in the form {form!r}")
        return lowering.parsed(program, (self.path / file).read_text(encoding="utf-8"))

    def weights(self) -> dict[str, Tensor]:
        """Returns the tensors that lie beside the programs. Raises MlirError."""
        if self.manifest.weights is None:
            raise MlirError("the weights were left out of the folder; give them as tensors by name")
        module = _safetensors()
        try:
            loaded: dict[str, Tensor] = module.torch.load_file(self.path / self.manifest.weights)
        except module.SafetensorError as error:
            raise MlirError(f"the weights of {os.fspath(self.path)!r} cannot be read: {error}") from error
        return loaded

    def engine(self, program: str, tensors: Mapping[str, Tensor] | None = None, optimize: int = 0) -> Engine:
        """Compiles a program's linalg for this CPU, over weights by name: those of the folder by default."""
        described = self._program(program)
        module = self.parsed(program, "linalg")
        return Engine(described, module, self.weights() if tensors is None else tensors, optimize)

    def _program(self, name: str) -> ProgramFiles:
        if name not in self.manifest.programs:
            raise MlirError(f"there is no program {name!r}, but {', '.join(self.manifest.programs)}")
        return self.manifest.programs[name]


def _check(programs: Mapping[str, ExportedProgram], forms: Sequence[str], target: Path) -> None:
    if not programs or not forms or set(forms) - set(FORMS):
        raise MlirError(f"forms are {tuple(forms)!r} of {len(programs)} programs; give some of {FORMS}")
    for name in programs:
        if not _IDENTIFIER.fullmatch(name):
            raise MlirError(f"a program cannot be called {name!r}: a name has letters, digits and _")
    if target.exists() and not _is_ours(target):
        raise MlirError(
            f"{os.fspath(target)!r} exists and is no folder of MLIR that clsa wrote; give another path, "
            "or delete it"
        )


def _is_ours(target: Path) -> bool:
    if not target.is_dir():
        return False
    if not any(target.iterdir()):
        return True
    try:
        Manifest.from_json((target / NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, MlirError):
        return False
    return True


def _made(
    name: str, program: ExportedProgram, forms: Sequence[str], tensors: _Tensors
) -> tuple[dict[str, str], ProgramFiles]:
    """Returns the texts of a program by form, and what the manifest says of it."""
    texts: dict[str, str] = {}
    dialects: dict[str, tuple[str, ...]] = {}
    operators: dict[str, int] = {}
    described = None
    for form in forms:
        described = functional(name, program, {} if form == "torch" else lowering.table())
        module = lowering.imported(name, described)
        if form == "torch":
            operators = module.operators
        else:
            module = lowering.lowered(name, module)
        texts[form], dialects[form] = module.text, tuple(module.dialects)
    assert described is not None  # there is a form
    arguments = tuple(_placed(argument, described.tensors, tensors) for argument in described.arguments)
    files = {form: f"{name}.{form}.mlir" for form in texts}
    ranges = _ranges(program)
    return texts, ProgramFiles(name, files, arguments, described.results, ranges, operators, dialects)


def _placed(argument: Argument, values: Mapping[str, Any], tensors: _Tensors) -> Argument:
    if not argument.tensor:
        return argument
    return replace(argument, tensor=tensors.add(argument.tensor, values[argument.tensor]))


class _Tensors:
    """Weights of several programs, those that are one tensor once."""

    def __init__(self, inner: str) -> None:
        self._prefix = f"{inner}." if inner else ""
        self._names: dict[Any, str] = {}
        self.found: dict[str, Tensor] = {}

    def add(self, name: str, value: Any) -> str:
        """Takes a tensor by its name in a program; returns its name in the file. Raises MlirError."""
        if not isinstance(value, Tensor) or value.is_meta or is_traceable_wrapper_subclass(value):
            kind = "a tensor on the meta device" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise MlirError(f"the weight {name!r} is {kind}, which cannot be written")
        identity = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        key = identity if value.numel() else name
        if key not in self._names:
            # Two programs may each have a constant of the same name.
            free = name = name.removeprefix(self._prefix)
            while free in self.found:
                free = f"{name}_{len(self.found)}"
            self._names[key] = free
            self.found[free] = value.detach()
        return self._names[key]


def _ranges(program: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    found = {}
    for symbol, bounds in program.range_constraints.items():
        low, high = (int(b) if b.is_Integer else None for b in (bounds.lower, bounds.upper))
        found[str(symbol)] = (low or 0, high)
    return found


def _same(name: str, text: str, file: Path) -> None:
    """Parses a file that was written. Raises MlirError unless it says what was to be written."""
    if lowering.parsed(name, file.read_text(encoding="utf-8")).text != text:
        raise MlirError(f"the MLIR of {name!r} is not the same after it was written and parsed again")


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors, each with memory of its own. Raises OSError."""
    seen: set[int] = set()
    content = {}
    for name, value in tensors.items():
        storage = value.untyped_storage().data_ptr()
        value = value.cpu().contiguous()
        content[name] = value.clone() if storage in seen else value
        seen.add(storage)
    write_tensors(path, content, _safetensors())


def _safetensors() -> Any:
    return library(MlirError("weights beside MLIR need safetensors: pip install clsa[mlir]"))


def _info(file: Path) -> FileInfo:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return FileInfo(file.stat().st_size, digest)


def _put(partial: Path, target: Path) -> None:
    """Puts a folder in its place; one that was there goes when the new one is there."""
    old = target.with_name(f"{partial.name}.old")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _torch_version() -> str:
    import torch

    return str(torch.__version__)
