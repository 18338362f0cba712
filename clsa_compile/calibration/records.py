"""Records: what each layer of the dense model looks at in a few rows of a sequence, and how much it matters.

How much a token matters to a head is how far the output moves without it, along the gradient of the loss:
u = p g.(v - o), of which p is the probability, v the token's value, o the head's output and g the gradient
there of a sampled-label loss (labels drawn from the model itself: g measures what changes its distribution).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clsa_compile.calibration.attend import Operands, Tokens
from clsa_compile.calibration.fingerprint import sequence_hash
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.graphs import Graph

__all__ = ["Record", "Taps", "chosen_rows", "record", "recorded"]

# Logits of so many rows are held at once.
HEAD_ROWS = 256
# Rows of all sequences that are looked at, and elements of their records.
ROWS = 144
MOST_ELEMENTS = 400_000_000
FEWEST_ROWS, MOST_ROWS = 4, 48


@dataclass(frozen=True, slots=True)
class Record:
    """One sequence, n of its rows. Lists are by layer, from the first that may share.

    mass: fp16 [H, n, T], the probability raised to `power`. first: fp16 [1, n, T], sum of |u| over heads;
    second: fp16 [Hkv, n, T], root of the sum of u^2 over the heads of a kv head; both in units of `unit`.
    readable: bool [n, T].
    """

    mass: tuple[Tensor, ...]
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    readable: Tensor
    unit: float

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns the record as named tensors."""
        named = {"readable": self.readable, "unit": torch.tensor(self.unit, dtype=torch.float64)}
        for name in ("mass", "first", "second"):
            named.update({f"{name}.{i}": value for i, value in enumerate(getattr(self, name))})
        return named

    @classmethod
    def from_tensors(cls, named: Mapping[str, Tensor]) -> Record:
        """Reads what `to_tensors` returned."""
        layers = range(sum(name.startswith("mass.") for name in named))
        mass, first, second = (
            tuple(named[f"{name}.{i}"] for i in layers) for name in ("mass", "first", "second")
        )
        return cls(mass, first, second, named["readable"], named["unit"].item())


def chosen_rows(length: int, count: int, generator: torch.Generator) -> Tensor:
    """Returns `count` rows of a sequence: the last, others at random, spread over seven eighths of it."""
    start = length // 8
    step = (length - start) / count
    jitter = torch.rand(count, generator=generator, dtype=torch.float64)
    rows = (start + (torch.arange(count) + jitter) * step).long().clamp(max=length - 1)
    rows[-1] = length - 1
    return rows.unique()


def recorded(
    model: Model, sequences: Sequence[Tensor], power: float, seed: int, done: Callable[[], None]
) -> list[Record]:
    """Returns a record of each sequence [1, T], or those that the model's folder has kept."""
    widths = sum(layer.heads + layer.kv_heads + 1 for layer in model.layers)
    longest = max(ids.shape[1] for ids in sequences)
    total = min(ROWS, MOST_ELEMENTS // (widths * longest))
    count = max(FEWEST_ROWS, min(MOST_ROWS, total // len(sequences)))
    found = []
    for drawn, ids in enumerate(sequences, seed):

        def make(ids: Tensor = ids, drawn: int = drawn) -> dict[str, Tensor]:
            rows = chosen_rows(ids.shape[1], count, torch.Generator().manual_seed(drawn))
            given = ids.to(model.device)
            return record(model.forward(given).graph(), given, rows, power, drawn).to_tensors()

        key = [model.key, sequence_hash(ids), count, drawn, power]
        found.append(Record.from_tensors(model.stages.tensors("record", key, make)))
        done()
    return found


def record(graph: Graph, ids: Tensor, rows: Tensor, power: float, seed: int) -> Record:
    """Runs the dense graph over ids [1, T] forwards and backwards, and returns what the rows looked at.

    The loss is that of the second half.
    """
    rows = rows.to(ids.device)
    taps = Taps()
    with torch.enable_grad():
        hidden, others = graph.run(ids, taps.tap)
        taps.backward(graph.logits, hidden, others, ids.shape[1] // 2, seed)
    mass, parts = [], []
    for call, grad in taps.layers():
        p, u = _moved(call, grad, rows)
        mass.append((p**power).half())
        parts.append((u.abs().sum((0, 1))[None], u.square().sum(1).sqrt()))
    unit = max(float(x.max()) for pair in parts for x in pair) or 1.0
    first, second = (tuple((pair[i] / unit).half() for pair in parts) for i in range(2))
    readable = (taps.calls[0].scores(rows, ids.shape[1])[0] > -torch.inf).any(0)
    return Record(tuple(mass), first, second, readable, unit)


@dataclass(slots=True)
class Taps:
    """What one forward leaves behind in each layer: what its attention read, and its output."""

    calls: list[Operands] = field(default_factory=list)
    outs: list[Tensor] = field(default_factory=list)

    def tap(self, _: int, call: Operands, out: Tensor, __: Tokens | None) -> Tensor:
        """Keeps a layer; for `Graph.run` with gradients enabled."""
        # Weights need no gradient: the first output that does is the first layer's.
        out = out if out.requires_grad else out.detach().requires_grad_()
        out.retain_grad()
        self.calls.append(replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach()))
        self.outs.append(out)
        return out

    def backward(
        self,
        logits: Callable[[Tensor, tuple[Any, ...]], Tensor],
        hidden: Tensor,
        others: tuple[Any, ...],
        start: int,
        seed: int,
    ) -> None:
        """Takes the gradient of the loss of labels that the model draws, summed over rows from `start`."""
        generator = torch.Generator(hidden.device).manual_seed(seed)
        leaf = hidden.detach().requires_grad_()
        for row in range(start, hidden.shape[1], HEAD_ROWS):
            block = logits(leaf[:, row : row + HEAD_ROWS], others)[0].float()
            # As torch.multinomial draws one, without its check: what is not a number must end as such a loss.
            likely = block.detach().softmax(-1)
            labels = (likely / torch.empty_like(likely).exponential_(generator=generator)).argmax(-1)
            torch.nn.functional.cross_entropy(block, labels, reduction="sum").backward()
        hidden.backward(leaf.grad)

    def layers(self) -> Iterator[tuple[Operands, Tensor]]:
        """Yields what each layer read, and the gradient of its output."""
        for call, out in zip(self.calls, self.outs, strict=True):
            assert out.grad is not None
            yield call, out.grad

    @torch.no_grad()
    def worth(self, rows: Tensor) -> Iterator[Tensor]:
        """Yields by layer what tokens are worth to some rows: sum of |u| over heads, fp32 [n, T]."""
        for call, grad in self.layers():
            yield _moved(call, grad, rows)[1].abs_().sum((0, 1))


@torch.no_grad()
def _moved(call: Operands, grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the probabilities [H, n, T] of some rows, and u [Hkv, H / Hkv, n, T]."""
    p = call.probabilities(rows, call.k.shape[2])[0]
    heads, n, keys = p.shape
    hkv = call.v.shape[1]
    g = grad[0, :, rows].float().reshape(hkv, -1, call.v.shape[3])
    along = (g @ call.v[0].float().transpose(1, 2)).view(heads, n, keys)
    along = along - (p * along).sum(-1, keepdim=True)
    return p, (p * along).view(hkv, heads // hkv, n, keys)
