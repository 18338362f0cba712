"""Tasks: scores are those of the two models' logits, and results in a folder are found again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import clsa_compile
from clsa_compile.calibration import tasks as measured
from clsa_compile.calibration.finding import Found
from clsa_compile.calibration.haystack import TASKS, Haystack
from clsa_compile.errors import OptionError, PlanError
from clsa_compile.testing import tiny

OPTIONS = {"topk": 12, "share": "FSFSS", "keep_first": 2, "keep_last": 3}
FEW: dict[str, Any] = {"lengths": 224, "tasks": "single_needle", "depths": 0.5, "samples": 2}


def test_scores_are_those_of_both_models_logits(model: Any, hashes: Any, passes: Any) -> None:
    report = clsa_compile.evaluate_tasks(model, OPTIONS, hashes, **FEW)
    (cell,) = report.cells
    assert (cell.task, cell.length, cell.depth, cell.samples) == ("single_needle", 224, 0.5, 2)
    assert (report.topk, report.schedule, report.seed) == (12, "FSFSS", 0)
    haystack = Haystack(hashes)
    compiled = torch.compile(model, backend=passes(**OPTIONS, prefill="sparse"))
    logprobs: dict[str, list[float]] = {"dense": [], "ours": []}
    same = []
    for number in range(2):
        sample = haystack.sample("single_needle", 224, 0.5, number, 0)
        ids = torch.tensor([sample.ids])
        answer = ids[0, sample.start :, None]
        with torch.no_grad():
            dense, ours = (
                run(input_ids=ids, use_cache=False).logits[0, sample.start - 1 : -1].double().log_softmax(-1)
                for run in (model, compiled)
            )
        logprobs["dense"].append(float(dense.gather(1, answer).mean()))
        logprobs["ours"].append(float(ours.gather(1, answer).mean()))
        same.append(float((dense.argmax(-1) == ours.argmax(-1)).double().mean()))
    near = {"abs_tol": 1e-5, "rel_tol": 1e-4}
    assert math.isclose(cell.dense_logprob, sum(logprobs["dense"]) / 2, **near)
    assert math.isclose(cell.logprob, sum(logprobs["ours"]) / 2, **near)
    assert math.isclose(cell.agreement, sum(same) / 2)
    # A model with random weights knows no answer, and still shows what the plan changes.
    assert cell.dense_accuracy == cell.accuracy == 0
    assert cell.logprob_difference != 0


def test_a_model_that_knows_the_answer_is_right(
    model: Any, hashes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gives the dense graph logits of the next token, and the shared one those of another answer's last."""

    def run(self: Any, sample: Any, identity: str, request: Any) -> dict[str, Any]:
        answer = list(sample.ids[sample.start :])
        wrong = [*answer[:-1], answer[-1] + 1]
        return {"greedy": answer if request is None else wrong, "logprob": -0.5 if request is None else -2.0}

    monkeypatch.setattr(measured._Asker, "_run", run)
    (cell,) = clsa_compile.evaluate_tasks(model, OPTIONS, hashes, **FEW).cells
    assert (cell.dense_accuracy, cell.accuracy) == (1, 0)
    assert 0.5 < cell.agreement < 1
    assert cell.logprob_difference == -1.5


def test_cells_are_every_task_length_and_depth(
    model: Any, hashes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    def run(self: Any, sample: Any, identity: str, request: Any) -> dict[str, Any]:
        lengths.append(len(sample.ids))
        return {"greedy": [0] * (len(sample.ids) - sample.start), "logprob": -1.0}

    monkeypatch.setattr(measured._Asker, "_run", run)
    report = clsa_compile.evaluate_tasks(
        model,
        OPTIONS,
        hashes,
        lengths=(256, 252, 256),
        depths=(0, 0.5),
        samples=1,
        tasks=("common_words", *TASKS),
    )
    expected = [
        (task, length, depth)
        for task in ("common_words", *list(TASKS)[:-1])
        for length in (256, 252)
        for depth in ((0, 0.5) if task in ("single_needle", "multi_key_needle") else (None,))
    ]
    assert [(cell.task, cell.length, cell.depth) for cell in report.cells] == expected
    # All of one length before the next: a graph is made once a length.
    assert lengths == sorted(lengths, reverse=True)


def test_a_schedule_without_followers_is_the_model(model: Any, hashes: Any) -> None:
    report = clsa_compile.evaluate_tasks(model, {**OPTIONS, "share": "FFFFF"}, hashes, **FEW)
    assert report.schedule == "FFFFF"
    assert abs(report.logprob_difference) < 1e-5
    assert report.cells[0].agreement == 1


def no_run(*_: Any) -> None:
    raise AssertionError("nothing is to be run")


def test_results_in_a_folder_are_found_again(
    model: Any, hashes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = clsa_compile.evaluate_tasks(model, OPTIONS, hashes, folder=tmp_path, **FEW)
    real = measured._Asker._run
    monkeypatch.setattr(measured._Asker, "_run", no_run)
    assert clsa_compile.evaluate_tasks(model, OPTIONS, hashes, folder=tmp_path, **FEW) == first
    fewer = {**FEW, "samples": 1}
    clsa_compile.evaluate_tasks(model, OPTIONS, hashes, folder=tmp_path, **fewer)
    with pytest.raises(AssertionError):
        clsa_compile.evaluate_tasks(model, OPTIONS, hashes, folder=tmp_path, seed=1, **FEW)
    asked = []

    def run(self: Any, sample: Any, identity: str, request: Any) -> Any:
        asked.append(request is None)
        return real(self, sample, identity, request)

    monkeypatch.setattr(measured._Asker, "_run", run)
    clsa_compile.evaluate_tasks(model, {**OPTIONS, "topk": 16}, hashes, folder=tmp_path, **FEW)
    assert asked == [False, False]  # what the dense model says does not depend on the plan


def test_an_interruption_loses_the_sample_that_it_was_in(
    model: Any, hashes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = []

    def run(self: Any, sample: Any, identity: str, request: Any) -> dict[str, Any]:
        times.append(identity)
        if len(times) == 4:
            raise KeyboardInterrupt
        return {"greedy": list(sample.ids[sample.start :]), "logprob": -1.0}

    monkeypatch.setattr(measured._Asker, "_run", run)
    with pytest.raises(KeyboardInterrupt):
        clsa_compile.evaluate_tasks(model, OPTIONS, hashes, folder=tmp_path, **FEW)
    clsa_compile.evaluate_tasks(model, OPTIONS, hashes, folder=tmp_path, **FEW)
    assert len(times) == 5


def test_a_plan_and_its_file_are_taken(model: Any, hashes: Any, found: Found, tmp_path: Path) -> None:
    found.plan.save(tmp_path / "plan.json")
    one = {**FEW, "samples": 1}
    by_plan = clsa_compile.evaluate_tasks(model, found.plan, hashes, **one)
    assert by_plan == clsa_compile.evaluate_tasks(model, tmp_path / "plan.json", hashes, **one)
    assert by_plan.schedule == found.plan.pattern()
    with pytest.raises(PlanError, match=r"its weights are others, as .*; search for a plan for it"):
        clsa_compile.evaluate_tasks(tiny("llama", num_hidden_layers=5), found.plan, hashes, **one)


@pytest.mark.parametrize(
    ("plan", "settings", "message"),
    [
        ({"share": 2}, {}, "give 'topk', or longer sequences"),
        (OPTIONS, {"tasks": "single_nedle"}, "unknown task 'single_nedle'; did you mean 'single_needle'[?]"),
        (OPTIONS, {"tasks": ["single_needle", 3]}, "unknown task 3 Known tasks: single_needle, multi"),
        (OPTIONS, {"tasks": ()}, r"'tasks' is \(\); accepted: one task at least"),
        (OPTIONS, {"lengths": ()}, r"'lengths' is \(\); accepted: one length at least"),
        (OPTIONS, {"depths": ()}, r"'depths' is \(\); accepted: one depth at least"),
        (OPTIONS, {"lengths": (224, 0)}, "'lengths' holds 0; accepted: numbers of tokens"),
        (OPTIONS, {"lengths": 224.0}, "'lengths' holds 224.0; accepted: numbers of tokens"),
        (OPTIONS, {"depths": (0, 1.5)}, "'depths' holds 1.5; accepted: 0, the beginning, to 1, the end"),
        (OPTIONS, {"depths": -0.1}, "'depths' holds -0.1"),
        (OPTIONS, {"depths": math.nan}, "'depths' holds nan"),
        (OPTIONS, {"depths": "0.5"}, "'depths' holds '0.5'"),
        (OPTIONS, {"samples": 0}, "'samples' is 0; accepted: a number from 1"),
        (OPTIONS, {"samples": True}, "'samples' is True"),
        (OPTIONS, {"seed": -1}, "'seed' is -1; accepted: a number from 0"),
        (OPTIONS, {"filler": " "}, "the filler holds no text"),
        (OPTIONS, {"lengths": 150}, "150 tokens are too few for the task 'single_needle': .* at least"),
        ({**OPTIONS, "topk": 210}, {}, "a sequence of 224 tokens is too short for topk=210: .* give 226"),
        ({**OPTIONS, "dense_below": 210}, {}, "224 tokens is too short for dense_below=210: .* give 226"),
        (OPTIONS, {"lengths": 257}, "a length of 257 is more than the 256 tokens that the model takes"),
    ],
)
def test_what_cannot_be_measured_is_an_error(
    plan: Any, settings: dict[str, Any], message: str, model: Any, hashes: Any
) -> None:
    with pytest.raises(OptionError, match=message):
        clsa_compile.evaluate_tasks(model, plan, hashes, **{**FEW, **settings})


def test_without_a_tokenizer_there_is_nothing_to_ask_with(model: Any) -> None:
    with pytest.raises(OptionError, match="the tokenizer is None"):
        clsa_compile.evaluate_tasks(model, OPTIONS, None, **FEW)
