"""Quality: what sharing costs a model on some text, as numbers, a table, a picture and a page."""

from __future__ import annotations

import io
import math
import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from clsa_compile.calibration import page
from clsa_compile.calibration.task_report import TaskReport
from clsa_compile.errors import OptionError
from clsa_compile.ir.files import write_whole

__all__ = ["LayerQuality", "Quality", "WorstToken"]


@dataclass(frozen=True, slots=True)
class LayerQuality:
    """One layer: its role (see `ir.routing.role`), the anchor whose tokens it reads, the mass it keeps.

    anchor and recovered are None for a layer that attends to all tokens. recovered is the share of its own
    attention mass on the tokens that it got, a mean over heads and rows.
    """

    path: str
    role: str
    anchor: int | None = None
    recovered: float | None = None


@dataclass(frozen=True, slots=True)
class WorstToken:
    """The token whose prediction moved most: sequence and position (from 0), KL in nats, its id, its text."""

    sequence: int
    position: int
    kl: float
    token: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured, teacher-forced, over the scored tokens of all sequences.

    dense_loss, loss: mean cross-entropy in nats. kl: mean KL(dense || sparse) of the next token. agreement:
    share of positions with the same greedy token. by_sequence: the increase of perplexity of each. serves:
    [a][l], the share of its mass that layer l would keep on what layer a looks at most; NaN for l < a.
    """

    topk: int
    schedule: str
    tokens: int
    dense_loss: float
    loss: float
    kl: float
    agreement: float
    layers: tuple[LayerQuality, ...]
    worst_token: WorstToken
    by_sequence: tuple[float, ...] = ()
    serves: tuple[tuple[float, ...], ...] = ()

    @property
    def perplexity_increase(self) -> float:
        """The relative increase of perplexity over the dense model: 0.01 is one percent."""
        return math.expm1(self.loss - self.dense_loss)

    @property
    def worst_layer(self) -> int | None:
        """The layer that keeps least of its mass, None where all attend to all tokens."""
        kept = {i: layer.recovered for i, layer in enumerate(self.layers) if layer.recovered is not None}
        return min(kept, key=lambda i: kept[i], default=None)

    def numbers(self) -> dict[str, float]:
        """Returns the figures that a plan carries."""
        kept = [layer.recovered for layer in self.layers if layer.recovered is not None]
        return {
            "perplexity_increase": self.perplexity_increase,
            "kl": self.kl,
            "agreement": self.agreement,
            "least_recovered": min(kept, default=1.0),
            "tokens": self.tokens,
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain data, ready for JSON (NaN as None)."""
        serves = [[None if math.isnan(x) else x for x in row] for row in self.serves]
        found = {"perplexity_increase": self.perplexity_increase, "worst_layer": self.worst_layer}
        return {**asdict(self), **found, "by_sequence": list(self.by_sequence), "serves": serves}

    def with_text(self, text: str) -> Quality:
        """Returns the same with the worst token's text."""
        return replace(self, worst_token=replace(self.worst_token, text=text))

    def __str__(self) -> str:
        worst = self.worst_token
        named = f" {worst.text!r}" if worst.text else ""
        lines = [
            f"schedule {self.schedule}, {self.topk} tokens: perplexity {self.perplexity_increase:+.2%} "
            f"(loss {self.dense_loss:.4f} -> {self.loss:.4f}), KL {self.kl:.2e}, "
            f"same greedy token {self.agreement:.2%}, over {self.tokens} tokens",
            f"worst token: {worst.token}{named} at {worst.position} of sequence {worst.sequence}, "
            f"KL {worst.kl:.3f}",
        ]
        if (layer := self.worst_layer) is not None:
            lines.insert(
                1, f"worst layer: {self.layers[layer].path} keeps {self.layers[layer].recovered:.1%}"
            )
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("layer", "module", "role", "reads", "mass kept"):
            table.add_column(column, justify="left" if column == "module" else "right")
        for i, entry in enumerate(self.layers):
            kept = "" if entry.recovered is None else f"{entry.recovered:.1%}"
            table.add_row(
                str(i), entry.path, entry.role, "" if entry.anchor is None else str(entry.anchor), kept
            )
        out = io.StringIO()
        Console(file=out, width=110, force_terminal=False, color_system=None).print(table)
        return "\n".join((*lines, *(line.rstrip() for line in out.getvalue().rstrip().splitlines())))

    def heatmap(self, path: str | os.PathLike[str]) -> None:
        """Draws who could serve whom as a PNG. Raises OptionError where matplotlib is missing."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise OptionError("a picture needs matplotlib: pip install clsa[search]") from error
        size = len(self.serves)
        side = max(4.0, 0.22 * size + 2)
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        image = axes.imshow(self.serves, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axes.set_xlabel("layer that follows")
        axes.set_ylabel("layer that chooses")
        axes.set_title(f"attention mass kept on {self.topk} tokens (o: as planned)")
        pairs = [(layer.anchor, i) for i, layer in enumerate(self.layers) if layer.anchor is not None]
        anchors, members = [anchor for anchor, _ in pairs], [member for _, member in pairs]
        axes.plot(members, anchors, "o", color="white", markersize=3, mfc="none")
        figure.colorbar(image, ax=axes, shrink=0.8)
        try:
            write_whole(path, lambda partial: figure.savefig(partial, dpi=120, format="png"))
        except OSError as error:
            raise OptionError(f"no picture can be written to {os.fspath(path)!r}: {error}") from error

    def to_html(self, path: str | os.PathLike[str], tasks: TaskReport | None = None) -> None:
        """Writes one self-contained HTML file, with the heat map, and `tasks` where they were measured too.

        Raises OptionError where it cannot be written.
        """
        page.write(path, page.render(self, tasks))
