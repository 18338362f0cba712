"""clsa: a torch.compile backend for cross-layer sparse attention.

    fast = torch.compile(model, backend="clsa")

compiles decoders exactly: selections that a model makes are attended sparsely, everything else reads
each key once. `inspect` says what was found and what will be done with it. `search` finds which layers of a
dense model may share tokens, `distill` trains a small index for groups of them; `evaluate` and
`evaluate_tasks` say what that costs on text and on tasks.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import clsa_compile.dispatch  # noqa: F401 (contract ops can be called by themselves)
from clsa_compile.config import Options
from clsa_compile.errors import (
    ClsaError,
    ClsaWarning,
    DistillError,
    ExportError,
    KeepError,
    OptionError,
    PackageError,
    PlanError,
    StrictError,
)
from clsa_compile.ir.plan import Group, Plan, SitePlan
from clsa_compile.ir.sharing import SharingPlan

if TYPE_CHECKING:
    from clsa_compile.calibration.applying import apply
    from clsa_compile.calibration.distilling import distill
    from clsa_compile.calibration.judging import evaluate
    from clsa_compile.calibration.quality import Quality
    from clsa_compile.calibration.searching import search
    from clsa_compile.calibration.task_report import TaskReport
    from clsa_compile.calibration.tasks import evaluate_tasks
    from clsa_compile.checking import Check, check
    from clsa_compile.inspection import Report, inspect
    from clsa_compile.package.building import Exported, export
    from clsa_compile.package.loading import Caches, Package, load
    from clsa_compile.policies.schedule import hugging_face_schedule

__version__ = "0.1.0"

__all__ = [
    "Caches",
    "Check",
    "ClsaError",
    "ClsaWarning",
    "DistillError",
    "ExportError",
    "Exported",
    "Group",
    "KeepError",
    "OptionError",
    "Options",
    "Package",
    "PackageError",
    "Plan",
    "PlanError",
    "Quality",
    "Report",
    "SharingPlan",
    "SitePlan",
    "StrictError",
    "TaskReport",
    "apply",
    "check",
    "distill",
    "evaluate",
    "evaluate_tasks",
    "export",
    "hugging_face_schedule",
    "inspect",
    "load",
    "search",
]

# Not everyone needs these, and they take seconds to import: a package runs without any compiler.
_LAZY = {
    "Caches": "package.loading",
    "Exported": "package.building",
    "Package": "package.loading",
    "Report": "inspection",
    "export": "package.building",
    "inspect": "inspection",
    "load": "package.loading",
    "Check": "checking",
    "Quality": "calibration.quality",
    "TaskReport": "calibration.task_report",
    "apply": "calibration.applying",
    "check": "checking",
    "distill": "calibration.distilling",
    "evaluate": "calibration.judging",
    "evaluate_tasks": "calibration.tasks",
    "hugging_face_schedule": "policies.schedule",
    "search": "calibration.searching",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"clsa_compile.{_LAZY[name]}"), name)
