"""What each generated kernel takes against what torch offers for the same work; run by kernels.py.

The cases of decode steps with plain caches are here, the others in kernel_cases.py.

A time is the median over replays of a CUDA graph that holds several calls, on different data wherever one
call's data would fit into the L2 cache, divided by the number of calls. Bytes are those that must be read.
Each result is compared in the same run with one computed in float32 by torch.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from timing import read_bandwidth
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from clsa_compile.ir.files import write_text
from clsa_compile.ir.pages import gathered as in_order
from clsa_compile.ir.references import index_scores_reference, mask_bounds_reference
from clsa_compile.ir.scores import DOT_PRODUCT, LIGHTNING, Score
from clsa_compile.kernels.catalog import VARIANTS
from clsa_compile.kernels.index_topk import decode as index_decode
from clsa_compile.kernels.index_topk.select import padded, segments, select
from clsa_compile.kernels.launch import Wrap

CUDA = torch.device("cuda")
LAUNCH = {(v.op, v.name): v.launch for v in VARIANTS}
# Ten times the L2 cache of an H100 or H200.
COLD_BYTES = 512 * 2**20
MOST_SETS = 16


@dataclass(frozen=True)
class Result:
    """Microseconds of one call, ours and torch's; the error of ours against float32.

    `reads` and `flops` are what the work needs at least; `ceiling` is the share of what the chip was measured
    to do in the same run, of bytes or of flops, whichever it is nearer to.
    """

    kernel: str
    shape: str
    ours: float
    torch: float
    reads: float
    flops: float
    ceiling: float
    error: float
    budget: float

    @property
    def right(self) -> bool:
        """True when the error is within its budget."""
        return self.error <= self.budget


@dataclass(frozen=True)
class Chip:
    """What the device was measured to do: bytes read in a second by a sum, flops in a second by a matmul."""

    bandwidth: float
    flops: float

    def result(
        self,
        kernel: str,
        shape: str,
        times: tuple[float, float],
        work: tuple[float, float],
        error: float,
        budget: float,
    ) -> Result:
        """Returns a Result; `times` are ours and torch's, `work` is bytes and flops."""
        seconds = times[0] * 1e-6
        ceiling = max(work[0] / self.bandwidth, work[1] / self.flops) / seconds
        return Result(kernel, shape, *times, *work, ceiling, error, budget)


@dataclass(frozen=True)
class Shape:
    """One step: B sequences, T cache slots of which the first `valid` are filled.

    A prompt has several `queries`, which end where the cache does, and may read a `window` of keys only.
    """

    B: int
    T: int
    valid: int = 0
    queries: int = 1
    window: int = 0

    @property
    def keys(self) -> int:
        """How many keys attention sees."""
        return self.valid or self.T

    def __str__(self) -> str:
        rows = f" S={self.queries}" if self.queries > 1 else ""
        filled = f" {self.valid} valid" if self.valid else ""
        window = f" window {self.window}" if self.window else ""
        return f"B={self.B}{rows} T={self.T}{filled}{window}"


DENSE = (Shape(1, 131072), Shape(4, 131072), Shape(32, 32768), Shape(1, 131072, 16384))
SPARSE = (Shape(1, 131072), Shape(4, 131072), Shape(32, 32768))
SCANS = (Shape(1, 131072), Shape(8, 131072))
STAGES = (Shape(1, 131072), Shape(32, 32768))
ROWS = (
    Shape(1, 131072), Shape(8, 131072), Shape(64, 131072), Shape(256, 131072),
    Shape(1, 8192), Shape(256, 8192), Shape(1, 1048576), Shape(32, 1048576), Shape(256, 1048576),
)  # fmt: skip
H, HKV, D, TOPK = 24, 8, 128, 2048
# A graph holds calls worth so many microseconds, for its start costs some; and no more calls than this.
GRAPH_US = 4000.0
MOST_CALLS = 64
# It is replayed for so many seconds first: a GPU that waits for a compiler lowers its clocks.
WARM_SECONDS = 0.05
SLOW = 1000.0  # microseconds; slower calls are repeated less often


def straight(kernel: Any) -> Any:
    """Is the `wrap` of eager code."""
    return kernel


def graph_time(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Gives the median microseconds of one call, many of them recorded into one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
        once = elapsed(calls[0])
    many = list(islice(cycle(calls), max(1, len(calls), min(MOST_CALLS, int(GRAPH_US / once)))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in many:
            call()
    warm = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < warm:
        elapsed(graph.replay)
    return statistics.median(elapsed(graph.replay) for _ in range(5 if once > SLOW else repeats)) / len(many)


def elapsed(call: Callable[[], object]) -> float:
    """Gives the microseconds between two CUDA events around a call, and waits for its end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end)


def sets_for(bytes_read: int) -> int:
    """Returns how many sets of inputs keep each other out of the L2 cache."""
    return min(MOST_SETS, max(1, math.ceil(COLD_BYTES / bytes_read)))


def relative(got: Tensor, exact: Tensor) -> float:
    """Returns the largest difference by the largest value."""
    return float((got.float() - exact.float()).abs().max() / exact.float().abs().max())


def normal(*sizes: int) -> Tensor:
    """Returns bfloat16 numbers of the normal distribution."""
    return torch.randn(sizes, device=CUDA, dtype=torch.bfloat16)


def dense(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """Dense decode with a boolean mask over a static cache, against flash SDPA on its filled part."""
    bytes_read = 2 * shape.B * HKV * shape.keys * D * 2
    sets = [
        (normal(shape.B, HKV, shape.T, D), normal(shape.B, HKV, shape.T, D))
        for _ in range(sets_for(bytes_read))
    ]
    q = normal(shape.B, H, 1, D)
    mask = (torch.arange(shape.T, device=CUDA) < shape.keys).view(1, 1, 1, -1)
    bounds = mask_bounds_reference(q, mask, [], H, shape.T, "")

    def ours(k: Tensor, v: Tensor) -> Any:
        args = (q, k, v, mask, bounds, [], None, D**-0.5, 0.0, "")
        return LAUNCH["attention", "decode"](*args, wrap=straight)

    def flash(k: Tensor, v: Tensor) -> Any:
        k, v = k[:, :, : shape.keys], v[:, :, : shape.keys]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    took = graph_time([partial(ours, *s) for s in sets], repeats)
    theirs = graph_time([partial(flash, *s) for s in sets], repeats)
    k, v = (x[:1, :, : shape.keys].float() for x in sets[0])
    exact = scaled_dot_product_attention(q[:1].float(), k, v, enable_gqa=True)
    error = relative(ours(*sets[0])[0][:1], exact)
    work = (bytes_read, 4.0 * shape.B * H * shape.keys * D)
    yield chip.result("attention decode", str(shape), (took, theirs), work, error, 2**-7)


def gathered(k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the chosen keys and values [B, HKV, TOPK, D], copied by torch."""
    b, hkv, _, d = k.shape
    rows = indices.long().view(b, 1, TOPK, 1)
    return k.gather(2, rows.expand(b, hkv, TOPK, d)), v.gather(2, rows.expand(b, hkv, TOPK, v.shape[3]))


def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, pages: Tensor | None = None) -> Tensor:
    """Is our attention over chosen tokens."""
    args = (q, k, v, indices, None, None, [], None, D**-0.5, 0.0, "", pages)
    out: Tensor = LAUNCH["sparse_attention", "gather"](*args, wrap=straight)
    return out


def attend_by_torch(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
    """Is the same in torch: gather, then SDPA."""
    return scaled_dot_product_attention(q, *gathered(k, v, indices), scale=D**-0.5, enable_gqa=True)


def sparse(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """Attention over 2048 random tokens, against gathering them with torch and SDPA."""
    k, v = normal(shape.B, HKV, shape.T, D), normal(shape.B, HKV, shape.T, D)
    q = normal(shape.B, H, 1, D)
    bytes_read = 4 * shape.B * HKV * TOPK * D
    sets = [random_indices(shape, seed) for seed in range(sets_for(bytes_read))]
    took = graph_time([partial(attend, q, k, v, s) for s in sets], repeats)
    other = graph_time([partial(attend_by_torch, q, k, v, s) for s in sets], repeats)
    near = [x.float() for x in gathered(k, v, sets[0])]
    exact = scaled_dot_product_attention(q.float(), *near, scale=D**-0.5, enable_gqa=True)
    error = relative(attend(q, k, v, sets[0]), exact)
    work = (bytes_read, 4.0 * shape.B * H * TOPK * D)
    yield chip.result("sparse attention", f"{shape} k={TOPK}", (took, other), work, error, 2**-7)


def random_indices(shape: Shape, seed: int) -> Tensor:
    """Returns ascending random positions [B, 1, 1, TOPK]."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    rows = [torch.randperm(shape.T, device=CUDA, generator=generator)[:TOPK] for _ in range(shape.B)]
    return torch.stack(rows).sort(-1).values.to(torch.int32).view(shape.B, 1, 1, TOPK)


@dataclass(frozen=True)
class Index:
    """One index: its queries, score and block table, and the ways to compute and to choose."""

    q: Tensor
    weight: Tensor | None
    score: Score
    pages: Tensor | None = None

    def scores(self, k: Tensor) -> Tensor:
        """Returns our scores, rows padded."""
        given = (self.weight, None, None, None, [], D**-0.5, self.score.text, "", False)
        return index_decode.scan(self.q, k, *given, self.pages, wrap=straight)

    def choose(self, k: Tensor, wrap: Wrap = straight) -> Tensor:
        """Returns the chosen positions [B, 1, S, TOPK]."""
        given = (self.weight, None, None, None, [], TOPK, D**-0.5, self.score.text, "", False)
        name = "decode" if self.q.shape[2] == 1 else "rows"
        out: Tensor = LAUNCH["index_topk", name](self.q, k, *given, self.pages, wrap=wrap)
        return out

    def scores_by_torch(self, k: Tensor) -> Tensor:
        """Returns scores [B, S, T] as torch computes them."""
        # One batched matmul; with the key head as a dimension to broadcast, torch copies the keys.
        dot = torch.einsum("bhsd,btd->bhst", self.q, in_order(k, self.pages).squeeze(1)).float()
        points = dot if self.weight is None else dot.relu() * self.weight.unsqueeze(-1)
        return points.sum(1)

    def choose_by_torch(self, k: Tensor) -> Tensor:
        """Returns the positions that torch chooses."""
        return self.scores_by_torch(k).topk(TOPK, sorted=False).indices.to(torch.int32).unsqueeze(1)

    def exact(self, k: Tensor) -> Tensor:
        """Returns float32 scores [B, 1, S, T]."""
        given = (self.weight, None, None, [], D**-0.5, self.score, "", False)
        return index_scores_reference(self.q, in_order(k, self.pages), *given)


def index_of(batch: int, heads: int, queries: int = 1) -> Index:
    """Returns an index of 64 or so heads as DSA has it, or of one as CLSA has it."""
    q = normal(batch, heads, queries, D)
    if heads == 1:
        return Index(q, None, DOT_PRODUCT)
    return Index(q, torch.randn(batch, heads, queries, device=CUDA), LIGHTNING)


def miss(index: Index, k: Tensor) -> float:
    """Returns how far the scores of what we choose are from the best ones."""
    exact = index.exact(k)
    chosen = exact.gather(-1, index.choose(k).long()).sort(-1, descending=True).values
    return relative(chosen, exact.topk(TOPK).values)


def scan(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """Scores of all keys, without and with the selection: 64 index heads (DSA) and one (CLSA)."""
    bytes_read = shape.B * shape.T * D * 2
    sets = [normal(shape.B, 1, shape.T, D) for _ in range(sets_for(bytes_read))]
    for heads in (64, 1):
        yield from scans(shape, index_of(shape.B, heads), sets, chip, repeats)


def scans(shape: Shape, index: Index, sets: Sequence[Tensor], chip: Chip, repeats: int) -> Iterator[Result]:
    """Is `scan` of one index; `sets` are keys, in pages where the index has a block table."""
    heads, paged = index.q.shape[1], "" if index.pages is None else ", paged"
    name = f"{shape} {heads} head{'s' if heads > 1 else ''}"
    took = graph_time([partial(index.scores, s) for s in sets], repeats)
    other = graph_time([partial(index.scores_by_torch, s) for s in sets], repeats)
    error = relative(index.scores(sets[0])[..., : shape.T], index.exact(sets[0]))
    work = (2.0 * shape.B * shape.T * D, 2.0 * shape.B * heads * shape.T * D)
    yield chip.result(f"index scan{paged}", name, (took, other), work, error, 1e-5)
    took = graph_time([partial(index.choose, s) for s in sets], repeats)
    other = graph_time([partial(index.choose_by_torch, s) for s in sets], repeats)
    error = miss(index, sets[0])
    yield chip.result(f"index scan and top-k{paged}", name, (took, other), work, error, 1e-5)


def prefill(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """The scan of 4096 queries with 16 heads, chunk by chunk; torch on 256 queries, all it has memory for."""
    queries, few, heads = 4096, 256, 16
    k = normal(1, 1, shape.T, D)
    index = index_of(1, heads, queries)

    def scans_only(kernel: Any) -> Any:
        return kernel if kernel.__name__ == "index_scan_rows" else Nothing()

    took = graph_time([partial(index.choose, k, scans_only)], repeats)
    part = Index(index.q[:, :, :few], index.weight[:, :, :few], index.score)  # type: ignore[index]
    other = graph_time([partial(part.scores_by_torch, k)], repeats) * (queries / few)
    flops = 2.0 * queries * shape.T * heads * D
    error = miss(part, k)
    name = f"{shape} {queries} queries {heads} heads"
    yield chip.result("index scan, prefill", name, (took, other), (shape.T * D * 2, flops), error, 1e-5)


class Nothing:
    """Stands for a kernel that is not to run."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **_: None


def stage(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """The whole stage: index, choice, attention; and one index for 4 and 16 layers against dense flash."""
    keys = normal(shape.B, 1, shape.T, D)
    k, v = normal(shape.B, HKV, shape.T, D), normal(shape.B, HKV, shape.T, D)
    q = normal(shape.B, H, 1, D)

    def ours(index: Index, layers: int = 1) -> Tensor:
        indices = index.choose(keys)
        for _ in range(layers - 1):
            attend(q, k, v, indices)
        return attend(q, k, v, indices)

    def theirs(index: Index) -> Tensor:
        return attend_by_torch(q, k, v, index.choose_by_torch(keys).squeeze(1))

    def flash(layers: int) -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            for _ in range(layers):
                scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def work(layers: int, heads: int = 1) -> tuple[float, float]:
        keys_read, rows_read = shape.T * D, layers * HKV * TOPK * D
        flops = heads * keys_read + 2 * layers * H * TOPK * D
        return 2.0 * shape.B * (keys_read + 2 * rows_read), 2.0 * shape.B * flops

    def error(index: Index) -> float:
        near = [x.float() for x in gathered(k, v, index.choose(keys))]
        exact = scaled_dot_product_attention(q.float(), *near, scale=D**-0.5, enable_gqa=True)
        return relative(ours(index), exact)

    for heads in (64, 1):
        index = index_of(shape.B, heads)
        took = graph_time([partial(ours, index)], repeats)
        other = graph_time([partial(theirs, index)], repeats)
        name = f"{shape} {heads} head{'s' if heads > 1 else ''}"
        yield chip.result("stage, torch's way", name, (took, other), work(1, heads), error(index), 2**-7)
    for layers in (4, 16):
        took = graph_time([partial(ours, index, layers)], repeats)
        other = graph_time([partial(flash, layers)], repeats)
        name = f"{shape} {layers} layers"
        yield chip.result("stage, dense flash", name, (took, other), work(layers), error(index), 2**-7)


def topk(shape: Shape, chip: Chip, repeats: int) -> Iterator[Result]:
    """The selection by itself, against torch.topk (unsorted).

    Scores come from the scan, so they are in the L2 cache where they fit, here as there.
    """
    rows = torch.randn(shape.B, 1, 1, padded(shape.T), device=CUDA)
    scores = rows[..., : shape.T]
    out = torch.empty(shape.B, 1, 1, TOPK, dtype=torch.int32, device=CUDA)
    nt = segments(shape.B, shape.T, torch.cuda.get_device_properties(CUDA).multi_processor_count)
    took = graph_time([lambda: select(rows, None, out, 0, shape.T, nt, straight)], repeats)
    other = graph_time([lambda: scores.topk(TOPK, sorted=False)], repeats)
    chosen = scores.gather(-1, out.long()).sort(-1, descending=True).values
    error = relative(chosen, scores.topk(TOPK).values)
    bytes_read = 4 * shape.B * shape.T
    yield chip.result("top-k", f"{shape} k={TOPK}", (took, other), (bytes_read, bytes_read / 4), error, 0.0)


Part = tuple[Callable[[Shape, Chip, int], Iterator[Result]], tuple[Shape, ...]]
PARTS: dict[str, Part] = {
    "dense": (dense, DENSE),
    "sparse": (sparse, SPARSE),
    "scan": (scan, SCANS),
    "topk": (topk, ROWS),
    "prefill": (prefill, SCANS[:1]),
    "stage": (stage, STAGES),
}


def matmul_rate() -> float:
    """Returns the flops in a second of a large bfloat16 matmul."""
    n = 8192
    a, b = normal(n, n), normal(n, n)
    return 2.0 * n**3 / (graph_time([lambda: a @ b], 10) * 1e-6)


def table_of(results: Sequence[Result], chip: Chip) -> Table:
    """Returns the results as a table, one line each."""
    peak = f"{chip.bandwidth / 1e12:.2f} TB/s read by a sum, {chip.flops / 1e12:.0f} Tflop/s by a matmul"
    table = Table(title=f"microseconds a call; {peak}")
    for name in ("kernel", "shape", "clsa", "torch", "ratio", "MB", "ceiling", "error"):
        table.add_column(name, justify="left" if name in ("kernel", "shape") else "right")
    for r in results:
        table.add_row(
            r.kernel,
            r.shape,
            f"{r.ours:.1f}",
            f"{r.torch:.1f}",
            f"{r.torch / r.ours:.2f}x",
            f"{r.reads / 1e6:.1f}",
            f"{100 * r.ceiling:.0f}%",
            f"{r.error:.1e}" if r.right else f"[red]{r.error:.1e} > {r.budget:.1e}[/red]",
        )
    return table


def main() -> int:
    """Runs the parts that were asked for; returns 1 when a result is wrong."""
    from kernel_cases import CASES  # which imports this module

    parts = {name: (part,) for name, part in PARTS.items()} | CASES
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=sorted(parts), default=list(parts))
    parser.add_argument("--repeats", type=int, default=30, help="replays of each graph")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    parser.add_argument("--plot", type=Path, help="also draw them under the roofline, in this PNG file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this needs a CUDA GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    results: list[Result] = []
    with torch.no_grad():
        chip = Chip(read_bandwidth(CUDA), matmul_rate())
        for run, shapes in chain.from_iterable(parts[name] for name in options.only):
            for shape in shapes:
                results += run(shape, chip, options.repeats)
                torch.cuda.empty_cache()
                print(f"{results[-1].kernel}, {shape}", file=sys.stderr)
    Console(width=140).print(table_of(results, chip))
    if options.out:
        machine = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            **asdict(chip),
        }
        text = {"machine": machine, "results": [asdict(r) for r in results]}
        write_text(options.out, json.dumps(text, indent=1) + "\n")
    if options.plot:
        from roofline import draw

        draw(results, chip, options.plot)
    return 0 if all(r.right for r in results) else 1
