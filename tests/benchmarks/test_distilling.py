"""The benchmark of trained indices: what was trained and timed is kept, for what asks for the same."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distilling
import pytest
import smollm2
import torch

import clsa_compile
from clsa_compile.ir.routing import Layer

HERE = {"device": "CPU", "torch": "2", "model": "one"}


@pytest.fixture
def arguments(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(out=tmp_path, batch=2, cache=64, model=None, jobs=3)


def parsed(monkeypatch: pytest.MonkeyPatch, *given: str) -> argparse.Namespace:
    """Arguments as the command line gives them."""
    monkeypatch.setattr(sys, "argv", ["distilling.py", "--out", "out", *given])
    return distilling.parse_arguments()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was trained; training takes no time."""
    seen: list[dict[str, Any]] = []

    def distill(model: Any, batches: Any, *, topk: int, **more: Any) -> clsa_compile.SharingPlan:
        seen.append({"topk": topk, "batches": batches, **more})
        return clsa_compile.SharingPlan(topk, (Layer(0, 1, 1),), (), 0, 0, data=f"{len(seen)}")

    monkeypatch.setattr(clsa_compile, "distill", distill)
    return seen


SETTINGS = (
    [], ["--key-heads", "2"], ["--topk", "64"], ["--windows", "10"], ["--steps", "7"], ["--length", "64"],
    ["--score", "lightning"], ["--target", "attention"], ["--starts", "0", "3", "5", "7"], ["--model", "m"],
)  # fmt: skip


def test_each_setting_has_a_plan_of_its_own(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the others were made."""
    precision = torch.get_float32_matmul_precision()
    for again in (False, True):
        for number, given in enumerate(SETTINGS, start=1):
            chosen = parsed(monkeypatch, *given)
            environment = {"model": "Other-12345678" if chosen.model else smollm2.NAME}
            learned_from = chosen.windows, chosen.length
            bench = SimpleNamespace(
                folder=tmp_path, model=None, environment=environment, learned_from=lambda x=learned_from: x
            )
            plan, seconds = distilling.trained(bench, 4, chosen)
            assert plan.data == f"{number}"
            assert (seconds == 0) == again
    torch.set_float32_matmul_precision(precision)
    assert len(asked) == len(SETTINGS)


def test_plans_of_default_settings_keep_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(*given: str) -> str:
        return distilling.plan_name(4, smollm2.NAME, parsed(monkeypatch, *given))

    assert named("--steps", "1500") == "4-of-1500-2048-mixture-worth.json"
    assert named("--steps", "1500", "--topk", "512", "256", "--windows", "400") == named("--steps", "1500")
    given = ("--steps", "9", "--topk", "64", "--windows", "10", "--key-heads", "2")
    assert named(*given) == "4-of-9-2048-mixture-worth-key-heads=2-topk=64-windows=10.json"


def test_starts_are_one_number_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(monkeypatch, "--starts", "0", "3", "5").groups == (3,)


def test_a_model_is_named_by_its_weights() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    before = smollm2.model_name(model)
    assert before.startswith("Linear-")
    assert smollm2.model_name(model.double()) == before
    torch.nn.init.ones_(model.bias)
    assert smollm2.model_name(model) != before


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were timed; timing takes no time."""
    seen: list[str] = []

    def beside(work: Any, run: Any, *, more: Callable[[], bool], **_: Any) -> Iterator[tuple[str, float]]:
        for name in work:
            if more():
                seen.append(name)
                yield name, float(len(seen))

    monkeypatch.setattr(distilling, "beside", beside)
    return seen


def test_steps_are_timed_once(arguments: argparse.Namespace, timed: list[str]) -> None:
    plans: dict[str, Any] = {"exact": None, "a": None}
    *_, known = distilling.step_times(plans, HERE, arguments, lambda: True)
    assert known == {"exact": 1.0, "a": 2.0}
    *_, known = distilling.step_times({**plans, "b": None}, HERE, arguments, lambda: True)
    assert known == {"exact": 1.0, "a": 2.0, "b": 3.0}
    assert timed == ["exact", "a", "b"]
    kept = json.loads((arguments.out / "distilling/steps-2-64.json").read_text())
    assert kept == [{"environment": HERE, "ms": known}]


def test_what_was_timed_is_known_when_time_is_up(arguments: argparse.Namespace, timed: list[str]) -> None:
    plans = {"exact": None, "a": None}
    *_, known = distilling.step_times(plans, HERE, arguments, lambda: not timed)
    assert [*distilling.step_times(plans, HERE, arguments, lambda: False)] == [known]
    assert known == {"exact": 1.0}


@pytest.mark.parametrize("other", [{"device": "GPU"}, {"torch": "3"}, {"model": "another"}])
def test_steps_of_another_environment_are_timed_again_and_kept(
    other: dict[str, str], arguments: argparse.Namespace, timed: list[str]
) -> None:
    for here, found in ((HERE, 1.0), (HERE | other, 2.0), (HERE, 1.0), (HERE | other, 2.0)):
        *_, known = distilling.step_times({"exact": None}, here, arguments, lambda: True)
        assert known == {"exact": found}
    assert len(timed) == 2


@pytest.mark.parametrize("content", ['[{"environ', '{"exact": 9.0}', '[{"exact": 9.0}, 3]', "\udcff"])
def test_times_that_cannot_be_read_are_taken_again(
    content: str, arguments: argparse.Namespace, timed: list[str]
) -> None:
    path = arguments.out / "distilling/steps-2-64.json"
    path.parent.mkdir()
    path.write_text(content, errors="surrogateescape")
    *_, known = distilling.step_times({"exact": None}, HERE, arguments, lambda: True)
    assert known == {"exact": 1.0}
    assert distilling.kept_steps(path) == [{"environment": HERE, "ms": known}]
