"""Students with keys of their own: the loss row by row in float64; only the indexers' weights learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clsa_compile.calibration.attend import Tokens
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.graphs import Graph
from clsa_compile.calibration.own import Own
from clsa_compile.calibration.stages import Stages
from clsa_compile.calibration.trainer import Trainer, Training
from clsa_compile.errors import OptionError
from clsa_compile.testing import load_script, tiny

ROWS = torch.tensor([9, 20, 47])
TRAINING = Training(topk=8, steps=30, rows=40, own_rate=1e-2)


class Whole(nn.Module):
    """The reference decoder over ids alone, with a growing cache."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        module = load_script(Path(__file__).parents[2] / "examples" / "yoco_decoder.py")
        sizes = {"layers": 4, "hidden": 64, "ffn": 128, "heads": 4, "kv_heads": 2, "head_dim": 16}
        sizes |= {"window": 8, "topk": 8, "index_dim": 16, "vocabulary": 256}
        torch.manual_seed(0)
        self.decoder = module.Decoder(replace(module.PRESETS["small"], attention=attention, **sizes))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.decoder(ids, torch.arange(ids.shape[1]), self.decoder.new_cache(ids.shape[0]))
        return logits


def sharp(model: nn.Module) -> nn.Module:
    """Returns a model whose attention is not the same everywhere, with indexers that know nothing of it."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "index" not in name and "embed" not in name:
                weight.mul_(3.0)
    return model.eval()


def make(model: Any, tokens: list[Tensor], training: Training = TRAINING) -> tuple[Model, list[Tensor], Own]:
    given = [ids[None] for batch in tokens for ids in batch]
    known = Model(model, given[0], Stages(None))
    return known, given, Own(known, given, training)


@pytest.mark.parametrize(
    ("name", "owners", "weights"),
    [
        (
            "deepseek_v32",
            (0, 1),
            ["wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"],
        ),
        ("yoco-dsa", (0, 1), ["query.weight", "key.weight", "weight.weight"]),
        ("yoco-clsa", (0, 0), ["query.weight", "key.weight"]),
    ],
)
def test_the_loss_falls_and_nothing_else_learns(
    name: str, owners: tuple[int, ...], weights: list[str], tokens: list[Tensor]
) -> None:
    """The single head of CLSA, which all layers read, and the several heads of DSA, one indexer a layer."""
    model = sharp(Whole(name) if name.startswith("yoco") else tiny(name))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    known, given, student = make(model, tokens)
    assert known.owners == owners
    assert [n.partition("indexer.")[2] for n in student.tensors] == weights * len(set(owners))
    trainer = Trainer(known, given, student, TRAINING)
    trainer.run()
    assert sum(trainer.losses[-6:]) < 0.9 * sum(trainer.losses[:6])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(not torch.equal(t, before[n]) for n, t in student.tensors.items())


def test_the_loss_is_the_divergence_from_dense_attention(tokens: list[Tensor]) -> None:
    known, given, student = make(sharp(tiny("deepseek_v32")), tokens)
    ids = given[0]
    calls: dict[int, Any] = {}
    indices: list[tuple[Any, Tensor]] = []

    def tap(layer: int, call: Any, out: Tensor, chosen: Tokens | None) -> Tensor:
        assert chosen is not None
        read = chosen.of(torch.arange(ids.shape[1]))[0, 0]
        assert torch.equal(read, torch.ones_like(read).tril()), "all that may be read"
        calls[layer] = call
        return out

    with torch.no_grad():
        known.forward(ids).graph().run(ids, tap, lambda call, weight, _: indices.append((call, weight)))
    found = student.losses(ids, ROWS)
    causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()[ROWS]
    for layer, (loss, (index, weight)) in enumerate(zip(found, indices, strict=True)):
        call = calls[layer]
        scores = (call.q.double() @ call.k.double().mT)[0, :, ROWS] * call.scale
        target = scores.masked_fill(~causal, -torch.inf).softmax(-1).mean(0)
        dot = (index.q.double() @ index.k.double().mT)[0, :, ROWS] * index.scale
        logits = (dot.relu() * weight[0, :, ROWS, None].double()).sum(0).masked_fill(~causal, -torch.inf)
        logs = logits.log_softmax(-1).masked_fill(~causal, 0.0)
        expected = torch.where(causal, target * (target.log() - logs), 0.0).sum(-1).mean()
        torch.testing.assert_close(loss.divergence.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_model_whose_indexers_have_nothing_of_their_own_is_an_error(
    tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "index_weights", lambda _: [])
    with pytest.raises(OptionError, match="read by its indexers alone, so there is nothing to train"):
        make(tiny("deepseek_v32"), tokens)
