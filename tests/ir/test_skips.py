"""Skips: names of passes and layers, and what is said of names that nothing bears."""

from __future__ import annotations

import pytest

from clsa_compile.errors import OptionError
from clsa_compile.ir.skips import PASSES, Skips

PATHS = ("model.layers.0.self_attn", "model.layers.10.self_attn")


@pytest.mark.parametrize(
    ("name", "path", "number", "taken"),
    [
        ("layers.1", "model.layers.1.self_attn", 1, True),
        ("layers.1", "model.layers.10.self_attn", 10, False),
        ("model.layers.1.self_attn", "model.layers.1.self_attn", 1, True),
        ("self_attn", "model.layers.1.self_attn", 1, True),
        ("attn", "model.layers.1.self_attn", 1, False),
        ("1", "model.layers.1.self_attn", 1, True),
        ("1", "encoder.blocks.3", 1, True),
        ("2", "encoder.blocks.3", 1, False),
    ],
)
def test_layers_go_by_number_and_by_parts_of_their_path(
    name: str, path: str, number: int, taken: bool
) -> None:
    assert Skips(("tables", name)).layer(path, number) == (name if taken else "")


def test_passes_and_others_are_told_from_layers() -> None:
    skips = Skips(("tables", "layers.3", "eager"))
    assert skips.passes(["eager", "sdpa"]) == ("tables", "eager")
    assert "tables" in skips
    assert "reclaim" not in skips


def test_names_that_are_known_are_not_missing() -> None:
    skips = Skips((*PASSES, "eager", "layers.10", "model"))
    assert skips.unknown(["eager"], PATHS) == ()


@pytest.mark.parametrize("name", ["layers.3", "99", "model.layers.3.self_attn"])
def test_a_layer_that_other_graphs_may_have_is_missing(name: str) -> None:
    assert Skips((name,)).unknown([], PATHS) == (name,)


def test_a_graph_without_layers_says_nothing_about_names() -> None:
    assert Skips(("whatever", "layers.3", "tables")).unknown([], ()) == ()


@pytest.mark.parametrize(
    ("name", "hint"), [("layer.10", "'layers.10'"), ("mask_bound", "'mask_bounds'"), ("xyz", "")]
)
def test_a_name_unlike_all_is_an_error_that_lists_what_there_is(name: str, hint: str) -> None:
    with pytest.raises(OptionError) as error:
        Skips((name,)).unknown([], PATHS)
    message = str(error.value)
    assert f"names '{name}'" in message
    assert ("did you mean " + hint in message) if hint else ("did you mean" not in message)
    assert "tables" in message
    assert "'model.layers.0.self_attn'" in message
