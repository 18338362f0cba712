"""Students over borrowed keys: they begin as the layers' own queries, and say what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.calibration.borrowed import Borrowed
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.records import Taps
from clsa_compile.calibration.stages import Stages
from clsa_compile.calibration.trainer import Training
from clsa_compile.errors import OptionError


def make(model: Any, tokens: list[Tensor], training: Training) -> Borrowed:
    given = [ids[None] for ids in tokens[0]]
    return Borrowed(Model(model, given[0], Stages(None)), given, (0, 3), training)


def test_indices_begin_as_their_layers_own_queries(model: Any, tokens: list[Tensor]) -> None:
    student = make(model, tokens, Training(topk=8, query_rate=0.5, head_rate=0.25))
    for number, layer in enumerate((0, 3)):
        own = model.model.layers[layer].self_attn.q_proj.weight
        torch.testing.assert_close(student.tensors[f"{number}.query"], own.detach())
        assert not student.tensors[f"{number}.head"].any()
    assert student.rates() == {
        f"{number}.{name}": rate
        for number in range(2)
        for name, rate in (("query", 0.5), ("head", 0.25), ("bias", 0.25))
    }


def test_what_is_learned_may_be_the_worth_of_tokens(model: Any, tokens: list[Tensor]) -> None:
    """The worth is `record`'s, over the rows' own losses, added up in a group; a row counts as any other."""
    student = make(model, tokens, Training(topk=8, target="worth"))
    ids, rows = tokens[0][:1], torch.tensor([12, 30, 41])
    graph, taps = student._known.forward(ids).graph(), Taps()
    with torch.enable_grad():
        taps.backward(graph.logits, *graph.run(ids, taps.tap), start=12, seed=0)
    found = list(taps.worth(rows))
    for i, members in enumerate(((0, 1, 2), (3, 4))):
        worth = torch.stack([found[m] for m in members]).sum(0)
        target = (worth / worth.sum(-1, keepdim=True)).double()
        scores = student_scores(student, i, ids, rows).double()
        logs = scores.log_softmax(-1).masked_fill(target == 0, 0.0)
        expected = torch.where(target > 0, target * (target.log() - logs), 0.0).sum(-1).mean()
        loss = student.losses(ids, rows)[i].divergence.double()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def student_scores(student: Borrowed, i: int, ids: Tensor, rows: Tensor) -> Tensor:
    """The scores [n, T] of an index, by its operands in the whole graph."""
    probe = student._known.forward(ids).probe(student._pools, student.tensors)
    scales = {}

    def tap(layer: int, call: Any, out: Tensor, _: Any) -> Tensor:
        scales[layer] = call.scale
        return out

    with torch.no_grad():
        q, k, weight = probe.run(ids, tap, student.tensors).operands[i]
    dot = q[0][:, rows] @ k[0].repeat_interleave(2, 0).mT * scales[student._pools[i].anchor]
    scores = (dot + weight[0][:, rows, None]).logsumexp(0)
    causal = torch.arange(ids.shape[1]) <= rows[:, None]
    return scores.masked_fill(~causal, -torch.inf)


def test_the_gradient_of_the_models_loss_moves_no_index(model: Any, tokens: list[Tensor]) -> None:
    """One run serves both: what comes back through the model for the worth must not reach the indices."""
    student = make(model, tokens, Training(topk=8, target="worth"))
    learning = list(student.tensors.values())
    with torch.enable_grad():
        found = student.losses(tokens[0][:1], torch.tensor([12, 30, 41]))
    assert all(t.grad is None for t in learning)
    assert all(p.grad is None for p in model.parameters())
    total = torch.stack([loss.divergence for loss in found]).sum()
    assert all(bool(g.any()) for g in torch.autograd.grad(total, learning))


def test_its_plan_holds_copies(model: Any, tokens: list[Tensor]) -> None:
    student = make(model, tokens, Training(topk=8))
    plan = student.plan()
    assert plan.pattern() == "ISSIS"
    assert plan.topk == 8
    with torch.no_grad():
        student.tensors["0.query"].zero_()
    assert plan.tensors["0.query"].any()


def test_more_key_heads_than_there_are_is_an_error(model: Any, tokens: list[Tensor]) -> None:
    with pytest.raises(OptionError, match="kv_heads=3, but layer 0 has 2"):
        make(model, tokens, Training(topk=8, kv_heads=3))
