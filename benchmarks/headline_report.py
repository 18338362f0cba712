"""The table and the plots of headline.py, from the cells in its JSON file."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from decoders import VARIANTS, Config, attention_bytes
from rich.table import Table

GIB = 2**30
GENERATED = (1024, 8192)
BASELINE = "transformer"
SAMPLES = 16  # of the steps of a generation, whose mean is taken
COLUMNS = (
    "tokens", "batch", "decoder", "prefill tok/s", "step ms", "decode tok/s", "ratio", "attention ms",
    "share", "floor ms", "e2e 1K tok/s", "ratio ", "e2e 8K tok/s", "ratio  ", "KV GiB", "formula",
    "peak GiB", "how",
)  # fmt: skip

NOTES = """\
- **prefill tok/s**: a prompt of so many tokens, in one piece, to the logits of its last token, batch 1.
- **step ms**: device time of one decode step at the last slot of a full cache, median. **decode tok/s**:
  batch over it. **ratio**: to the Transformer at the same length and batch, which may be computed (*how*).
- **attention ms**: the step less the same step with attention and selection left out; **share** of the step.
  **floor ms**: cache bytes that attention and selection must read over the bandwidth of a plain sum.
- **e2e**: batch x generated tokens over (batch x one prefill + the sum of their decode steps). Steps between
  measured lengths are interpolated, and beyond the longest extrapolated, linearly; where one length
  was measured, all steps take as long. The sequences of a batch are prefilled one after the other. Nothing
  was generated end to end.
- **KV GiB**: what the device allocated for the cache. **formula**: its bytes by the sizes; layers with a
  window keep a window.
- **peak GiB**: the most that tensors held during the decode steps, weights and graphs' pools included.
- **how**: the layers that were measured. Two numbers: the time is computed from those two, linearly, because
  the whole does not fit, or to save time (*quick*). KV and peak are then those of the larger.
"""


@dataclass
class Results:
    """What is in the JSON file. bandwidth: bytes a second, measured anew in every call."""

    environment: dict[str, Any]
    bandwidth: list[float]
    cells: dict[str, dict[str, Any]]

    def milliseconds(self, kind: str, length: int, batch: int, variant: str) -> float | None:
        """Returns a cell's time, None where there is none."""
        return self.cells.get(f"{kind}/{length}/{batch}/{variant}", {}).get("ms")

    def keys(self, kind: str) -> Iterator[tuple[int, int, str]]:
        """Yields length, batch and variant of a kind's cells."""
        for key in self.cells:
            name, length, batch, variant = key.split("/")
            if name == kind:
                yield int(length), int(batch), variant


@dataclass(frozen=True)
class Row:
    """One line; milliseconds, bytes, tokens a second. None is not measured."""

    length: int
    batch: int
    variant: str
    prefill: float | None
    step: float | None
    attention: float | None
    floor: float | None
    end_to_end: tuple[float | None, ...]
    cell: dict[str, Any]

    @property
    def rate(self) -> float | None:
        """Tokens a second of decode steps."""
        return None if self.step is None else 1e3 * self.batch / self.step


def step_at(points: list[tuple[int, float]], length: float) -> float:
    """Interpolates a step's milliseconds between measured lengths, and extrapolates beyond them."""
    if len(points) == 1:
        return points[0][1]
    pairs = list(pairwise(points))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if length <= pair[1][0]), pairs[-1])
    return y0 + (y1 - y0) * (length - x0) / (x1 - x0)


def end_to_end(results: Results, length: int, batch: int, variant: str, generated: int) -> float | None:
    """Computes tokens a second of a prompt and `generated` tokens after it, from measured times."""
    prompt = results.milliseconds("prefill", length, 1, variant)
    found = ((n, results.milliseconds("decode", n, batch, variant)) for n, b, v in results.keys("decode")
             if (b, v) == (batch, variant))  # fmt: skip
    points = sorted((n, ms) for n, ms in found if ms is not None)
    if prompt is None or not any(n == length for n, _ in points):
        return None
    middles = (length + generated * (i + 0.5) / SAMPLES for i in range(SAMPLES))
    steps = generated * sum(step_at(points, at) for at in middles) / SAMPLES
    return 1e3 * batch * generated / (batch * prompt + steps)


def rows(results: Results) -> list[Row]:
    """Makes the lines, one a length, batch and variant."""
    config = Config(**results.environment["config"] | {"attention": "yoco"})
    order = {name: i for i, name in enumerate(VARIANTS)}
    places = sorted({*results.keys("decode")}, key=lambda p: (p[0], p[1], order[p[2]]))
    return [row(results, config, *place) for place in places]


def row(results: Results, config: Config, length: int, batch: int, variant: str) -> Row:
    """Makes one line."""
    own = Config(**vars(config) | {"attention": VARIANTS[variant].attention})
    step = results.milliseconds("decode", length, batch, variant)
    others = results.milliseconds("rest", 0, batch, variant)
    prompt = results.milliseconds("prefill", length, 1, variant)
    item = 4 if results.environment["device"].startswith("CPU") else 2
    bandwidth = max(results.bandwidth, default=None)
    read = attention_bytes(VARIANTS[variant], own, batch, length, item)
    return Row(
        length,
        batch,
        variant,
        prefill=None if prompt is None else 1e3 * length / prompt,
        step=step,
        attention=None if step is None or others is None else step - others,
        floor=None if bandwidth is None else 1e3 * read / bandwidth,
        end_to_end=tuple(end_to_end(results, length, batch, variant, count) for count in GENERATED),
        cell=results.cells[f"decode/{length}/{batch}/{variant}"],
    )


def number(value: float | None, form: str = ".2f") -> str:
    """Writes a number, or a dash."""
    return "-" if value is None else format(value, form)


def ratio(mine: float | None, its: float | None) -> str:
    """Writes how many times as fast."""
    return "-" if mine is None or its is None else f"{mine / its:.2f}x"


def how(cell: dict[str, Any]) -> str:
    """Says what a time comes from."""
    if "error" in cell:
        return str(cell["error"])
    if cell["computed_from"] is None:
        return f"{cell['layers']} layers"
    small, large = cell["computed_from"]
    return f"from {small} and {large} ({'quick' if cell['fits'] else 'does not fit'})"


def texts(found: list[Row]) -> Iterator[list[str]]:
    """Writes the lines."""
    bases = {(r.length, r.batch): r for r in found if r.variant == BASELINE}
    for r in found:
        base = bases.get((r.length, r.batch))
        share = None if r.attention is None or r.step is None else f"{r.attention / r.step:.0%}"
        ends = (
            text
            for i, mine in enumerate(r.end_to_end)
            for text in (number(mine, ".1f"), ratio(mine, base and base.end_to_end[i]))
        )
        sizes = (r.cell.get(name) for name in ("cache_bytes", "cache_formula", "peak_bytes"))
        gib = (number(None if size is None else size / GIB, ".3f") for size in sizes)
        yield [
            str(r.length), str(r.batch), r.variant, number(r.prefill, ".0f"), number(r.step, ".3f"),
            number(r.rate, ".1f"), ratio(r.rate, base and base.rate), number(r.attention, ".3f"),
            share or "-", number(r.floor, ".3f"), *ends, *gib, how(r.cell),
        ]  # fmt: skip


def markdown(results: Results, lines: list[list[str]]) -> str:
    """Gives the table, what else was found, and how columns are made."""
    about = results.environment
    bandwidth = ", ".join(f"{b / 1e12:.2f}" for b in results.bandwidth)
    config = about["config"]
    text = [
        "# Decoders of one shape: dense, cached once, and with an index",
        "",
        f"{about['device']}, torch {about['torch']}, {config['layers']} layers, hidden {config['hidden']}, "
        f"FFN {config['ffn']}, {config['heads']}/{config['kv_heads']} heads of {config['head_dim']}, window "
        f"{config['window']}, top {config['topk']}; random weights. Read bandwidth in TB/s, a value a call: "
        f"{bandwidth}. Made by `python benchmarks/headline.py --out docs/headline`.",
        "",
        "| " + " | ".join(name.strip() for name in COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(line) + " |" for line in lines),
        "",
        *checks(results),
        *failures(results),
        "",
        NOTES,
    ]
    return "\n".join(text)


def checks(results: Results) -> Iterator[str]:
    """Writes the comparisons with eager."""
    for length, batch, variant in results.keys("check"):
        cell = results.cells[f"check/{length}/{batch}/{variant}"]
        if "error" in cell:
            continue
        verdict = "equal" if cell["passed"] else "**DIFFERENT**"
        yield (
            f"- {variant}, {cell['layers']} layers, float32, a prompt of {length - 1} tokens and a step, "
            f"compiled against eager: {verdict}, {cell['difference']:.1e} of {cell['budget']:.1e}"
        )


def failures(results: Results) -> Iterator[str]:
    """Writes what could not be measured."""
    for key, cell in results.cells.items():
        if "error" in cell:
            yield f"- {key}: {cell['error']}"


def draw_decode(pyplot: Any, found: list[Row], path: Path) -> None:
    """Draws tokens a second by batch, a picture a length; hollow where computed."""
    lengths = sorted({r.length for r in found})
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(4.5 * len(lengths), 4), squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=True):
        for color, variant in enumerate(VARIANTS):
            own = [r for r in found if (r.length, r.variant) == (length, variant) and r.rate is not None]
            if not own:
                continue
            batches, rates = [r.batch for r in own], [r.rate for r in own]
            axis.plot(batches, rates, color=f"C{color}", label=variant)
            for r in own:
                face = "white" if r.cell["computed_from"] else f"C{color}"
                axis.plot(r.batch, r.rate, "o", color=f"C{color}", markerfacecolor=face)
        axis.set(
            title=f"{length} tokens", xscale="log", yscale="log", xlabel="sequences", ylabel="tokens / s"
        )
        axis.set_xscale("log", base=2)
        axis.legend(fontsize="small")
    figure.suptitle("decode steps (hollow: computed from fewer layers)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_end_to_end(pyplot: Any, found: list[Row], path: Path) -> None:
    """Draws end to end tokens a second at the largest batch of each length."""
    figure, axes = pyplot.subplots(1, len(GENERATED), figsize=(5.5 * len(GENERATED), 4), squeeze=False)
    lengths = sorted({r.length for r in found})
    for i, (axis, generated) in enumerate(zip(axes[0], GENERATED, strict=True)):
        for place, variant in enumerate(VARIANTS):
            for at, length in enumerate(lengths):
                own = [r for r in found if (r.length, r.variant) == (length, variant) and r.end_to_end[i]]
                if own:
                    largest = max(own, key=lambda r: r.batch)
                    name = variant if at == 0 else None
                    axis.bar(
                        at + 0.16 * (place - 2), largest.end_to_end[i], 0.15, color=f"C{place}", label=name
                    )
        axis.set(title=f"{generated} generated tokens", yscale="log", ylabel="tokens / s, largest batch")
        axis.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        if axis.patches:
            axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw(found: list[Row], out: Path) -> None:
    """Draws two pictures, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: pip install matplotlib; --report draws them later, also elsewhere")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    draw_decode(pyplot, found, out.with_name(out.name + "_decode.png"))
    draw_end_to_end(pyplot, found, out.with_name(out.name + "_end_to_end.png"))


def write_report(results: Results, out: Path) -> Table:
    """Writes OUT.md and, where there are steps, two pictures; returns the table for the console."""
    found = rows(results)
    lines = list(texts(found))
    out.with_name(out.name + ".md").write_text(markdown(results, lines))
    if any(r.step is not None for r in found):
        draw(found, out)
    table = Table(title=f"{results.environment['device']}; {out.name}.md says how columns are made")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("decoder", "how") else "right")
    for line in lines:
        table.add_row(*line)
    return table
