"""Options: every mistake is an error that names the key, the value and what is accepted."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from clsa_compile.config import MODES, Options
from clsa_compile.errors import ClsaError, OptionError
from clsa_compile.ir.routing import Layer, Pool
from clsa_compile.ir.sharing import SharingPlan


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLSA_DUMP", "CLSA_STRICT", "CLSA_STOP_AFTER", "CLSA_SKIP"):
        monkeypatch.delenv(name, raising=False)


def test_no_options_are_the_defaults() -> None:
    assert Options.read(None) == Options.read({}) == Options()
    defaults = Options(share="off", strict=False, dump=None, inductor={}, mode="default", autotune=False)
    assert Options() == defaults


def test_what_is_given_is_kept() -> None:
    given: dict[str, Any] = {
        "share": "off", "strict": True, "dump": "folder", "inductor": {"a": 1}, "mode": MODES[1],
        "autotune": True,
    }  # fmt: skip
    options = Options.read(given)
    assert {k: getattr(options, k) for k in given} == given
    assert Options.read({"dump": Path("folder")}).dump == Path("folder")


def test_options_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Options().strict = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "near"),
    [("strickt", "strict"), ("Mode", "mode"), ("shares", "share"), ("dumps", "dump"),
     ("inductors", "inductor")],
)  # fmt: skip
def test_a_misspelt_key_names_the_one_that_was_meant(key: str, near: str) -> None:
    with pytest.raises(OptionError, match=f"unknown option '{key}'; did you mean '{near}'"):
        Options.read({key: True})


def test_an_unknown_key_lists_the_known_ones_and_where_inductors_go() -> None:
    with pytest.raises(OptionError) as error:
        Options.read({"cudagraph_trees": True})
    message = str(error.value)
    assert "unknown option 'cudagraph_trees'" in message
    assert "did you mean" not in message
    assert "Known options: topk, share, pool, scope, dense_layers, dense_below, " in message
    assert "options={'inductor': {...}}" in message


@pytest.mark.parametrize("key", ["scope", "dense_layers", "keep_first", "keep_last", "prefill"])
def test_what_is_for_dense_layers_needs_a_number_of_tokens(key: str) -> None:
    with pytest.raises(OptionError, match=f"'{key}' is for dense layers, and needs 'topk'"):
        Options.read({key: 4})


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"share": 0}, "'off', a number from 1, a schedule such as 'FSSS'"),
        ({"share": -4}, "shared by 1 layer at least"),
        ({"share": True}, "a bool is no schedule"),
        ({"share": 2.0}, "a float is no schedule"),
        ({"share": None}, "a NoneType is no schedule"),
        ({"share": ""}, "consists of F"),
        ({"share": "fsss"}, "consists of F"),
        ({"share": "SF"}, "before the first F there is no index"),
        ({"reclaim": 1}, "True or False"),
        ({"strict": 1}, "True or False"),
        ({"strict": "yes"}, "True or False"),
        ({"strict": None}, "True or False"),
        ({"dump": 3}, "a folder's path"),
        ({"dump": True}, "a folder's path"),
        ({"inductor": None}, "a dict of Inductor's options"),
        ({"inductor": ["max_autotune"]}, "a dict of Inductor's options"),
        ({"inductor": {1: True}}, "a dict of Inductor's options"),
        ({"mode": "fast"}, "one of default, reduce-overhead"),
        ({"mode": ["default"]}, "one of default, reduce-overhead"),
        ({"mode": None}, "one of default, reduce-overhead"),
        ({"autotune": 1}, "True or False"),
        ({"autotune": "yes"}, "True or False"),
        (
            {"stop_after": "plans"},
            "one of captured, canonical, plan, rewritten, lowered; did you mean 'plan'",
        ),
        ({"stop_after": 3}, "one of captured"),
        ({"skip": 3}, "names of passes and layers"),
        ({"skip": ("tables", "")}, "names of passes and layers"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_accepted(options: Any, accepted: str) -> None:
    ((key, value),) = options.items()
    with pytest.raises(OptionError) as error:
        Options.read(options)
    message = str(error.value)
    assert f"the option {key!r} is {value!r}" in message
    assert accepted in message


def test_reclaiming_needs_sharing() -> None:
    assert Options.read({"reclaim": True, "share": 4}).reclaim
    with pytest.raises(OptionError, match="'reclaim' needs 'share'"):
        Options.read({"reclaim": True})


def test_a_mode_given_twice_must_be_the_same() -> None:
    assert Options.read({"mode": "max-autotune"}, mode="max-autotune").mode == "max-autotune"
    assert Options.read({}, mode="reduce-overhead").mode == "reduce-overhead"
    with pytest.raises(OptionError, match="contradict") as error:
        Options.read({"mode": "max-autotune"}, mode="reduce-overhead")
    assert "max-autotune" in str(error.value)
    assert "reduce-overhead" in str(error.value)


def test_option_errors_can_be_caught_as_value_errors_and_as_clsa_errors() -> None:
    for kind in (ValueError, ClsaError):
        with pytest.raises(kind):
            Options.read({"nothing": 1})


@pytest.mark.parametrize(("text", "strict"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_the_environment_sets_strict(text: str, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLSA_STRICT", text)
    assert Options.read().strict is strict
    assert Options.read({"strict": not strict}).strict is not strict, "what is given wins"


def test_the_environment_sets_the_dump_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLSA_DUMP", "elsewhere")
    assert Options.read().dump == "elsewhere"
    assert Options.read({"dump": "here"}).dump == "here"


def test_the_environment_says_where_to_stop_and_what_to_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLSA_STOP_AFTER", "rewritten")
    monkeypatch.setenv("CLSA_SKIP", "tables, layers.3,,12")
    options = Options.read()
    assert (options.stop_after, options.skip) == ("rewritten", ("tables", "layers.3", "12"))
    given = Options.read({"stop_after": "plan", "skip": "mask_bounds"})
    assert (given.stop_after, given.skip) == ("plan", ("mask_bounds",)), "what is given wins"
    monkeypatch.setenv("CLSA_STOP_AFTER", "")
    monkeypatch.setenv("CLSA_SKIP", "")
    assert Options.read() == Options(), "an empty variable is none"


def test_identities_differ_where_the_result_may() -> None:
    variants = [
        Options(),
        Options(strict=True),
        Options(autotune=True),
        Options(mode="reduce-overhead"),
        Options(inductor={"a": 1}),
        Options(inductor={"a": 2}),
        Options(inductor={"b": 1}),
        Options(inductor={"a": "1"}),
        Options(inductor={"a": 1, "b": 1}),
        Options(stop_after="plan"),
        Options(stop_after="lowered"),
        Options(skip=("tables",)),
        Options(skip=("tables", "layers.3")),
    ]
    assert len({v.identity() for v in variants}) == len(variants)
    assert Options(inductor={"a": 1, "b": 2}).identity() == Options(inductor={"b": 2, "a": 1}).identity()
    assert Options(dump="x").identity() == Options().identity(), "a dump changes no result"


PLAN = SharingPlan(
    64,
    (Layer(0, 1, 1), Layer(1, 1, 1)),
    (Pool(0, 64, {0: ((1.0,),)}, (1,), keep_first=2, keep_last=8),),
    2,
    8,
)


def test_a_plan_brings_its_own_numbers(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    for share in (PLAN, path, str(path)):
        options = Options.read({"share": share, "prefill": "sparse"})
        assert options.share == PLAN
        assert (options.topk, options.keep_first, options.keep_last, options.scope) == (64, 2, 8, "layer")
        assert Options.read({"share": share, "topk": 64}) == Options.read({"share": share})


def test_a_plan_for_layers_with_indexers_brings_no_number_of_tokens() -> None:
    plan = SharingPlan(64, PLAN.layers, (Pool(0, 64, {}, (1,)),), keep_first=0, keep_last=0, kind="index")
    assert Options.read({"share": plan}).topk is None
    with pytest.raises(OptionError, match=r"topk=64 is for dense layers.*leave 'topk' out"):
        Options.read({"share": plan, "topk": 64})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 32}, "topk=32 and the plan's 64 contradict each other"),
        ({"topk": None}, "topk=None and the plan's 64 contradict"),
        ({"keep_first": 2}, "'keep_first' comes from the plan in 'share'; leave it out"),
        ({"scope": "layer"}, "'scope' comes from the plan"),
        ({"dense_layers": 0}, "'dense_layers' comes from the plan"),
    ],
)
def test_what_a_plan_says_is_not_said_twice(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.read({"share": PLAN, **options})


def test_a_file_that_is_no_plan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere.json' cannot be read"):
        Options.read({"share": "nowhere.json"})
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(OptionError, match="no sharing plan"):
        Options.read({"share": tmp_path / "plan.json"})


def test_another_plan_is_another_identity() -> None:
    other = replace(PLAN, data="other")
    identities = {Options.read({"share": plan}).identity() for plan in (PLAN, other)}
    assert len(identities) == 2
    assert Options.read({"share": PLAN}).identity() == Options.read({"share": PLAN}).identity()
