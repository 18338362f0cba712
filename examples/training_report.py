"""What a training run came to: a table, a verdict, and a picture of its losses and coverage."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from training_folder import State

LOSS_BUDGET, NEEDLE_BUDGET = 0.01, 0.02  # of the dense loss; of all needles
LEARNED = 0.5  # of all needles: below, a comparison of needles says nothing


def mean(values: Sequence[float]) -> float:
    """Returns the mean."""
    return sum(values) / len(values)


def table(state: State, title: str, depths: Sequence[float]) -> Table:
    """Lists dense and sparse after each stage: loss, needles by depth, and the mass that the index covers."""
    made = Table(title=title)
    for name in ("after", "reads", "loss", "more", *(f"needles {d:.0%}" for d in depths), "all"):
        made.add_column(name, justify="right")
    for name in ("mass", "best", "recent", "chance"):
        made.add_column(name, justify="right")
    for stage, found in state.evaluations.items():
        for reads in ("dense", "sparse"):
            needles = found[reads]["needles"]
            more = found[reads]["loss"] / found["dense"]["loss"] - 1
            covered = found["coverage"].values() if reads == "sparse" else ()
            made.add_row(
                stage if reads == "dense" else "",
                reads,
                f"{found[reads]['loss']:.4f}",
                f"{more:+.2%}" if reads == "sparse" else "",
                *(f"{value:.0%}" for value in (*needles, mean(needles))),
                *(f"{value:.1%}" for value in covered),
            )
    return made


def verdict(state: State) -> tuple[bool, str]:
    """Judges the final sparse decoder against the best of the dense ones, before the index and after."""
    dense = [state.evaluations[stage]["dense"] for stage in ("dense", "joint")]
    sparse = state.evaluations["joint"]["sparse"]
    more = sparse["loss"] / min(d["loss"] for d in dense) - 1
    needles = max(mean(d["needles"]) for d in dense)
    fewer = needles - mean(sparse["needles"])
    lines = [
        f"loss: {more:+.2%} of the best dense one (at most {LOSS_BUDGET:+.0%})",
        f"needles: {100 * fewer:.1f} points fewer (at most {100 * NEEDLE_BUDGET:.0f})",
    ]
    if needles < LEARNED:
        lines.append(
            f"the dense decoder finds {needles:.0%} of the needles: too few to compare; train longer"
        )
    return more <= LOSS_BUDGET and fewer <= NEEDLE_BUDGET and needles >= LEARNED, "\n".join(lines)


def draw(state: State, path: Path) -> None:
    """Draws losses and coverage by step, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, names, style in (
        (left, ("loss", "kl"), {"linewidth": 0.8}),
        (right, ("index", "best", "recent", "chance"), {"marker": "."}),
    ):
        for name in names:
            values = [entry.get(name, math.nan) for entry in state.history]  # a gap where a stage has none
            known = [i for i, value in enumerate(values) if axis is left or not math.isnan(value)]
            axis.plot([i + 1 for i in known], [values[i] for i in known], label=name, **style)
        stages = [entry["stage"] for entry in state.history]
        for i in range(1, len(stages)):
            if stages[i] != stages[i - 1]:
                axis.axvline(i, color="gray", linestyle=":")
        axis.legend()
    left.set(xlabel="step", ylabel="nats", yscale="log")
    right.set(xlabel="step", ylabel="dense attention mass in the selected tokens", ylim=(0, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
