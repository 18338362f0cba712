"""The layer graph: what is drawn where."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from clsa_compile.html import layer_graph
from clsa_compile.html.layer_graph import Arrows, Graph, Side, graph_of
from clsa_compile.ir.plan import Group


def drawn(report: Any) -> Graph:
    return graph_of(report.plans[0], report.layers)


def ends(arrows: Arrows) -> int:
    return arrows.heads.count("Z")


def edges(side: Side, kind: str) -> list[Arrows]:
    return [arrows for arrows in side.arrows if arrows.kind == kind]


def test_rows_of_both_sides_stand_at_the_same_heights(make: Any) -> None:
    for sides in (drawn(make(16, "mass", left=(3,))).whole, drawn(make(16)).folded):
        assert sides is not None
        first, second = sides
        assert [node.y for node in first.nodes] == [node.y for node in second.nodes]
        assert first.height == second.height


def test_an_index_in_each_layer_becomes_one_for_four(make: Any) -> None:
    before, after = drawn(make(8)).whole
    assert [chip.kind for chip in before.chips].count("index") == 8
    assert sum(map(ends, edges(before, "index"))) == 8
    assert [chip.first for chip in after.chips if chip.kind == "index"] == [0, 4]
    # Each of eight layers is reached: two by their own indexer, six by way of a track.
    assert sum(map(ends, edges(after, "index"))) == 8
    assert {arrows.colour for arrows in edges(after, "index")} == {0, 1}
    assert [node.colour for node in after.nodes] == [0] * 4 + [1] * 4


def test_indexers_that_are_drawn_as_one_are_counted(make: Any) -> None:
    folded = drawn(make(16)).folded
    assert folded is not None
    before, after = folded
    assert [chip.label for chip in before.chips if chip.kind == "index"] == ["index", "index \u00d73"] * 4
    assert [chip.label for chip in after.chips if chip.kind == "index"] == ["index"] * 4


def test_a_dense_model_has_no_place_for_indexers_before(make: Any) -> None:
    before, after = drawn(make(8, "mass")).whole
    assert {chip.kind for chip in before.chips} == {"keys"}
    assert before.width < after.width
    assert [node.kind for node in before.nodes] == ["dense"] * 8
    assert [node.kind for node in after.nodes] == ["dense", *["sparse"] * 3] * 2
    assert [chip.label for chip in after.chips if chip.kind != "keys"] == ["chooses"] * 2


def test_what_is_chosen_has_the_colour_of_those_that_read_it(make: Any) -> None:
    """Layer 1 reads what layer 0 chooses, and chooses among that for layers 2 and 3."""
    report = make(4, "mass")
    groups = (Group("mass", 0, (1,), 2048), Group("mass", 1, (2, 3), 2048))
    _, after = graph_of(replace(report.plans[0], groups=groups), report.layers).whole
    assert [node.colour for node in after.nodes] == [0, 0, 1, 1]
    assert [chip.colour for chip in after.chips if chip.kind == "mass"] == [0, 1]
    trunks = {arrows.colour: ends(arrows) for arrows in edges(after, "index") if "V" in arrows.lines}
    assert trunks == {0: 1, 1: 2}


def test_an_index_that_was_trained_is_one_that_the_model_has_not(make: Any) -> None:
    report = make(4, "mass")
    groups = (Group("distilled", 0, (0, 1, 2, 3), 2048),)
    sites = tuple(replace(site, action="sparse") for site in report.plans[0].sites)
    plan = replace(report.plans[0], sites=sites, groups=groups)
    before, after = graph_of(plan, report.layers).whole
    assert {chip.kind for chip in before.chips} == {"keys"}
    assert [chip.label for chip in after.chips if chip.kind == "distilled"] == ["index"]
    assert sum(map(ends, edges(after, "index"))) == 4


def test_a_layer_that_is_left_says_why(make: Any) -> None:
    _, after = drawn(make(4, "dense", left=(2,))).whole
    node = after.nodes[2]
    assert (node.kind, node.label) == ("left", "2")
    assert node.says == "layer 2, after: left as it was: users: softmax is also used by amax"


def test_shared_keys_are_drawn_once_with_an_edge_to_each_reader(make: Any) -> None:
    _, after = drawn(make(6, "dense", keys=(3, 5))).whole
    assert [chip.first for chip in after.chips] == [0, 1, 2, 4]
    assert sum(map(ends, edges(after, "keys"))) == 6


def test_few_layers_are_drawn_one_by_one(make: Any) -> None:
    assert drawn(make(layer_graph.FEW, "dense")).folded is None
    folded = drawn(make(layer_graph.FEW + 1, "dense")).folded
    assert folded is not None
    (node,) = folded[1].nodes
    assert (node.label, node.first, node.last) == ("0-12", 0, 12)


@pytest.mark.parametrize("kind", ["index", "mass", "dense"])
def test_all_of_it_is_inside_of_the_picture(kind: str, make: Any) -> None:
    for side in drawn(make(40, kind, keys=(9, 10, 30))).whole:
        for box in (*side.nodes, *side.chips):
            assert box.x >= 0
            assert box.x + box.width <= side.width
            assert box.y - layer_graph.HEIGHT / 2 >= 0
            assert box.y + layer_graph.HEIGHT / 2 <= side.height
        for arrows in side.arrows:
            for x, y in re.findall(r"M([\d.]+) ([\d.]+)", arrows.lines + arrows.heads):
                assert 0 <= float(x) <= side.width
                assert 0 <= float(y) <= side.height


def test_tracks_that_overlap_are_apart() -> None:
    tracks = layer_graph._tracks({0: (0, 9), 1: (1, 3), 4: (4, 8), 2: (2, 6)})
    assert tracks == {0: 0, 1: 1, 2: 2, 4: 1}


def test_many_tracks_take_no_more_room_than_there_is() -> None:
    tracks = {i: i for i in range(100)}
    places = [layer_graph._spread(track, tracks) for track in tracks.values()]
    assert places == sorted(set(places))
    assert places[-1] < layer_graph.TRACKS
    assert layer_graph._lane(tracks) == layer_graph.TRACKS + layer_graph.MARGIN
    assert layer_graph._lane({}) == 0
