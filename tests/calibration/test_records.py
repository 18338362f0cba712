"""Records: masses are the model's probabilities, and worth is what taking a token away does to the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.calibration.graphs import Graph, fitting
from clsa_compile.calibration.records import Record, Taps, chosen_rows, record

ROWS = torch.tensor([30, 47])


@pytest.fixture(scope="module", name="graph")
def _graph(model: Any, tokens: list[Tensor]) -> Graph:
    return fitting(model, tokens[0][:1]).graph()


@pytest.fixture(scope="module", name="made")
def _made(graph: Graph, tokens: list[Tensor]) -> Record:
    return record(graph, tokens[0][:1], ROWS, 0.5, 3)


def test_masses_are_the_models_probabilities(model: Any, tokens: list[Tensor], made: Record) -> None:
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            seen = model(tokens[0][:1], use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    for ours, theirs in zip(made.mass, seen, strict=True):
        torch.testing.assert_close(ours.float().square(), theirs[0][:, ROWS], atol=2e-3, rtol=0)
    assert torch.equal(made.readable, torch.arange(48) <= ROWS[:, None])


def test_worth_is_the_gradient_along_a_tokens_part_of_the_output(graph: Graph, tokens: list[Tensor]) -> None:
    """Moves the output of one head as if a token were gone a little, and compares the loss's slope."""
    ids = tokens[0][:1]
    rows, layer, head, key = torch.tensor([40]), 2, 1, 5
    made = record(graph, ids, rows, 0.5, 3)
    u: list[Tensor] = []

    def moved(step: float) -> float:
        def tap(number: int, call: Any, out: Tensor, _: Tensor | None) -> Tensor:
            if number != layer:
                return out
            p = call.probabilities(rows, 48)[0, head, 0, key]
            out = out.clone()
            out[0, head, 40] += step * p * (call.v[0, head // 2, key] - out[0, head, 40])
            return out

        with torch.no_grad():
            hidden, others = graph.run(ids, tap)
            logits = graph.logits(hidden[:, 24:], others)[0]
            # The same labels as in the record: they come from the unmoved model.
            if not u:
                generator = torch.Generator().manual_seed(3)
                u.append(torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0])
            return torch.nn.functional.cross_entropy(logits.double(), u[0], reduction="sum").item()

    moved(0.0)
    slope = (moved(0.5) - moved(-0.5)) / 1.0
    share = made.second[layer][head // 2, 0, key].double() * made.unit
    others = made.second[layer][head // 2, 0, key]
    assert abs(slope) <= share * 1.02 + 1e-9
    assert others > 0


def test_a_record_survives_tensors(made: Record) -> None:
    again = Record.from_tensors(made.to_tensors())
    assert again.unit == made.unit
    for name in ("mass", "first", "second"):
        assert all(map(torch.equal, getattr(again, name), getattr(made, name)))
    assert torch.equal(again.readable, made.readable)


def test_sums_agree(made: Record) -> None:
    """The sum of |u| over all heads is at least the root of the sum of squares of any kv head."""
    for first, second in zip(made.first, made.second, strict=True):
        assert first.shape == (1, 2, 48)
        assert second.shape == (2, 2, 48)
        assert (first * 1.01 + 1e-4 >= second).all()
        assert torch.equal(second[..., 47][:, 0], torch.zeros(2))  # row 30 does not read token 47


def test_the_same_seed_gives_the_same_record(graph: Graph, tokens: list[Tensor], made: Record) -> None:
    again, other = (record(graph, tokens[0][:1], ROWS, 0.5, seed) for seed in (3, 4))
    assert all(map(torch.equal, again.second, made.second))
    assert not all(map(torch.equal, other.second, made.second))


def test_taps_give_the_worth_that_records_have(graph: Graph, tokens: list[Tensor], made: Record) -> None:
    taps = Taps()
    with torch.enable_grad():
        taps.backward(graph.logits, *graph.run(tokens[0][:1], taps.tap), start=24, seed=3)
    for worth, first in zip(taps.worth(ROWS), made.first, strict=True):
        torch.testing.assert_close(worth, first[0].float() * made.unit, rtol=2e-3, atol=made.unit * 1e-4)


@pytest.mark.parametrize("count", [1, 7, 24])
def test_rows_are_spread_over_the_last_part(count: int) -> None:
    rows = chosen_rows(2048, count, torch.Generator().manual_seed(0))
    assert len(rows) == count
    assert rows.min() >= 256
    assert rows.max() < 2048
    assert (rows.diff() < 2 * 2048 / count).all()
