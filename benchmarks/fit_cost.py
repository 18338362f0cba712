"""Fits the constants of kernels/cost.py to measurements: `python benchmarks/fit_cost.py`. Needs no GPU.

Prints each family's constants, ready to be copied there, and how far its predictions are from what was
measured. The fit is Levenberg-Marquardt on logarithms, where large errors count less than their square:
some shapes spill registers, which the model does not know.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor

from clsa_compile.kernels import cost
from clsa_compile.kernels.cost import Constants, Shape, Sizes
from clsa_compile.kernels.device import H100

MEASURED = Path(__file__).parent / "measured" / "h100_shapes.json"
# Where the search starts; a constant that is not named here is left out of the family.
START = {
    "attention_decode": Constants(
        ramp=8.0, start=1.0, latency=0.4, step=0.5, tile=0.25, tile_warp=0.35, issue=0.3, reached=0.95,
        merged=1.0,
    ),
    "sparse_attention": Constants(
        start=0.5, fill=0.5, latency=0.5, tile=0.25, tile_warp=0.2, issue=0.4, reached=0.75, merged=1.0
    ),
    "index_scan": Constants(ramp=1.0, start=1.0, latency=0.7, tile=0.6, issue=0.1, reached=0.87),
    "index_scan_single": Constants(ramp=1.0, latency=1.6, tile=0.3, tile_warp=0.6, reached=0.88),
}  # fmt: skip
# Relative errors beyond this count less than their square.
USUAL_ERROR = 0.05
STEPS = 200

Row = tuple[Sizes, Shape, float]


def rows_of(kernel: str, path: Path = MEASURED) -> list[Row]:
    """Returns (sizes, shape, microseconds) of everything that was measured of a kernel."""
    found = []
    for entry in json.loads(path.read_text())["measurements"]:
        if entry["kernel"] != kernel:
            continue
        s = entry["sizes"]
        keys = s.get("topk", s["T"])
        sizes = Sizes(s["B"], s["Hkv"], s["H"] // s["Hkv"], keys, s["D"], s.get("Dv", 0), 2)
        found += [(sizes, Shape(*run[:4]), run[4]) for run in entry["runs"]]
    return found


def residuals(kernel: str, names: list[str], rows: list[Row]) -> Callable[[Tensor], Tensor]:
    """Returns the function of log constants that gives the logarithms of predicted by measured time."""
    known = {cost.constant(f.name): 0 for f in fields(Constants) if f.name not in names}
    symbols = [cost.constant(name) for name in names]
    time = cost.expression(kernel, fitted=False).subs(known)
    free = (*cost.SIZES, *cost.SHAPE, *cost.CHIP, *symbols)
    function = sympy.lambdify(free, sympy.log(time), modules="math", cse=True)
    chip = (H100.sms, H100.bandwidth, H100.shared, H100.registers, H100.launch_us)
    given = [(*values(sizes), *values(shape), *chip) for sizes, shape, _ in rows]
    measured = torch.tensor([us for *_, us in rows], dtype=torch.float64).log()

    def difference(logs: Tensor) -> Tensor:
        constants = logs.exp().tolist()
        times = torch.tensor([function(*row, *constants) for row in given], dtype=torch.float64)
        return times - measured

    return difference


def values(record: Any) -> tuple[Any, ...]:
    """Returns the fields of a record in order."""
    return tuple(getattr(record, f.name) for f in fields(record))


def robust(errors: Tensor) -> Tensor:
    """Returns residuals whose squares grow like the errors themselves where errors are large."""
    scaled = errors / USUAL_ERROR
    return errors.sign() * USUAL_ERROR * (2 * ((1 + scaled**2).sqrt() - 1)).sqrt()


def fit(kernel: str, rows: list[Row]) -> Constants:
    """Returns the constants that fit best, all of them positive."""
    names = [
        f.name for f in fields(Constants) if getattr(START[kernel], f.name) != getattr(Constants(), f.name)
    ]
    difference = residuals(kernel, names, rows)
    logs = torch.tensor([getattr(START[kernel], name) for name in names], dtype=torch.float64).log()
    errors = robust(difference(logs))
    damping, nudge = 1e-2, 1e-4
    for _ in range(STEPS):
        columns = [
            (robust(difference(logs + nudge * axis)) - errors) / nudge
            for axis in torch.eye(len(names), dtype=torch.float64)
        ]
        slope = torch.stack(columns, 1)
        square = slope.T @ slope
        square += damping * (square.diagonal() + 1e-3).diag()
        tried = logs + torch.linalg.solve(square, -slope.T @ errors).clamp(-0.3, 0.3)
        new = robust(difference(tried))
        if new @ new < errors @ errors:
            logs, errors, damping = tried, new, max(damping / 3, 1e-6)
        elif damping > 1e6:
            break
        else:
            damping *= 3
    found = {name: round(value, 4) for name, value in zip(names, logs.exp().tolist(), strict=True)}
    return Constants(**found)


def main() -> None:
    """Fits every family and prints what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=sorted(START), nargs="+", default=list(START))
    for kernel in parser.parse_args().only:
        rows = rows_of(kernel)
        constants = fit(kernel, rows)
        names = [f.name for f in fields(Constants)]
        given = {name: getattr(constants, name) for name in names}
        kept = {name: value for name, value in given.items() if value != getattr(Constants(), name)}
        print(f"{kernel}: Constants({', '.join(f'{name}={value}' for name, value in kept.items())})")
        logs = torch.tensor(list(kept.values()), dtype=torch.float64).clamp(min=1e-9).log()
        errors = residuals(kernel, list(kept), rows)(logs).expm1().abs().sort().values
        print(
            f"  {len(rows)} measurements; relative error: median {statistics.median(errors.tolist()):.3f}, "
            f"90% below {errors[int(0.9 * len(errors))]:.3f}, largest {errors[-1]:.3f}"
        )


if __name__ == "__main__":
    main()
