"""Plans: plain data both ways."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsa_compile.ir.plan import Group, Plan, SitePlan

words = st.text(max_size=8)
counts = st.integers(0, 10**6)
numbers = st.floats(allow_nan=False)
sites = st.builds(
    SitePlan,
    ordinal=counts,
    layer=counts,
    path=words,
    kind=st.sampled_from(["dense", "topk"]),
    action=st.sampled_from(["sparse", "attention", "left"]),
    reason=words,
    family=words,
    heads=counts,
    kv_heads=counts,
    scale=numbers,
    softcap=numbers,
    mask=words,
    score=words,
    topk=counts,
)
groups = st.builds(
    Group,
    kind=st.sampled_from(["index", "kv"]),
    anchor=counts,
    members=st.lists(counts, max_size=4).map(tuple),
    topk=counts,
    score=words,
)
plans = st.builds(
    Plan, sites=st.lists(sites, max_size=4).map(tuple), groups=st.lists(groups, max_size=3).map(tuple)
)


@given(plan=plans)
def test_a_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(plan=plans)
def test_every_site_is_counted_once(plan: Plan) -> None:
    assert sum(plan.count(a) for a in ("sparse", "attention", "left")) == len(plan.sites)


def test_counts_are_of_the_action_asked_for() -> None:
    def site(action: Any) -> SitePlan:
        return SitePlan(0, 0, "", "dense", action)

    plan = Plan((site("left"), site("attention"), site("left")), ())
    assert (plan.count("left"), plan.count("attention"), plan.count("sparse")) == (2, 1, 0)


@pytest.mark.parametrize(
    "data",
    [
        {"sites": [{"ordinal": 0, "colour": "red"}], "groups": []},
        {"sites": [{"ordinal": 0}], "groups": []},
        {"sites": [], "groups": [{"kind": "kv", "members": [], "anchor": 0, "colour": "red"}]},
    ],
)
def test_unknown_and_missing_fields_are_errors(data: Any) -> None:
    with pytest.raises(TypeError):
        Plan.from_dict(data)


def test_plans_cannot_be_changed() -> None:
    plan = Plan((), ())
    with pytest.raises(FrozenInstanceError):
        plan.sites = ()  # type: ignore[misc]
