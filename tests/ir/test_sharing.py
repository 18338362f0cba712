"""Sharing plans: the same after a file, checked when made; every broken file is an error that names it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clsa_compile.errors import OptionError, PlanError
from clsa_compile.ir.fingerprint import Fingerprint
from clsa_compile.ir.routing import Index, Layer, Pool
from clsa_compile.ir.scores import LIGHTNING
from clsa_compile.ir.sharing import SharingPlan

HEADS, KV_HEADS = 4, 2
MODEL = Fingerprint("Tiny", 5, "abc", {"a": 0.5, "b": -0.25, "c": 0.125}, {"f": 0.01})
weight = st.floats(0, 1, width=32)


def layers(number: int) -> tuple[Layer, ...]:
    return tuple(Layer(i, HEADS, KV_HEADS, f"layers.{i}", 16, 16, 0.25, 0.0) for i in range(number))


def pool(anchor: int, members: tuple[int, ...], **changes: Any) -> Pool:
    sources = {0: ((0.25,) * HEADS,), anchor: ((0.5,) * HEADS,)}
    return replace(Pool(anchor, 64, sources, members, keep_first=4, keep_last=32, power=0.5), **changes)


def index_plan(**changes: Any) -> SharingPlan:
    """A plan for layers with indexers."""
    pools = (Pool(0, 64, {}, (1, 2)), Pool(3, 64, {}, (4,)))
    given = {"kind": "index", "pools": pools, "keep_first": 0, "keep_last": 0, "power": 1.0}
    return plan(**{**given, **changes})


def plan(**changes: Any) -> SharingPlan:
    given = {
        "topk": 64,
        "layers": layers(5),
        "pools": (pool(0, (1,)), pool(2, (3, 4))),
        "power": 0.5,
        "model": MODEL,
        "data": "def",
        "quality": {"kl": 0.001},
    }
    return SharingPlan(**{**given, **changes})


@st.composite
def plans(draw: st.DrawFn) -> SharingPlan:
    number = draw(st.integers(2, 6))
    schedule = "F" + draw(st.text("FS", min_size=number - 1, max_size=number - 1))
    sets = draw(st.sampled_from([1, KV_HEADS]))
    rows = st.lists(st.tuples(*[weight] * HEADS), min_size=sets, max_size=sets).map(tuple)
    pools = []
    for anchor, members in followers(schedule).items():
        sources = {a: draw(rows) for a in range(anchor + 1) if a == anchor or draw(st.booleans())}
        mapped = {m: draw(st.tuples(*[st.integers(0, sets - 1)] * KV_HEADS)) for m in members}
        pools.append(Pool(anchor, 64, sources, members, mapped, 4, 32, 0.5))
    model = draw(st.sampled_from([MODEL, None]))
    return plan(layers=layers(number), pools=tuple(pools), model=model, data=draw(st.text(max_size=4)))


def followers(schedule: str) -> dict[int, tuple[int, ...]]:
    found: dict[int, tuple[int, ...]] = {}
    anchor = 0
    for i, role in enumerate(schedule):
        anchor = i if role == "F" else anchor
        if role == "S":
            found[anchor] = (*found.get(anchor, ()), i)
    return found


@given(plan=plans())
def test_a_plan_survives_json(plan: SharingPlan) -> None:
    again = SharingPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.digest() == plan.digest()


def test_a_plan_survives_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    plan().save(path)
    assert SharingPlan.load(path) == plan()
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.json"]


def test_the_pattern_has_a_letter_a_layer() -> None:
    assert plan().pattern() == "FSFSS"
    assert plan(pools=()).pattern() == "FFFFF"
    assert "FSFSS, topk=64" in repr(plan())


@pytest.mark.parametrize(
    "change",
    [
        {"data": "other"},
        {"quality": {}},
        {"model": None},
        {"pools": (pool(0, (1,)),)},
        {"pools": (pool(0, (1,)), pool(2, (3, 4), sources={2: ((0.5, 0.5, 0.5, 0.25),)}))},
    ],
)
def test_another_content_has_another_digest(change: dict[str, Any]) -> None:
    assert plan(**change).digest() != plan().digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 0}, "topk is 0; accepted: 1 to 4096"),
        ({"topk": 4097}, "topk is 4097; accepted: 1 to 4096"),
        ({"keep_last": 61}, "keep_first=4 and keep_last=61 do not fit into topk=64"),
        ({"scope": "head"}, "'layer' or 'kv_head'"),
        ({"power": 0.0}, "power is 0.0"),
        ({"layers": ()}, "it has no layers"),
        ({"layers": layers(5)[::-1]}, "not counted from 0"),
        ({"pools": (pool(0, (1,)), pool(0, (1, 2)))}, "pools[1]: a layer attends to the tokens of one pool"),
        ({"pools": (pool(0, (5,)),)}, "names a layer outside of 0 to 4"),
        ({"pools": (pool(2, (1,)),)}, "its members must come after layer 2"),
        ({"pools": (pool(0, ()),)}, "its members must come after layer 0"),
        ({"pools": (pool(2, (3,), sources={3: ((1.0,) * 4,)}),)}, "its sources must be layers up to 2"),
        ({"pools": (pool(2, (3,), sources={}),)}, "its sources must be layers up to 2"),
        ({"pools": (pool(2, (3,), sources={2: ((1.0,) * 3,)}),)}, "needs 1 rows of 4 weights"),
        ({"pools": (pool(2, (3,), sources={2: ((-1.0,) * 4,)}),)}, "a weight of layer 2 is below 0"),
        ({"pools": (pool(2, (3,), rows={3: (0, 1)}),)}, "rows of layer 3 must name one of 1 sets"),
        ({"pools": (pool(2, (3,), topk=32),)}, "is not the plan's"),
    ],
)
def test_plans_that_contradict_themselves_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)) as error:
        plan(**change)
    assert "search again" in str(error.value)


def test_a_plan_for_indexers_has_layers_only(tmp_path: Path) -> None:
    made = index_plan()
    assert made.pattern() == "FSSFS"
    made.save(tmp_path / "plan.json")
    assert SharingPlan.load(tmp_path / "plan.json") == made
    weighed = Pool(0, 64, {0: ((0.5,) * HEADS,)}, (1,))
    for changes, message in (
        ({"kind": "other"}, "kind is 'other'; accepted: 'mass' or 'index'"),
        ({"pools": (weighed,)}, "it weighs heads, which no indexer asks for"),
        ({"pools": (Pool(2, 64, {}, (1,)),)}, "its members must come after layer 2"),
        ({"kind": "mass"}, "its sources must be layers up to 0"),
    ):
        with pytest.raises(PlanError, match=re.escape(message)):
            index_plan(**changes)


def test_a_layer_may_follow_itself() -> None:
    own = pool(0, (0, 1), sources={0: ((0.25,) * HEADS,)})
    assert plan(pools=(own,)).pattern() == "SSFFF"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "its version is 2, and this clsa reads version 3"),
        ({"version": None}, "its version is None"),
        ({"format": "other"}, "this is no sharing plan"),
        ({"colour": "red"}, "unknown fields: colour"),
        ({"topk": "64"}, "topk is '64'"),
        ({"topk": 10**6}, "accepted: 1 to 4096"),
        ({"layers": [{"path": "a"}]}, "missing fields in layers[0]: heads"),
        ({"pools": [{"anchor": 0}]}, "missing fields in pools[0]: index, members, rows, sources"),
        ({"model": {"name": 1}}, "missing fields in model"),
        ({"quality": {"kl": "low"}}, "quality.kl is 'low'"),
    ],
)
def test_files_that_do_not_fit_are_errors(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**plan().to_dict(), **change}))
    with pytest.raises(PlanError, match=re.escape(message)) as error:
        SharingPlan.load(path)
    assert str(path) in str(error.value)
    assert isinstance(error.value, OptionError)


def test_missing_and_cut_off_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="cannot be read"):
        SharingPlan.load(path)
    whole = json.dumps(plan().to_dict())
    for content in (
        "",
        whole[: len(whole) // 2],
        "[" * 100_000,
        whole.replace('"topk": ', '"topk": ' + "9" * 5000),
    ):
        path.write_text(content)
        with pytest.raises(PlanError, match=r"is no whole JSON .*take a whole copy"):
            SharingPlan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read"):
        SharingPlan.load(path)
    path.write_text("[1]")
    with pytest.raises(PlanError, match="no sharing plan"):
        SharingPlan.load(path)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="cannot be written"):
        plan().save(tmp_path / "file" / "plan.json")


def test_weights_of_another_model_are_refused() -> None:
    named = {name: torch.full((3,), value) for name, value in MODEL.weights.items()}
    plan(model=MODEL).check_weights(named.items())
    plan(model=None).check_weights([("a", torch.zeros(3))])
    with pytest.raises(PlanError, match="for another model than this one: its weights are others, as a"):
        plan(model=MODEL).check_weights([("a", torch.zeros(3))])


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        (((0, (1,)), (1, (2, 3))), "pools[1]: layer 1 chooses, and attends to what another one chose"),
        (((0, (3,)), (1, (4,))), "pools[0]: its members must be those right after layer 0, whose index they"),
    ],
)
def test_indices_are_read_right_after_they_are_made(pools: Any, message: str) -> None:
    """What others take as a schedule, a letter a layer, says no more than that."""
    made = tuple(Pool(anchor, 64, {}, members, {}, 4, 32, 1.0) for anchor, members in pools)
    with pytest.raises(PlanError, match=re.escape(message)):
        plan(pools=made, kind="index", power=1.0)


def distilled(**changes: Any) -> SharingPlan:
    """A plan of two indices, over one key head and over both."""
    pools = (
        Pool(0, 64, {}, (0, 1), index=Index("0", LIGHTNING.text, 1, 1)),
        Pool(2, 64, {}, (2, 3, 4), index=Index("1", LIGHTNING.text, 0, 2)),
    )
    tensors = {}
    for pool in pools:
        assert pool.index is not None
        heads = pool.index.kv_heads * HEADS // KV_HEADS
        shapes = ((64, 64), (heads, 64), (heads,))
        tensors |= {n: torch.ones(s) for n, s in zip(pool.index.tensor_names(), shapes, strict=True)}
    given = {"kind": "distilled", "pools": pools, "keep_first": 0, "keep_last": 0, "power": 1.0}
    return plan(**{**given, "tensors": tensors, **changes})


def test_a_plan_with_indices_is_the_same_after_its_files(tmp_path: Path) -> None:
    made = distilled()
    assert made.pattern() == "ISISS"
    made.save(tmp_path / "plan.json")
    again = SharingPlan.load(tmp_path / "plan.json")
    assert again == made
    assert again.digest() == made.digest()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in made.tensors.items())
    other = distilled(tensors={name: tensor * 2 for name, tensor in made.tensors.items()})
    assert other.digest() != made.digest()
    other.save(tmp_path / "plan.json")
    assert SharingPlan.load(tmp_path / "plan.json") == other, "each has a file of its own"


def test_a_plan_without_its_weights_is_an_error(tmp_path: Path) -> None:
    distilled().save(tmp_path / "plan.json")
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(PlanError, match="its weights cannot be read"):
        SharingPlan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="the weights of the index '0' are missing"):
        SharingPlan.from_dict(distilled().to_dict())


def test_indices_that_contradict_themselves_are_errors() -> None:
    made = distilled()
    first, second = made.pools
    cases = (
        (replace(first, index=None), "it needs an index, and nothing else"),
        (replace(first, members=(1,)), "layer 0 chooses: its members must be that one and those right after"),
        (replace(first, members=(0, 3)), "layer 0 chooses: its members must be that one and those right"),
        (replace(first, index=Index("1", LIGHTNING.text, 0, 2)), "two of its indices have one name"),
        (replace(first, index=Index("0", LIGHTNING.text, 2, 1)), "key heads that layer 0 has not"),
        (replace(first, index=Index("0", "dot", 1, 1)), "must start with one of"),
        (replace(first, index=Index("0", LIGHTNING.text, 0, 2)), "other shapes than 4 heads need"),
    )
    for changed, message in cases:
        with pytest.raises(PlanError, match=re.escape(message)):
            distilled(pools=(changed, second))
    with pytest.raises(PlanError, match="it has an index, which is for plans of the kind 'distilled'"):
        plan(pools=(replace(pool(0, (1,)), index=first.index),))


def test_indices_rank_for_any_number_of_tokens() -> None:
    made = distilled(quality={"kl": 0.5})
    other = made.at(128)
    assert (other.topk, other.quality, other.pools[1].topk) == (128, {}, 128)
    assert other.weights == made.weights
    assert other.at(64) == distilled(quality={})
    with pytest.raises(PlanError, match="accepted: 1 to 4096"):
        made.at(5000)
    with pytest.raises(PlanError, match="this plan is for 64 tokens"):
        plan().at(32)


def test_weights_that_are_no_numbers_or_do_not_fit_are_errors(tmp_path: Path) -> None:
    made = distilled()
    for name, tensor, message in (
        ("0.bias", torch.tensor([1.0, torch.nan]), "are not all numbers"),
        ("0.head", torch.ones(2, 32), "are for states of different widths"),
    ):
        with pytest.raises(PlanError, match=message):
            replace(made, tensors={**made.tensors, name: tensor})
    changed = replace(made, tensors={name: 2 * tensor for name, tensor in made.tensors.items()})
    assert changed.weights != made.weights, "a digest is always that of the weights"
    made.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**data, "weights": "../other"}))
    with pytest.raises(PlanError, match="expected a sha256 in hexadecimal digits"):
        SharingPlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(json.dumps({**data, "version": 4}))
    with pytest.raises(PlanError, match="its version is 4"):
        SharingPlan.load(tmp_path / "plan.json")
