"""Between graphs and MLIR's text, by torch-mlir: the only module that imports it, with `engine.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clsa_compile.errors import MissingMlirError, MlirError
from clsa_compile.mlir.decompose import decompositions
from clsa_compile.mlir.program import Functional

__all__ = ["Module", "imported", "lowered", "parsed", "table", "version"]

_TO_BACKEND = "builtin.module(torchdynamo-export-to-torch-backend-pipeline)"
_TO_LINALG = "builtin.module(torch-backend-to-linalg-on-tensors-backend-pipeline)"
# Constants are what is left of an op that could not be lowered, and name nothing.
_UNNAMED = ("torch.constant", "torch.prim.ListConstruct", "torch_c.")


@dataclass(frozen=True, slots=True)
class Module:
    """A verified module: its text, how often it uses each dialect, and the custom ops that it keeps."""

    module: Any
    text: str
    dialects: dict[str, int]
    operators: dict[str, int]


def version() -> str:
    """Returns the version of torch-mlir. Raises MissingMlirError."""
    _installed()
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        return version_of("torch-mlir")
    except PackageNotFoundError:
        return "unknown"


def table() -> dict[Any, Callable[..., Any]]:
    """Returns the decompositions that stand before linalg."""
    _installed()
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table

    return decompositions(dict(get_decomposition_table()))


def imported(name: str, program: Functional) -> Module:
    """Returns a program as a function of that name, in torch's dialect. Raises MlirError."""
    _installed()
    from torch_mlir.extras.fx_importer import FxImporter

    importer = FxImporter(context=_context())
    try:
        importer.import_stateless_graph(program.graph, func_name=name)
    except Exception as error:  # the importer has assertions, and exceptions of many kinds
        reason = str(error).partition("\n")[0] or "it gives no reason"
        raise MlirError(
            f"torch-mlir cannot import the program {name!r}: {type(error).__name__}: {reason}"
        ) from error
    return _verified(name, importer.module)


def lowered(name: str, module: Module) -> Module:
    """Takes a module to linalg on tensors; the one that is given changes. Raises MlirError naming the ops."""
    for pipeline in (_TO_BACKEND, _TO_LINALG):
        run(module.module, pipeline, f"torch-mlir cannot lower the program {name!r} to linalg")
    done = _verified(name, module.module)
    _refuse_narrowing(name, done)
    return done


def parsed(name: str, text: str) -> Module:
    """Reads a text in a context of its own, and verifies it. Raises MlirError."""
    _installed()
    from torch_mlir import ir
    from torch_mlir.passmanager import PassManager

    context = _context()
    with context:
        # torch-mlir's own dialects have no other way into a context than a pass that may make them.
        PassManager.parse(_TO_LINALG).run(ir.Module.parse("module {}").operation)
        try:
            module = ir.Module.parse(text)
        except ir.MLIRError as error:
            raise MlirError(f"the MLIR of {name!r} does not parse: {_first(str(error))}") from error
    return _verified(name, module)


def run(module: Any, pipeline: str, failure: str) -> None:
    """Runs passes over a module. Raises MlirError, which `failure` begins, naming the ops that are left."""
    from torch_mlir.passmanager import PassManager

    said: list[str] = []

    def hear(diagnostic: Any) -> bool:
        said.append(_first(diagnostic.message))
        return True

    with module.context as context:
        # A pass may complain and yet succeed.
        context.emit_error_diagnostics = True
        handler = context.attach_diagnostic_handler(hear)
        try:
            PassManager.parse(pipeline).run(module.operation)
            why = said
        except Exception as error:
            why = said or [_first(str(error))]
        finally:
            handler.detach()
    if why:
        left = sorted({_named(op) for op in _operations(module) if op.name.startswith("torch.")} - {""})
        known = [name for name in left if any(name in text for text in why)] or left
        ops = f": it knows no way for {', '.join(known[:4])}" if known else ""
        raise MlirError(f"{failure}{ops} ({why[0][:300]})")


def _installed() -> None:
    try:
        import torch_mlir.ir  # noqa: F401
    except ImportError as error:
        raise MissingMlirError(str(error)) from error


def _context() -> Any:
    from torch_mlir import ir
    from torch_mlir.dialects import torch as dialect

    context = ir.Context()
    dialect.register_dialect(context)
    return context


def _verified(name: str, module: Any) -> Module:
    """Returns what is in a module. Raises MlirError where it breaks a rule of a dialect."""
    try:
        module.operation.verify()
    except Exception as error:
        raise MlirError(f"the MLIR of {name!r} is not valid: {_first(str(error))}") from error
    dialects: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for operation in _operations(module):
        dialects[operation.name.partition(".")[0]] += 1
        if operation.name == "torch.operator":
            operators[_named(operation)] += 1
    return Module(module, str(module), dict(sorted(dialects.items())), dict(sorted(operators.items())))


def _operations(module: Any) -> list[Any]:
    from torch_mlir import ir

    found: list[Any] = []

    def look(operation: Any) -> Any:
        found.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(look)
    return found


def _named(operation: Any) -> str:
    """Returns what an op is called in the model, "" of one that only prepares another."""
    if operation.name == "torch.operator":
        return str(operation.attributes["name"]).strip('"')
    return "" if operation.name.startswith(_UNNAMED) else str(operation.name)


def _refuse_narrowing(name: str, module: Module) -> None:
    """Refuses a size that may vary and is cast to a number: torch-mlir does so where it guesses."""
    from torch_mlir import ir

    for operation in _operations(module.module):
        if operation.name != "tensor.cast":
            continue
        before, after = (ir.RankedTensorType(v.type) for v in (operation.operands[0], operation.results[0]))
        for axis in range(before.rank):
            if before.is_dynamic_dim(axis) and not after.is_dynamic_dim(axis):
                raise MlirError(
                    f"torch-mlir guesses a size in the program {name!r}: {before} is taken for {after}; "
                    "export that size as a number, or leave the form 'linalg' out"
                )


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "it gives no reason")
