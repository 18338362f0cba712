"""Pictures: every layer once, groups as clusters, edges from what is read."""

from __future__ import annotations

import re

from clsa_compile.dump.dot import dot_of
from clsa_compile.ir.plan import Group, Plan, SitePlan
from clsa_compile.ir.sites import Sites
from clsa_compile.passes.pipeline import Decision


def site(ordinal: int, action: str = "attention") -> SitePlan:
    return SitePlan(ordinal, ordinal, f'model["{ordinal}"]', "dense", action)  # type: ignore[arg-type]


def test_every_layer_is_drawn_once_and_groups_are_clusters() -> None:
    groups = (Group("kv", 0, (0, 1, 2)), Group("mass", 0, (1, 2), topk=8), Group("kv", 3, (3, 4)))
    plan = Plan(tuple(map(site, range(6))), groups)
    text = dot_of(Decision(Sites((), ()), plan))
    assert sorted(re.findall(r"^ +(site\d) \[", text, re.MULTILINE)) == [f"site{i}" for i in range(6)]
    first, second, third = re.findall(r"cluster_\d+ \{(.*?)\n  \}", text, re.DOTALL)
    assert "top 8 by attention mass" in first
    assert re.findall(r"site\d", first) == ["site1", "site2"]
    assert re.findall(r"site\d", second) == ["site0"], "what else reads its K and V is drawn already"
    assert re.findall(r"site\d", third) == ["site3", "site4"]
    assert re.findall(r"(site\d -> site\d) \[label=.tokens", text) == ["site0 -> site1", "site0 -> site2"]
    assert text.count("{") == text.count("}")


def test_quotes_in_paths_are_escaped() -> None:
    text = dot_of(Decision(Sites((), ()), Plan((site(0, "left"),), ())))
    assert r'tooltip="model[\"0\"]"' in text
    assert "lightgray" in text
