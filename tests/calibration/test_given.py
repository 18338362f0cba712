"""What is given: batches of any form become sequences, and those that cannot be used are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clsa_compile.calibration.given import Model, asked, check_length, sequences
from clsa_compile.calibration.stages import Stages
from clsa_compile.errors import OptionError
from clsa_compile.testing import tiny

IDS = torch.arange(120).view(2, 60)


@pytest.mark.parametrize(
    ("batches", "number"),
    [
        (IDS, 2),
        ([IDS, IDS[0]], 3),
        ([IDS.tolist()], 2),
        ((row for row in IDS), 2),
        ([IDS.int()], 2),
        ({"input_ids": IDS}, 2),
        ([{"input_ids": IDS[0], "attention_mask": torch.ones(60)}], 1),
    ],
)
def test_batches_become_sequences(batches: Any, number: int) -> None:
    found = sequences(batches, {"topk": 8})
    assert [ids.shape for ids in found] == [(1, 60)] * number
    assert all(ids.dtype == torch.long for ids in found)


@pytest.mark.parametrize(
    ("batches", "topk", "message"),
    [
        ([], 8, "there are no tokens"),
        (torch.zeros(0, 60).long(), 8, "there are no tokens"),
        ([IDS], 45, "a sequence of 60 tokens is too short for topk=45: .* give 61 at least"),
        ([IDS, IDS[:, :20]], 8, "a sequence of 20 tokens is too short"),
        ([IDS.float()], 8, "batch 0 is torch.float32"),
        ([IDS, IDS[None]], 8, r"batch 1 is torch.int64 of shape \[1, 2, 60\]"),
        (
            [IDS, [[1, 2, 3], [4]]],
            8,
            "batch 1 is no tensor .*, other lengths in other batches",
        ),
        (["some text"], 8, "batch 0 is no tensor"),
        ([{"ids": IDS}], 8, "batch 0 has 'ids'; expected 'input_ids'"),
        ([{"input_ids": IDS, "attention_mask": IDS[0]}], 8, r"\[2, 60\] and an attention_mask of \[60\]"),
        (
            [{"input_ids": IDS, "attention_mask": [[1], [1, 0]]}],
            8,
            "the attention_mask of batch 0 is no tensor",
        ),
        ([{"input_ids": IDS, "attention_mask": IDS < 20}], 8, "a sequence of 0 tokens is too short"),
        ([IDS - 5], 8, "a token id -5; the model's go from 0:"),
    ],
)
def test_what_cannot_be_used_is_an_error(batches: Any, topk: int, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        sequences(batches, {"topk": topk})


def test_padding_on_either_side_is_left_out() -> None:
    mask = torch.ones(2, 60)
    mask[0, :7], mask[1, 50:] = 0, 0
    found = sequences([{"input_ids": IDS, "attention_mask": mask}], {"topk": 8})
    assert [ids.tolist() for ids in found] == [[list(range(7, 60))], [list(range(60, 110))]]


def test_tokens_that_the_model_does_not_know_are_an_error() -> None:
    model = tiny("llama")
    count = model.config.vocab_size
    assert sequences([IDS % count], {"topk": 8}, model)
    with pytest.raises(
        OptionError, match=f"token id {count}; the model's go from 0 to {count - 1}: was this"
    ):
        sequences([IDS % count, torch.full((60,), count)], {"topk": 8}, model)
    with pytest.raises(OptionError, match=f"token id -1; the model's go from 0 to {count - 1}"):
        sequences([torch.full((60,), -1)], {"topk": 8}, model)


def test_a_model_that_does_not_know_its_embeddings_is_not_asked_twice() -> None:
    class Remote(nn.Module):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError("not auto-handled")

    for model in (Remote(), nn.Linear(2, 2), len):
        assert len(sequences([IDS], {"topk": 8}, model)) == 2


@pytest.mark.parametrize(
    ("options", "least", "message"),
    [
        ({}, 28, "topk=12: next to nothing would be left out; give 28 at least, better 48$"),
        ({"dense_below": 50}, 66, "dense_below=50: .* stays dense, .* 200, or a smaller 'dense_below'$"),
        ({"share": "FSR", "pool": 50}, 66, "pool=50: an R would choose .*; give 66 .* or a smaller 'pool'$"),
        ({"share": "FSR", "dense_below": 20}, 64, "pool=48: an R would choose"),
        ({"share": "FSR", "dense_below": 49}, 65, "dense_below=49: attention"),
    ],
)
def test_the_largest_number_of_tokens_says_what_is_too_short(
    options: dict[str, Any], least: int, message: str
) -> None:
    found = asked({"topk": 12, "keep_first": 2, "keep_last": 3, **options})
    check_length(least, found.limits)
    with pytest.raises(OptionError, match=f"a sequence of {least - 1} tokens is too short for {message}"):
        check_length(least - 1, found.limits)


def test_a_pool_of_indexers_is_for_steps_and_limits_no_prompt() -> None:
    assert asked({"share": "FSR", "pool": 50}).limits == {"topk": 0}


class Turned(nn.Module):
    """Two attentions over states that are turned by a number which is no weight."""

    def __init__(self, angle: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.angle = nn.Embedding(128, 32), nn.Linear(32, 128), angle

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).unflatten(-1, (2, 16)).transpose(1, 2)
        for _ in range(2):
            x = nn.functional.scaled_dot_product_attention(self.angle * x, x, x, is_causal=True)
        return self.head(x.transpose(1, 2).flatten(2))


def key(model: nn.Module, folder: Path) -> Any:
    return Model(model, IDS[:1], Stages(folder)).key


def test_results_are_found_again_for_the_very_same_model_only(tmp_path: Path) -> None:
    """By all weights and by what is computed, also where numbers are no weights; in another process too."""
    ours = key(Turned(2.0), tmp_path)
    assert ours == key(Turned(2.0), tmp_path)
    assert ours != key(Turned(3.0), tmp_path)
    other = Turned(2.0)
    with torch.no_grad():
        other.head.bias[7] += 1e-6
    assert ours != key(other, tmp_path)
    assert ours != key(Turned(2.0).double(), tmp_path)
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}
    assert key(tiny("llama"), tmp_path) != key(tiny("llama", rope_parameters=rope), tmp_path)
    assert Model(Turned(2.0), IDS[:1], Stages(None)).key == [], "no weight is read for nothing"
