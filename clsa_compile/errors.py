"""One class a mistake; every message names the thing and the way out."""

from __future__ import annotations


class ClsaError(Exception):
    """The base of every error that clsa raises on purpose."""


class ClsaWarning(UserWarning):
    """Something was left as it was, or deserves a look; the message says what, why, and the way out."""


class OptionError(ClsaError, ValueError):
    """An option that is unknown, has the wrong type, or an impossible value."""


class PlanError(OptionError):
    """A sharing plan that cannot be read, contradicts itself, or is for another model."""


class DistillError(ClsaError, RuntimeError):
    """Training an index failed; what had been reached is kept."""


class KeepError(ClsaError, RuntimeError):
    """What a long run has finished cannot be kept in its folder; what was kept before is as it was."""


class CaptureError(ClsaError, RuntimeError):
    """A graph that could not be brought into the dialect that passes read."""


class PassError(ClsaError, RuntimeError):
    """A pass failed in the middle; the message names the pass, and the cause is chained."""


class VerifyError(ClsaError, AssertionError):
    """A graph broke a rule of the dialect after a pass."""


class StrictError(ClsaError, RuntimeError):
    """Something was left as it was while `strict` was asked for."""


class ExportError(ClsaError, RuntimeError):
    """A model that cannot be written as a package, or the wrong request for one."""


class PackageError(ClsaError, RuntimeError):
    """A package that cannot be trusted, loaded or run as it was asked for."""


class KernelError(ClsaError, RuntimeError):
    """A kernel was asked for that cannot be generated or run here."""


class MissingTritonError(KernelError):
    """A CUDA graph needs Triton, and Triton is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "lowering attention on CUDA needs Triton, which is not installed: "
            "`pip install triton` (or `pip install clsa[gpu]`), or compile with backend='inductor'"
        )


class StrippedError(ClsaError, RuntimeError):
    """A module ran whose weights were freed for a plan under which nothing reads them."""

    def __init__(self, module: str) -> None:
        super().__init__(
            f"the weights of this {module} were freed by plan.strip(model), and it ran without that plan: "
            "compile the model with the options of the plan, or load the weights again"
        )


class ExpressionError(ClsaError, ValueError):
    """The text of a Score or of a predicate that cannot be read."""


class MlirError(ClsaError, RuntimeError):
    """A program that cannot be written as MLIR, or MLIR that is not what was written."""


class MissingMlirError(MlirError):
    """Writing MLIR needs torch-mlir, and it is not installed."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"MLIR needs torch-mlir ({why}): `pip install torch-mlir` (or `pip install clsa[mlir]`). Its "
            "wheels are for Linux on x86-64 and a few versions of Python: where none fits, use Python 3.11"
        )
