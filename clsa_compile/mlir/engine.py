"""Runs what was written as linalg, with the execution engine that torch-mlir brings along.

It compiles for the CPU at hand, in this process. It is there to check programs, not to be fast: loops are
plain loops, on one thread.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clsa_compile.errors import MlirError
from clsa_compile.mlir.lowering import Module, run
from clsa_compile.mlir.manifest import ProgramFiles

__all__ = ["Engine"]

# LLVM's time grows faster than a function does, and at 16000 operations its recursion ends the process.
_LARGEST = 8000
# As torch-mlir's reference backend does it, with buffers freed; and with bfloat16 in integers, since not
# every CPU converts to it, nor every C library in its place.
_TO_LLVM = f"""builtin.module({
    ",".join(
        (
            "func.func(linalg-generalize-named-ops)",
            "func.func(linalg-fuse-elementwise-ops)",
            "convert-shape-to-std",
            "func.func(refback-generalize-tensor-pad)",
            "func.func(refback-generalize-tensor-concat)",
            "func.func(tm-tensor-bufferize)",
            "one-shot-bufferize{copy-before-write bufferize-function-boundaries"
            " function-boundary-type-conversion=identity-layout-map}",
            "refback-mlprogram-bufferize",
            "buffer-deallocation-pipeline",
            "convert-bufferization-to-memref",
            "func.func(tm-tensor-to-loops)",
            "func.func(refback-munge-memref-copy)",
            "func.func(convert-linalg-to-loops)",
            "func.func(lower-affine)",
            "convert-scf-to-cf",
            "func.func(refback-expand-ops-for-llvm)",
            "func.func(arith-expand{include-bf16=true})",
            "func.func(convert-math-to-llvm)",
            "convert-math-to-libm",
            "expand-strided-metadata",
            "finalize-memref-to-llvm",
            "lower-affine",
            "func.func(convert-arith-to-llvm)",
            "convert-func-to-llvm",
            "convert-cf-to-llvm",
            "convert-complex-to-llvm",
            "reconcile-unrealized-casts",
        )
    )
})"""


class Engine:
    """One program, compiled. Called on tensors by name, it returns tensors by name."""

    def __init__(
        self, program: ProgramFiles, module: Module, tensors: Mapping[str, Tensor], optimize: int = 0
    ) -> None:
        """Compiles a program; the module is used up. `tensors` are its weights, by name in the manifest.

        `optimize` is LLVM's level, 0 to 3. Raises MlirError.
        """
        from torch_mlir import ir
        from torch_mlir.execution_engine import ExecutionEngine

        operations = sum(module.dialects.values())
        if operations > _LARGEST:
            raise MlirError(
                f"the program {program.name!r} has {operations} operations, and torch-mlir's engine compiles "
                f"all of them as one function: {_LARGEST} at most. Compile the file with IREE, for example"
            )
        self._program = program
        missing = [a.tensor for a in program.arguments if a.tensor and a.tensor not in tensors]
        if missing:
            raise MlirError(
                f"the program {program.name!r} needs {len(missing)} more tensors, as {missing[0]!r}"
            )
        self._tensors = {a.name: tensors[a.tensor] for a in program.arguments if a.tensor}
        with module.module.context:
            for operation in module.module.body.operations:
                if operation.operation.name == "func.func":
                    operation.attributes["llvm.emit_c_interface"] = ir.UnitAttr.get()
        run(module.module, _TO_LLVM, f"the program {program.name!r} cannot be compiled")
        try:
            self._engine = ExecutionEngine(module.module, opt_level=optimize)
        except RuntimeError as error:
            raise MlirError(f"the program {program.name!r} cannot be compiled: {error}") from error
        # It compiles when it is first asked for a function, and says on stderr alone what is missing.
        if not self._engine.raw_lookup(f"_mlir_ciface_{program.name}"):
            raise MlirError(
                f"the program {program.name!r} cannot be compiled: it calls what this machine lacks"
            )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs the program on its inputs by name; returns its results by name.

        What it writes has the name of the input that it replaces; the inputs themselves stay as they are.
        Raises MlirError for inputs that do not fit: the program itself would end the process.
        """
        given = {**self._tensors, **inputs}
        self._check(given)
        operands = [_described(given[a.name].detach()) for a in self._program.arguments]
        results = _results([len(r.sizes) for r in self._program.results])()
        pointers = [ctypes.pointer(ctypes.pointer(x)) for x in (results, *(o for o, _ in operands))]
        self._engine.invoke(self._program.name, *pointers)
        taken = [
            _taken(getattr(results, f"result_{i}"), result.dtype)
            for i, result in enumerate(self._program.results)
        ]
        _freed([getattr(results, f"result_{i}").allocated for i in range(len(taken))])
        return {r.name: value for r, value in zip(self._program.results, taken, strict=True)}

    def _check(self, given: Mapping[str, Tensor]) -> None:
        """Compares what is given with what the program takes. Raises MlirError."""
        known = {a.name for a in self._program.arguments}
        for problem, names in (("lacks", known - set(given)), ("does not take", set(given) - known)):
            if names:
                wanted = ", ".join(a.name for a in self._program.arguments if not a.tensor)
                raise MlirError(
                    f"the call of {self._program.name!r} {problem} {sorted(names)[0]!r}; it takes {wanted}"
                )
        found: dict[str, int] = {}
        for argument in self._program.arguments:
            value = given[argument.name]
            dtype = str(value.dtype).removeprefix("torch.")
            fits = (
                dtype == argument.dtype and value.dim() == len(argument.sizes) and value.device.type == "cpu"
            )
            for size, wanted_size in zip(value.shape, argument.sizes, strict=False):
                low, high = self._program.ranges.get(str(wanted_size), (0, None))
                expected = (
                    found.setdefault(wanted_size, size) if isinstance(wanted_size, str) else wanted_size
                )
                fits = fits and size == expected and size >= low and (high is None or size <= high)
            if not fits:
                wanted = ", ".join(_sized(s, found, self._program.ranges) for s in argument.sizes)
                raise MlirError(
                    f"{argument.name!r} is {dtype}{list(value.shape)} on {value.device}; the program "
                    f"{self._program.name!r} takes {argument.dtype}[{wanted}] on the CPU"
                )


def _sized(size: int | str, found: Mapping[str, int], ranges: Mapping[str, Any]) -> str:
    if isinstance(size, int):
        return str(size)
    low, high = ranges.get(size, (0, None))
    return f"{size} ({low} to {'any' if high is None else high}; {found.get(size, 'not given')} here)"


@functools.cache
def _descriptor(rank: int) -> type[ctypes.Structure]:
    """Returns MLIR's description of a piece of memory with so many dimensions."""
    fields: list[Any] = [
        ("allocated", ctypes.c_void_p),
        ("aligned", ctypes.c_void_p),
        ("offset", ctypes.c_int64),
    ]
    if rank:
        fields += [("sizes", ctypes.c_int64 * rank), ("strides", ctypes.c_int64 * rank)]
    return type(f"Descriptor{rank}", (ctypes.Structure,), {"_fields_": fields})


def _results(ranks: list[int]) -> type[ctypes.Structure]:
    fields = [(f"result_{i}", _descriptor(rank)) for i, rank in enumerate(ranks)]
    return type("Results", (ctypes.Structure,), {"_fields_": fields})


def _described(value: Tensor) -> tuple[Any, Tensor]:
    """Returns the description of a tensor, and the tensor that it describes, which must be kept."""
    value = value.contiguous()
    made: Any = _descriptor(value.dim())()
    made.allocated = made.aligned = value.data_ptr()
    if value.dim():
        made.sizes[:], made.strides[:] = list(value.shape), list(value.stride())
    return made, value


def _taken(memory: Any, dtype: str) -> Tensor:
    """Copies a result into a tensor."""
    sizes = list(memory.sizes) if hasattr(memory, "sizes") else []
    strides = list(memory.strides) if sizes else []
    result = torch.empty(sizes, dtype=getattr(torch, dtype))
    if not result.numel():
        return result
    extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    flat = torch.empty(extent, dtype=result.dtype)
    ctypes.memmove(
        flat.data_ptr(), memory.aligned + memory.offset * flat.element_size(), extent * flat.element_size()
    )
    return result.copy_(flat.as_strided(sizes, strides))


def _freed(pointers: list[int | None]) -> None:
    """Frees results, which are the caller's."""
    free = ctypes.CDLL(None).free
    free.argtypes, free.restype = [ctypes.c_void_p], None
    for pointer in dict.fromkeys(pointers):
        free(pointer)
