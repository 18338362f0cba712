"""Trainers: bit for bit the same where killed and resumed; bad losses and full disks lose nothing."""

from __future__ import annotations

import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.calibration import trainer
from clsa_compile.calibration.borrowed import Borrowed
from clsa_compile.calibration.given import Model
from clsa_compile.calibration.index_training import Loss
from clsa_compile.calibration.stages import Stages
from clsa_compile.calibration.trainer import Trainer, Training
from clsa_compile.errors import DistillError
from clsa_compile.ir import tensors as files
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.testing import tiny

STARTS = (0, 3)
TRAINING = Training(topk=8, steps=9, rows=16)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "EVERY", 3)


class Made(Trainer):
    """A trainer with its student at hand."""

    student: Borrowed

    def plan(self) -> SharingPlan:
        return self.student.plan()


def make(model: Any, tokens: list[Tensor], folder: Path | None, training: Training = TRAINING) -> Made:
    given = [ids[None] for batch in tokens for ids in batch]
    known = Model(model, given[0], Stages(folder))
    student = Borrowed(known, given, STARTS, training)
    made = Made(known, given, student, training)
    made.student = student
    return made


def test_the_loss_falls(model: Any, tokens: list[Tensor]) -> None:
    made = make(model, tokens, None, Training(topk=8, steps=40, rows=40, query_rate=3e-3, head_rate=1e-2))
    made.run()
    assert sum(made.losses[-8:]) < 0.8 * sum(made.losses[:8])


def test_a_checkpoint_that_finds_no_room_is_an_oserror(tmp_path: Path) -> None:
    """safetensors has an error of its own, which is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            Stages(tmp_path).keep("name", 0, {"a": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [1, *(pytest.param(step, marks=pytest.mark.slow) for step in (3, 8))])
def test_killed_training_goes_on_bit_for_bit(
    at: int, model: Any, tokens: list[Tensor], tmp_path: Path
) -> None:
    whole = make(model, tokens, None)
    whole.run()
    told = []

    def kill() -> None:
        told.append(1)
        if len(told) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(model, tokens, tmp_path).run(kill)
    again = make(model, tokens, tmp_path)
    again.run()
    assert again.losses == whole.losses
    assert again.plan() == whole.plan()
    assert again.plan().weights == whole.plan().weights
    finished = make(model, tokens, tmp_path)
    finished.run()
    assert finished.plan().weights == whole.plan().weights, "nothing is left to do"


@pytest.mark.slow
def test_other_arguments_do_not_go_on_with_these(model: Any, tokens: list[Tensor], tmp_path: Path) -> None:
    make(model, tokens, tmp_path).run()
    for training in (Training(topk=8, steps=9, rows=16, seed=1), Training(topk=9, steps=9, rows=16)):
        other = make(model, tokens, tmp_path, training)
        other.run()
        assert other.losses == _alone(model, tokens, training)


def _alone(model: Any, tokens: list[Tensor], training: Training) -> list[float]:
    made = make(model, tokens, None, training)
    made.run()
    return made.losses


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(
    model: Any, tokens: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Borrowed.losses
    calls = []

    def spoiled(*args: Any) -> Any:
        calls.append(1)
        found = real(*args)
        if len(calls) != 5:
            return found
        return [Loss(loss.divergence * torch.nan, loss.added) for loss in found]

    monkeypatch.setattr(Borrowed, "losses", spoiled)
    with pytest.raises(DistillError, match=re.escape("the loss is nan in step 4, and training stopped")):
        make(model, tokens, tmp_path).run()
    whole = make(model, tokens, None)
    whole.run()
    calls[:] = [1] * 10
    again = make(model, tokens, tmp_path)
    again.run()
    assert len(calls) == 10 + 6, "steps 3 to 8: the first three were kept"
    assert again.plan().weights == whole.plan().weights


def test_a_model_that_gives_no_numbers_is_noticed(tokens: list[Tensor]) -> None:
    broken = tiny("llama", num_hidden_layers=5)
    with torch.no_grad():
        broken.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(DistillError, match="the loss is nan in step 0"):
        make(broken, tokens, None).run()


def test_a_full_disk_is_an_error_and_the_checkpoint_before_stays(
    model: Any, tokens: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = files.write_whole, []

    def full(path: Any, write: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(path, write)

    monkeypatch.setattr(files, "write_whole", full)
    with pytest.raises(DistillError, match=re.escape("the checkpoint of step 6 cannot be written")):
        make(model, tokens, tmp_path).run()
    (kept,) = tmp_path.iterdir()
    again = make(model, tokens, tmp_path)
    again.run()
    assert again.losses == _alone(model, tokens, TRAINING), kept
