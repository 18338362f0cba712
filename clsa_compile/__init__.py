"""clsa: a torch.compile backend for cross-layer sparse attention.

    fast = torch.compile(model, backend="clsa")

compiles decoders exactly: selections that a model makes are attended sparsely, everything else reads
each key once. `inspect` says what was found and what will be done with it.
"""

from __future__ import annotations

from clsa_compile.backend import ClsaWarning
from clsa_compile.config import Options
from clsa_compile.errors import ClsaError, OptionError, StrictError
from clsa_compile.inspection import Report, inspect
from clsa_compile.ir.plan import Group, Plan, SitePlan

__version__ = "0.1.0"

__all__ = [
    "ClsaError",
    "ClsaWarning",
    "Group",
    "OptionError",
    "Options",
    "Plan",
    "Report",
    "SitePlan",
    "StrictError",
    "inspect",
]
