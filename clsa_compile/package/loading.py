"""load(): a package that is verified, checked against this machine, and run without compiling anything."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from clsa_compile.aot import UNBOUND, Runner
from clsa_compile.errors import ClsaWarning, PackageError
from clsa_compile.ir.plan import Plan
from clsa_compile.package.archive import Archive
from clsa_compile.package.digest import check
from clsa_compile.package.machine import obstacle
from clsa_compile.package.manifest import Decoding, Input, Manifest, ProgramInfo, dtype_of
from clsa_compile.package.weights import Weights, read

__all__ = ["Caches", "Package", "load"]


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    digest: str | Collection[str] | None = None,
    weights: Weights | None = None,
) -> Package:
    """Loads what `export` wrote; Dynamo, Inductor and Triton compile nothing.

    `digest` is the one that `export` returned, or several that are trusted: a package is native code, and
    only a digest that came another way than the file says that it is the one that was meant. Without it a
    warning says what to pin. `device` is the one that it was compiled for where nothing is said. `weights`
    are bound at once, as `Package.bind` takes them.
    Raises PackageError for a file that is damaged, cut off, not the one that is trusted, of another format,
    or made for another torch, processor or device: before torch reads any of it.
    """
    name = os.fspath(path)
    trusted = [digest] if isinstance(digest, str) else list(digest or ())
    try:
        file = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PackageError(f"there is no package at {name!r}: {error}") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise PackageError(f"there is no package at {name!r}: it is no file")
        found = check(file, name, trusted)
        if not trusted:
            message = f"{name!r} is not pinned, and holds native code: load it with digest={found!r}"
            warnings.warn(message, ClsaWarning, stacklevel=2)
        before = os.fstat(file)
        archive = Archive(file, name)
        manifest = Manifest.from_json(archive.text("package.json"), name)
        place = _device(manifest, device)
        _check_plan(archive, manifest, name)
        package = Package(archive, manifest, found, place, _runs(archive, manifest, name, place))
        now = os.stat(name)
        if (before.st_ino, before.st_size, before.st_mtime_ns) != (now.st_ino, now.st_size, now.st_mtime_ns):
            raise PackageError(f"{name!r} was changed while it was loaded; load it again")
        if weights is not None:
            package.bind(weights)
        elif all(info.record is not None for info in manifest.tensors.values()):
            package.bind({})
    finally:
        os.close(file)
    return package


def _device(manifest: Manifest, device: str | torch.device | None) -> torch.device:
    """Returns where to run. Raises PackageError where that cannot be."""
    try:
        place = torch.device(device if device is not None else manifest.machine["device"])
    except RuntimeError as error:
        raise PackageError(f"{device!r} is no device: {error}") from error
    if manifest.kind == "pt2" and (reason := obstacle(manifest.machine, place)):
        raise PackageError(f"this package does not run on {place}: {reason}")
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # as tensors on it say
    return place


def _check_plan(archive: Archive, manifest: Manifest, name: str) -> None:
    if hashlib.sha256(archive.text("plan.json").encode()).hexdigest() != manifest.plan:
        raise PackageError(f"{name!r} holds another plan than the one that it was made with; export it again")


class Code(Protocol):
    """What runs a program: flat tensors in, flat tensors out."""

    def specs(self) -> tuple[str, str]:
        """Returns how inputs and outputs are nested."""

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors that the program needs besides its inputs."""

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Runs the program."""


def _runs(archive: Archive, manifest: Manifest, name: str, device: torch.device) -> dict[str, Code]:
    if manifest.kind == "program":
        return {key: _Graph(archive.program(key), info, device) for key, info in manifest.programs.items()}
    found: dict[str, Code] = {}
    for key in manifest.programs:
        runner = Runner(name, key, device)
        marks = runner.metadata()
        if (marks.get("clsa_plan"), marks.get("clsa_program")) != (manifest.plan, key):
            raise PackageError(
                f"the native code of {key!r} in {name!r} is that of another plan; export it again"
            )
        found[key] = runner
    return found


class _Graph:
    """An exported program that runs op by op, on any device: contract ops by kernels or references."""

    def __init__(self, data: bytes, info: ProgramInfo, device: torch.device) -> None:
        from torch.export.passes import move_to_device_pass

        import clsa_compile.dispatch  # noqa: F401

        program = torch.export.load(io.BytesIO(data))
        self._program = move_to_device_pass(program, device)
        self._inputs = info.inputs
        self._module: Callable[..., Any] | None = None

    def specs(self) -> tuple[str, str]:
        """Returns how inputs and outputs are nested."""
        spec = self._program.call_spec
        return pytree.treespec_dumps(spec.in_spec), pytree.treespec_dumps(spec.out_spec)

    def bind(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors that the program needs besides its inputs."""
        for known in (self._program.state_dict, self._program.constants):
            for name in known.keys() & tensors.keys():
                is_parameter = isinstance(known[name], torch.nn.Parameter)
                value = tensors[name]
                known[name] = torch.nn.Parameter(value, requires_grad=False) if is_parameter else value
        self._module = self._program.module(check_guards=False)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Runs the program on flat inputs. Raises PackageError without weights."""
        if self._module is None:
            raise PackageError(UNBOUND)
        given = iter(inputs)
        leaves = [next(given) if entry.is_tensor else entry.constant for entry in self._inputs]
        args, kwargs = pytree.tree_unflatten(leaves, self._program.call_spec.in_spec)
        with torch.no_grad():
            outputs: list[Tensor] = pytree.tree_leaves(self._module(*args, **kwargs))
        return outputs


@dataclass(slots=True)
class Caches:
    """A decoder's memory of `batch` sequences with room for `size` tokens, of which `used` are taken.

    `tensors` [B, H, T, D] or [B, T, D] by name, `length` what the programs count, `padding` [B] the tokens
    before each row that are none.
    """

    tensors: dict[str, Tensor]
    length: Tensor
    padding: Tensor | None
    batch: int
    size: int
    used: int = 0

    def reset(self) -> None:
        """Forgets all tokens."""
        for value in (*self.tensors.values(), self.length):
            value.zero_()
        self.used = 0

    def flat(self, ids: Tensor) -> list[Tensor]:
        """Returns a program's inputs in order."""
        rest = [] if self.padding is None else [self.padding]
        return [ids, *self.tensors.values(), self.length, *rest]


class Package:
    """A loaded package. One thread runs it at a time."""

    def __init__(
        self,
        archive: Archive,
        manifest: Manifest,
        digest: str,
        device: torch.device,
        code: Mapping[str, Code],
    ) -> None:
        self.manifest = manifest
        self.digest = digest
        self.device = device
        self.report = archive.text("report.txt").rstrip("\n")
        self.plans = tuple(Plan.from_dict(plan) for plan in json.loads(archive.text("plan.json")))
        self.texts = {name: archive.text(name) for name in archive.names() if name.endswith(".py")}
        self._code = code
        self._specs = {name: tuple(map(pytree.treespec_loads, entry.specs())) for name, entry in code.items()}
        records = {key: info.record for key, info in manifest.tensors.items() if info.record is not None}
        kept = {
            key: (record, dtype_of(info.dtype), info.sizes, info.strides)
            for key, record in records.items()
            for info in [manifest.tensors[key]]
        }
        self._inside = {key: value.to(device) for key, value in archive.tensors(kept).items()}

    def __repr__(self) -> str:
        made = self.manifest.machine
        programs = ", ".join(self.manifest.programs)
        return (
            f"Package({self.manifest.model}: {programs}; torch {made['torch']}, {self.device}, {self.digest})"
        )

    def bind(self, weights: Weights) -> None:
        """Takes the weights that were left out: safetensors files, folders of them, or tensors by name.

        Names are those of the model's state_dict. Raises PackageError where one is missing or does not fit.
        """
        infos = self.manifest.tensors
        wanted = {key: info for key, info in infos.items() if info.record is None}
        tensors = self._inside | (read(weights, wanted, self.device) if wanted else {})
        for name, code in self._code.items():
            constants = self.manifest.programs[name].constants
            code.bind({constant: tensors[key] for constant, key in constants.items()})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program of a module, "forward"; sizes may vary as they could when it was exported."""
        if "forward" not in self._code:
            raise PackageError("this package is a decoder's; use caches(), step() and generate()")
        inputs, outputs = self._specs["forward"]
        leaves, spec = pytree.tree_flatten((args, _in_order(kwargs, inputs)))
        if spec != inputs:
            raise PackageError(f"the arguments are nested as {spec}; the package was made for {inputs}")
        flat = _checked(self.manifest.programs["forward"], leaves, self.device)
        return pytree.tree_unflatten(self._code["forward"](flat), outputs)

    def caches(self, batch: int, size: int, padding: Tensor | None = None) -> Caches:
        """Returns empty caches for `batch` sequences of up to `size` tokens.

        `padding` int64 [B] says how many tokens before each prompt are none, where the package was made with
        an attention mask. Raises PackageError for sizes that the programs were not made for.
        """
        decoding = self._decoding()
        if padding is not None and not decoding.is_padded:
            raise PackageError("this package takes no padding; export the model with an attention_mask")
        made: dict[str, Tensor] = {}
        for entry in decoding.caches:
            sizes = [{"B": batch, "T": size}.get(n, n) if isinstance(n, str) else n for n in entry.sizes]
            made[entry.name] = torch.zeros(sizes, dtype=dtype_of(entry.dtype), device=self.device)  # type: ignore[arg-type]
        length = torch.zeros((), dtype=torch.long, device=self.device)
        if decoding.is_padded:
            rows = torch.zeros(batch, dtype=torch.long) if padding is None else padding
            padding = rows.to(self.device)
        found = Caches(made, length, padding, batch, size)
        ids = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        _checked(self.manifest.programs["decode"], found.flat(ids), self.device)
        return found

    def step(self, ids: Tensor, caches: Caches) -> Tensor:
        """Runs ids int64 [B, S] after the tokens that `caches` hold; returns logits [B, V] of the last ones.

        More than one token go through the program for prompts. Raises PackageError where they do not fit.
        """
        rows = ids.shape[-1]
        wanted = (torch.long, (caches.batch, rows), self.device)
        if (ids.dtype, tuple(ids.shape), ids.device) != wanted:
            found = f"{ids.dtype} {list(ids.shape)} on {ids.device}"
            raise PackageError(f"ids are {found}; give int64 [{caches.batch}, S] on {self.device}")
        if caches.used + rows > caches.size:
            raise PackageError(
                f"{caches.used} tokens and {rows} more do not fit into caches for {caches.size}; make larger "
                "ones"
            )
        name = "decode" if rows == 1 else "prefill"
        if rows != 1:
            low, high = _rows(self.manifest.programs[name])
            if not low <= rows <= high:
                raise PackageError(f"a prompt of {rows} tokens; the package was made for {low} to {high}")
        (logits,) = self._code[name](caches.flat(ids.contiguous()))
        caches.used += rows
        return logits

    def graphed(self, caches: Caches) -> Callable[[Tensor], Tensor]:
        """Captures single steps over these caches as a CUDA graph; returns what replays it for ids [B, 1].

        The logits that it returns are overwritten by the next step. Raises PackageError where there is no
        GPU, and where the caches are full: one step runs before, into the slot that the next writes again.
        """
        self._decoding()
        if self.device.type != "cuda":
            raise PackageError(f"CUDA graphs are for CUDA devices, and this package is on {self.device}")
        if caches.used >= caches.size:
            raise PackageError("the caches are full; make larger ones")
        return _graphed(self, self._code["decode"], caches)

    def generate(
        self, ids: Tensor, caches: Caches, steps: int, step: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[Tensor]:
        """Yields the likeliest token of each sequence [B], `steps` times, as they are found.

        `step` does those of single tokens, as `graphed` returns it.
        """
        for _ in range(steps):
            logits = self.step(ids, caches) if step is None or ids.shape[1] > 1 else step(ids)
            ids = logits.argmax(dim=-1, keepdim=True)
            yield ids[:, 0]

    def _decoding(self) -> Decoding:
        if self.manifest.decoding is None:
            raise PackageError("this package is no decoder's; call it as the module that it was made of")
        return self.manifest.decoding


def _graphed(package: Package, run: Code, caches: Caches) -> Callable[[Tensor], Tensor]:
    fixed = torch.zeros(caches.batch, 1, dtype=torch.long, device=package.device)
    flat, held = caches.flat(fixed), caches.length.clone()
    side = torch.cuda.Stream(package.device)
    side.wait_stream(torch.cuda.current_stream(package.device))
    with torch.cuda.stream(side):
        run(flat)  # kernels are loaded by their first launch, which a graph cannot hold
        caches.length.copy_(held)
    torch.cuda.current_stream(package.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (logits,) = run(flat)

    def step(ids: Tensor) -> Tensor:
        if caches.used >= caches.size:
            raise PackageError(f"the caches hold {caches.size} tokens, and are full; make larger ones")
        fixed.copy_(ids)
        graph.replay()
        caches.used += 1
        return logits

    return step


def _in_order(kwargs: Mapping[str, Any], spec: Any) -> dict[str, Any]:
    """Returns keyword arguments in the order of the export."""
    names = (
        list(spec.children()[1].context)
        if hasattr(spec, "children")
        else list(spec.children_specs[1].context)
    )
    ordered = {name: kwargs[name] for name in names if name in kwargs}
    return ordered | {name: value for name, value in kwargs.items() if name not in ordered}


def _rows(info: ProgramInfo) -> tuple[int, int]:
    """Returns how few and how many tokens a program for prompts takes."""
    size = info.inputs[0].sizes[1]
    return (size, size) if isinstance(size, int) else info.ranges[size]


def _checked(info: ProgramInfo, leaves: Sequence[Any], device: torch.device) -> list[Tensor]:
    """Returns the tensors among flat inputs. Raises PackageError for what native code would take unseen."""
    if len(leaves) != len(info.inputs):
        raise PackageError(f"{len(leaves)} arguments; the program takes {len(info.inputs)}")
    sizes: dict[str, int] = {}
    found = []
    for entry, value in zip(info.inputs, leaves, strict=True):
        if not entry.is_tensor:
            if type(value) is not type(entry.constant) or value != entry.constant:
                raise PackageError(f"{entry.name} is {value!r}; the program was made for {entry.constant!r}")
            continue
        if problem := _problem(entry, value, info, sizes, device):
            raise PackageError(f"{entry.name} {problem}")
        found.append(value)
    return found


def _problem(entry: Input, value: Any, info: ProgramInfo, sizes: dict[str, int], device: torch.device) -> str:
    """Returns what is wrong with one tensor, and notes the sizes that have names."""
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}; the program takes a tensor"
    if value.dtype != dtype_of(entry.dtype) or value.device.type != device.type:
        return f"is {value.dtype} on {value.device}; the program takes {entry.dtype} on {device}"
    if value.dim() != len(entry.sizes) or not value.is_contiguous():
        layout = "contiguous" if value.is_contiguous() else "not contiguous"
        wanted = ", ".join(map(str, entry.sizes))
        return f"has sizes {list(value.shape)}, {layout}; the program takes [{wanted}], contiguous"
    for axis, (name, size) in enumerate(zip(entry.sizes, value.shape, strict=True)):
        if isinstance(name, int):
            if size != name:
                return f"has {size} in dimension {axis}; the program takes {name}"
            continue
        low, high = info.ranges.get(name, (0, 1 << 62))
        if not low <= size <= high:
            return f"has {size} in dimension {axis}; the program takes {low} to {high}"
        if sizes.setdefault(name, size) != size:
            return f"has {size} in dimension {axis}, where another argument has {sizes[name]}"
    return ""
