"""Fingerprints: names that begin elsewhere, values that rounding changed, and hashes of all bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clsa_compile.ir.fingerprint import Fingerprint, content_hash, middles

MODEL = Fingerprint("Tiny", 5, "abc", {"a.w": 0.5, "a.b": -0.25, "c": 0.125}, {"f": 0.01})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"weights": {"a.w": 0.5004, "a.b": -0.2502, "c": 0.125}}, ""),
        ({"weights": {"a.w": 0.5, "c": 0.125}}, ""),
        ({"tables": {"f": 0.0101}}, ""),
        ({"tables": {}}, ""),
        ({"name": "Other"}, "it is a Other, the plan is for a Tiny"),
        ({"layers": 6}, "it has 6 attentions, the plan's has 5"),
        ({"shapes": "abd"}, "other names or shapes"),
        ({"weights": {"a.w": 0.5, "a.b": -0.35, "c": 0.125}}, "its weights are others, as a.b"),
        ({"weights": {"c": torch.nan}}, "its weights are others, as c"),
        ({"tables": {"f": 0.011}}, "its weights are others, as f"),
    ],
)
def test_models_are_told_apart_but_not_dtypes(change: dict[str, Any], message: str) -> None:
    found = MODEL.difference(replace(MODEL, **change))
    assert message in found
    assert bool(message) == bool(found)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model.a.w": 0.5, "model.c": 0.125}, ""),
        ({"model.a.w": 0.6}, "as a.w"),
        ({"w": 0.6}, "as a.w"),
        ({"other": 0.6}, ""),
        ({"a.w": 0.5, "model.c": 3.0}, ""),
    ],
)
def test_names_may_begin_elsewhere(weights: dict[str, float], message: str) -> None:
    """A module inside of the plan's model, or one around it; where names are equal they mean themselves."""
    assert MODEL.departs(weights).endswith(message)
    assert bool(message) == bool(MODEL.departs(weights))


def test_values_are_taken_from_the_middle_where_there_are_any() -> None:
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    given = {
        "w": torch.arange(5.0),
        "half": torch.ones(2, 2).bfloat16(),
        "n": torch.arange(3),
        "freed": freed,
    }
    given |= {"meta": torch.ones(2, device="meta"), "empty": torch.ones(0), "one": torch.tensor(0.123456)}
    assert middles(given.items()) == {"w": 2.0, "half": 1.0, "one": 0.1235}
    assert middles(given.items(), 0.75)["w"] == 3.0


@given(
    size=st.integers(1, 40),
    dtype=st.sampled_from(
        [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64]
    ),
    data=st.data(),
)
def test_every_single_value_counts(size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = torch.zeros(size, dtype=dtype)
    other = tensor.clone()
    other[data.draw(st.integers(0, size - 1))] = 1
    assert content_hash([tensor]) == content_hash([tensor.clone()])
    assert content_hash([tensor]) != content_hash([other])
    assert content_hash([tensor, other]) != content_hash([other, tensor])


def test_places_and_shapes_count_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.arange(100.0)
    swapped = one.clone()
    swapped[[3, 77]] = one[[77, 3]]
    whole = content_hash([one])
    monkeypatch.setattr("clsa_compile.ir.fingerprint._CHUNK", 7)
    assert content_hash([one]) == whole == content_hash([one.view(2, 50).flatten()])
    assert len({content_hash([x]) for x in (one, swapped, one.view(2, 50), one.double())}) == 4
    assert content_hash([one.view(10, 10).T]) != content_hash([one.view(10, 10)])
