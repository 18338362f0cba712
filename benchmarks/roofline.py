"""The roofline picture: what each kernel reaches, under what the chip was measured to do."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

if TYPE_CHECKING:
    from kernel_times import Chip, Result


def draw(results: Sequence["Result"], chip: "Chip", path: Path) -> None:
    """Draws flops a second against flops a byte that must be read; a comparison counts as one flop."""
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for name, marker in zip(sorted({r.kernel for r in results}), cycle("osD^vP*X<>"), strict=False):
        own = [r for r in results if r.kernel == name]
        speeds = [r.flops / r.ours / 1e6 for r in own]
        axes.scatter([r.flops / r.reads for r in own], speeds, marker=marker, label=name)
    intensities = [r.flops / r.reads for r in results]
    ridge = chip.flops / chip.bandwidth
    ends = [min(intensities) / 2, ridge, max(*intensities, ridge) * 2]
    roof = [min(chip.flops, chip.bandwidth * x) / 1e12 for x in ends]
    label = f"measured: {chip.bandwidth / 1e12:.2f} TB/s, {chip.flops / 1e12:.0f} Tflop/s"
    axes.plot(ends, roof, color="black", label=label)
    axes.set(xscale="log", yscale="log", xlabel="flop / byte", ylabel="Tflop/s")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
