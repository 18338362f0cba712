"""The table and the plots of headline.py, from the cells in its JSON file."""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from decoders import VARIANTS, Config, attention_bytes
from results import write_text
from rich.table import Table
from timing import SPREAD

GIB = 2**30
GENERATED = (1024, 8192)
BASELINE, OURS = "transformer", "clsa"
# Tokens a second of prompts, steps, and end to end, as notes on the paper's tables 9 to 12 quote them.
PAPER_LENGTH = 131072
PAPER = {BASELINE: (1019, 431.16, 62.53), OURS: (20742, 3276.80, 1068.06)}
NAMED = 6  # cells in one line
SAMPLES = 16  # of the steps of a generation, whose mean is taken
COLUMNS = (
    "tokens", "batch", "decoder", "prefill tok/s", "step ms", "decode tok/s", "ratio", "attention ms",
    "share", "floor ms", "e2e 1K tok/s", "ratio ", "e2e 8K tok/s", "ratio  ", "KV GiB", "formula",
    "peak GiB", "how",
)  # fmt: skip

NOTES = """\
- **prefill tok/s**: a prompt of so many tokens, in one piece, to the logits of its last token, batch 1.
- **step ms**: device time of one decode step at the last slot of a full cache, a median; times are measured
  until two differ by no more than 1%, of which this is the longer. **decode tok/s**: batch over it.
  **ratio**: to the Transformer at the same length and batch, which may be computed (*how*).
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


def markdown(results: Results, planned: Collection[str], found: list[Row], pictures: list[Path]) -> str:
    """Gives the table, what else was found, and how columns are made."""
    about = results.environment
    bandwidth = ", ".join(f"{b / 1e12:.2f}" for b in results.bandwidth)
    config, cells = about["config"], {*planned, *results.cells}
    text = [
        "# Decoders of one shape: dense, cached once, and with an index",
        "",
        f"{about['device']}, torch {about['torch']}, {config['layers']} layers, hidden {config['hidden']}, "
        f"FFN {config['ffn']}, {config['heads']}/{config['kv_heads']} heads of {config['head_dim']}, window "
        f"{config['window']}, top {config['topk']}; random weights. Read bandwidth in TB/s, a value a call: "
        f"{bandwidth}. Made by `python benchmarks/headline.py --out docs/headline`.",
        "",
        f"{len(results.cells)} of {len(cells)} cells are measured. What is missing has no line, or a dash in "
        "one, and is a gap in the pictures.",
        "",
        "| " + " | ".join(name.strip() for name in COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(line) + " |" for line in texts(found)),
        "",
        *(f"![tokens a second: {path.stem.replace('_', ' ')}]({path.name})\n" for path in pictures),
        *beside_paper(found),
        *checks(results),
        *failures(results),
        *unsettled(results),
        "",
        NOTES,
    ]
    return "\n".join(text)


def beside_paper(found: list[Row]) -> Iterator[str]:
    """Writes why the ratio end to end is what it is, here and in the paper, where all of it was measured."""
    whole = [r for r in found if r.length == PAPER_LENGTH and r.step is not None and all(r.end_to_end)]
    bases, ours = ({r.batch: r for r in whole if r.variant == name} for name in PAPER)
    bases = {batch: row for batch, row in bases.items() if row.cell["computed_from"] is None}
    if not bases.keys() & ours.keys():
        return
    batch = max(bases.keys() & ours.keys())
    base, mine, largest = bases[batch], ours[batch], ours[max(ours)]
    prompts, steps, ends = map(times, PAPER[OURS], PAPER[BASELINE])
    there, its = (PAPER[name][0] for name in PAPER)
    yield (
        "End to end is so many prompts and so many steps, so its ratio lies between theirs. Here a prompt of "
        f"CLSA is {times(mine.prefill, base.prefill)} as fast as the Transformer's, a step of {batch} "
        f"sequences, the most at which both were measured, {times(mine.rate, base.rate)}, and so end to end "
        f"{end_ratios(mine, base)} tokens. In the paper (arXiv 2606.06467; B200, vLLM, 128K; quoted from "
        f"notes on it) prompts are {prompts} as fast, steps {steps}, end to end {ends}. Prompts make the "
        f"difference: the Transformer reads {base.prefill:.0f} tokens a second here and {there} there "
        f"({times(base.prefill, there)}), CLSA {mine.prefill:.0f} and {its} ({times(mine.prefill, its)})."
    )
    if largest.batch > batch:
        yield (
            f"With {largest.batch} sequences of CLSA to {batch} of the Transformer, whose cache then takes "
            f"{base.cell['cache_bytes'] / GIB:.0f} GiB, end to end is {end_ratios(largest, base)} tokens."
        )
    yield ""


def times(mine: float, its: float) -> str:
    """Writes how many times as much, as text has it."""
    return f"{mine / its:.1f}x"


def end_ratios(mine: Row, base: Row) -> str:
    """Writes how many times as fast it is end to end, for each number of generated tokens."""
    pairs = zip(GENERATED, mine.end_to_end, base.end_to_end, strict=True)
    return " and ".join(f"{ratio(ours, its)} with {count} generated" for count, ours, its in pairs)


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


def unsettled(results: Results) -> Iterator[str]:
    """Writes which times no two measurements agreed on, and how many were measured only once."""
    once = [key for key, cell in results.cells.items() if "ms" in cell and "spread" not in cell]
    if once:
        names = ", ".join(once[:NAMED]) + (", ..." if len(once) > NAMED else "")
        yield f"- {len(once)} cells were timed once, in a call that did not repeat times: {names}"
    for key, cell in results.cells.items():
        if cell.get("spread", 0) > SPREAD:
            yield f"- {key}: the two shortest of its times differ by {cell['spread']:.1%}"


def panel(
    axis: Any, found: list[Row], length: int, batches: list[int], rate: Callable[[Row], float | None]
) -> None:
    """Draws tokens a second by batch: hollow where computed, a gap where there is no cell."""
    ends = batches[0] / 1.3, batches[-1] * 1.3
    axis.set(title=f"{length} tokens", xlabel="sequences", ylabel="tokens / s", xlim=ends)
    axis.set_xscale("log", base=2)
    axis.set_xticks(batches, [str(batch) for batch in batches])
    cells = {(r.variant, r.batch): r for r in found if r.length == length and rate(r) is not None}
    if not cells:
        axis.set_yticks([])
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", va="center", color="gray")
        return
    axis.set_yscale("log")
    for color, variant in enumerate(VARIANTS):
        own = [cells.get((variant, batch)) for batch in batches]
        rates = [math.nan if r is None else rate(r) for r in own]
        label = f"{variant}: {len(own) - own.count(None)} of {len(batches)}"
        axis.plot(batches, rates, color=f"C{color}", label=label)
        for r in filter(None, own):
            face = "white" if r.cell["computed_from"] else f"C{color}"
            axis.plot(r.batch, rate(r), "o", color=f"C{color}", markerfacecolor=face)
    axis.legend(fontsize="small")


def places(results: Results, planned: Collection[str]) -> dict[int, list[int]]:
    """Gives the lengths of steps and the batches of each, measured or not."""
    everything = Results({}, [], dict.fromkeys([*planned, *results.cells]))
    found: dict[int, set[int]] = {}
    for length, batch, _ in everything.keys("decode"):
        found.setdefault(length, set()).add(batch)
    return {length: sorted(found[length]) for length in sorted(found)}


def draw(results: Results, planned: Collection[str], found: list[Row], out: Path) -> list[Path]:
    """Draws steps, and what is generated end to end, where matplotlib is installed; a panel a length."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: pip install matplotlib; --report draws them later, also elsewhere")
        return []
    batches = places(results, planned)
    note = f"{results.environment['device']}; hollow: computed from fewer layers; gaps: not measured"
    pictures = {
        "decode": {"decode steps": lambda r: r.rate},
        "end_to_end": {
            f"a prompt and {count} generated tokens": lambda r, i=i: r.end_to_end[i]
            for i, count in enumerate(GENERATED)
        },
    }
    paths = []
    for name, rates in pictures.items():
        size = 4.5 * len(batches), 0.5 + 3.8 * len(rates)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(note)
        lines = figure.subfigures(len(rates), 1, squeeze=False)[:, 0]
        for line, (title, rate) in zip(lines, rates.items(), strict=True):
            line.suptitle(title)
            for axis, length in zip(line.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
                panel(axis, found, length, batches[length], rate)
        paths.append(out.with_name(f"{out.name}_{name}.png"))
        figure.savefig(paths[-1], dpi=110)
    return paths


def write_report(results: Results, planned: Collection[str], out: Path) -> Table:
    """Writes OUT.md and, where there are steps, two pictures; returns the table for the console.

    `planned` names the cells that there should be.
    """
    found = rows(results)
    pictures = draw(results, planned, found, out) if any(r.step is not None for r in found) else []
    write_text(out.with_name(out.name + ".md"), markdown(results, planned, found, pictures))
    table = Table(title=f"{results.environment['device']}; {out.name}.md says how columns are made")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("decoder", "how") else "right")
    for line in texts(found):
        table.add_row(*line)
    return table
