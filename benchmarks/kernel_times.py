"""Times each generated kernel by itself against what torch offers for the same work.

    python benchmarks/kernel_times.py --out kernels.json
    python benchmarks/kernel_times.py --only topk

bfloat16, one CUDA GPU. A time is the median over replays of a CUDA graph that holds several calls on
different data, so that no call finds its data in the L2 cache, divided by the number of calls. "read" is the
share of the bandwidth of a plain sum on this device, counting only bytes that must be read. Each result is
compared in the same run with one computed in float32 by torch.
"""

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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

from clsa_compile.ir.ops import index_scores_reference, mask_bounds_reference
from clsa_compile.ir.scores import DOT_PRODUCT, LIGHTNING, Score
from clsa_compile.kernels.catalog import VARIANTS
from clsa_compile.kernels.index_topk import decode as index_decode
from clsa_compile.kernels.index_topk.select import padded, segments, select

CUDA = torch.device("cuda")
LAUNCH = {(v.op, v.name): v.launch for v in VARIANTS}
# More than twice the L2 cache of an H100 or H200.
COLD_BYTES = 128 * 2**20
MOST_SETS = 16


@dataclass(frozen=True)
class Result:
    """Microseconds of one call, ours and torch's; the error of ours against float32."""

    kernel: str
    shape: str
    ours: float
    torch: float
    read: float
    error: float
    budget: float

    @property
    def right(self) -> bool:
        """True when the error is within its budget."""
        return self.error <= self.budget


@dataclass(frozen=True)
class Shape:
    """One decode step: B sequences, T cache slots of which the first `valid` are filled."""

    B: int
    T: int
    valid: int = 0

    @property
    def keys(self) -> int:
        """How many keys attention sees."""
        return self.valid or self.T

    def __str__(self) -> str:
        filled = f" {self.valid} valid" if self.valid else ""
        return f"B={self.B} T={self.T}{filled}"


SHAPES = (Shape(1, 131072), Shape(4, 131072), Shape(8, 32768), Shape(1, 131072, 16384))
ROWS = (
    Shape(1, 131072), Shape(4, 131072), Shape(8, 131072), Shape(32, 131072), Shape(64, 131072),
    Shape(1, 32768), Shape(1, 1048576),
)  # fmt: skip
H, HKV, D, TOPK = 24, 8, 128, 2048


def straight(kernel: Any) -> Any:
    """Is the `wrap` of eager code."""
    return kernel


def graph_time(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Gives the median microseconds of one call, all of them recorded into one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    del kept, graph
    return statistics.median(times[3:])


def sets_for(bytes_read: int) -> int:
    """Returns how many sets of inputs keep each other out of the L2 cache."""
    return min(MOST_SETS, max(1, math.ceil(COLD_BYTES / bytes_read)))


def relative(got: Tensor, exact: Tensor) -> float:
    """Returns the largest difference by the largest value."""
    return float((got.float() - exact.float()).abs().max() / exact.float().abs().max())


def normal(*sizes: int) -> Tensor:
    """Returns bfloat16 numbers of the normal distribution."""
    return torch.randn(sizes, device=CUDA, dtype=torch.bfloat16)


def dense(shape: Shape, bandwidth: float, repeats: int) -> Iterator[Result]:
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
    share = bytes_read / (took * 1e-6) / bandwidth
    yield Result("attention decode", str(shape), took, theirs, share, error, 2**-7)


def sparse(shape: Shape, bandwidth: float, repeats: int) -> Iterator[Result]:
    """Attention over 2048 random tokens, against gathering them with torch and SDPA."""
    k, v = normal(shape.B, HKV, shape.T, D), normal(shape.B, HKV, shape.T, D)
    q = normal(shape.B, H, 1, D)
    bytes_read = 2 * shape.B * HKV * TOPK * D * 2
    sets = [random_indices(shape, seed) for seed in range(sets_for(bytes_read))]

    def ours(indices: Tensor) -> Tensor:
        args = (q, k, v, indices, None, None, [], None, D**-0.5, 0.0, "")
        return LAUNCH["sparse_attention", "gather"](*args, wrap=straight)

    def gathered(indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = indices.long().view(shape.B, 1, TOPK, 1).expand(shape.B, HKV, TOPK, D)
        return k.gather(2, rows), v.gather(2, rows)

    def theirs(indices: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, *gathered(indices), enable_gqa=True)

    took = graph_time([partial(ours, s) for s in sets], repeats)
    other = graph_time([partial(theirs, s) for s in sets], repeats)
    near = [x.float() for x in gathered(sets[0])]
    exact = scaled_dot_product_attention(q.float(), *near, enable_gqa=True)
    error = relative(ours(sets[0]), exact)
    share = bytes_read / (took * 1e-6) / bandwidth
    yield Result("sparse attention", f"{shape} k={TOPK}", took, other, share, error, 2**-7)


def random_indices(shape: Shape, seed: int) -> Tensor:
    """Returns ascending random positions [B, 1, 1, TOPK]."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    rows = [torch.randperm(shape.T, device=CUDA, generator=generator)[:TOPK] for _ in range(shape.B)]
    return torch.stack(rows).sort(-1).values.to(torch.int32).view(shape.B, 1, 1, TOPK)


def scan(shape: Shape, bandwidth: float, repeats: int) -> Iterator[Result]:
    """Scores of all keys, without and with the selection: 64 index heads (DSA) and one (CLSA)."""
    yield from scan_one(shape, 64, LIGHTNING, bandwidth, repeats)
    yield from scan_one(shape, 1, DOT_PRODUCT, bandwidth, repeats)


def scan_one(shape: Shape, heads: int, score: Score, bandwidth: float, repeats: int) -> Iterator[Result]:
    """Times the scan of one score."""
    bytes_read = shape.B * shape.T * D * 2
    sets = [normal(shape.B, 1, shape.T, D) for _ in range(sets_for(bytes_read))]
    q = normal(shape.B, heads, 1, D)
    weight = torch.randn(shape.B, heads, 1, device=CUDA) if score.uses_weight else None
    given = (weight, None, None, None, [])

    def scores(k: Tensor) -> Tensor:
        args = (q, k, *given, D**-0.5, score.text, "", False)
        return index_decode.scan(*args, wrap=straight)

    def whole(k: Tensor) -> Tensor:
        args = (q, k, *given, TOPK, D**-0.5, score.text, "", False)
        return LAUNCH["index_topk", "decode"](*args, wrap=straight)

    def theirs(k: Tensor) -> Tensor:
        dot = torch.matmul(q, k.transpose(-1, -2)).float()
        points = dot if weight is None else dot.relu() * weight.unsqueeze(-1)
        return points.sum(1)

    def theirs_too(k: Tensor) -> Any:
        return theirs(k).topk(TOPK, sorted=False)

    exact = index_scores_reference(q, sets[0], weight, None, None, [], D**-0.5, score, "", False)
    name = f"{shape} {heads} heads"
    took = graph_time([partial(scores, s) for s in sets], repeats)
    other = graph_time([partial(theirs, s) for s in sets], repeats)
    share = bytes_read / (took * 1e-6) / bandwidth
    error = relative(scores(sets[0])[..., : shape.T], exact)
    yield Result("index scan", name, took, other, share, error, 1e-5)

    took = graph_time([partial(whole, s) for s in sets], repeats)
    other = graph_time([partial(theirs_too, s) for s in sets], repeats)
    share = bytes_read / (took * 1e-6) / bandwidth
    chosen = exact.gather(-1, whole(sets[0]).long()).sort(-1, descending=True).values
    error = relative(chosen, exact.topk(TOPK).values)
    yield Result("index scan and top-k", name, took, other, share, error, 1e-5)


def topk(shape: Shape, bandwidth: float, repeats: int) -> Iterator[Result]:
    """The selection by itself, against torch.topk (unsorted).

    Scores come from the scan, so they are in the L2 cache where they fit, here as there.
    """
    rows = torch.randn(shape.B, 1, 1, padded(shape.T), device=CUDA)
    scores = rows[..., : shape.T]
    out = torch.empty(shape.B, 1, 1, TOPK, dtype=torch.int32, device=CUDA)
    nt = segments(shape.B, shape.T)
    took = graph_time([lambda: select(rows, None, out, 0, shape.T, nt, straight)] * 4, repeats)
    other = graph_time([lambda: scores.topk(TOPK, sorted=False)] * 4, repeats)
    chosen = scores.gather(-1, out.long()).sort(-1, descending=True).values
    error = relative(chosen, scores.topk(TOPK).values)
    share = 4 * shape.B * shape.T / (took * 1e-6) / bandwidth
    yield Result("top-k", f"{shape} k={TOPK}", took, other, share, error, 0.0)


Part = tuple[Callable[[Shape, float, int], Iterator[Result]], tuple[Shape, ...]]
PARTS: dict[str, Part] = {
    "dense": (dense, SHAPES),
    "sparse": (sparse, SHAPES[:3]),
    "scan": (scan, SHAPES[:3]),
    "topk": (topk, ROWS),
}


def table_of(results: Sequence[Result], bandwidth: float) -> Table:
    """Returns the results as a table, one line each."""
    table = Table(title=f"microseconds a call; {bandwidth / 1e12:.2f} TB/s read by a plain sum")
    for name in ("kernel", "shape", "clsa", "torch", "ratio", "read", "error"):
        table.add_column(name, justify="left" if name in ("kernel", "shape") else "right")
    for r in results:
        table.add_row(
            r.kernel,
            r.shape,
            f"{r.ours:.1f}",
            f"{r.torch:.1f}",
            f"{r.torch / r.ours:.2f}x",
            f"{100 * r.read:.0f}%",
            f"{r.error:.1e}" if r.right else f"[red]{r.error:.1e} > {r.budget:.1e}[/red]",
        )
    return table


def main() -> int:
    """Runs the parts that were asked for; returns 1 when a result is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=30, help="replays of each graph")
    parser.add_argument("--out", type=Path, help="also write the results to this JSON file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this needs a CUDA GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    bandwidth = read_bandwidth(CUDA)
    results: list[Result] = []
    with torch.no_grad():
        for run, shapes in (PARTS[name] for name in options.only):
            for shape in shapes:
                results += run(shape, bandwidth, options.repeats)
                torch.cuda.empty_cache()
                print(f"{results[-1].kernel}, {shape}", file=sys.stderr)
    Console(width=140).print(table_of(results, bandwidth))
    if options.out:
        machine = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "read_bandwidth": bandwidth,
        }
        text = {"machine": machine, "results": [asdict(r) for r in results]}
        options.out.write_text(json.dumps(text, indent=1) + "\n")
    return 0 if all(r.right for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
