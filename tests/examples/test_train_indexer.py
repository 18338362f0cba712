"""Training an index: its parts against plain spellings, a run that is cut off and goes on, and its errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import index_training
import pytest
import torch
import train_indexer
import training_text
from index_training import Seen, coverage, divergence, look, new_decoder, next_token_loss
from torch import Tensor
from yoco_decoder import Config, Decoder

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = [
    "--tiny",
    "--device",
    "cpu",
    "--steps",
    "4",
    "3",
    "3",
    "--interval",
    "2",
    "--batch",
    "4",
    "--evaluated",
    "8",
]
CONFIG = Config(
    vocabulary=256, layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, head_dim=8, window=4, topk=5,
    index_dim=8,
)  # fmt: skip


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    return new_decoder(CONFIG)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    """A file, so that tests do not depend on the standard library's size."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of the text, {i * i}\n" for i in range(2000)))
    return ["--text", str(path)]


def forward(model: Decoder, ids: Tensor) -> Tensor:
    return model(ids, torch.arange(ids.shape[1]), model.new_cache(len(ids)))


def twin(model: Decoder, attention: Any) -> Decoder:
    """The example's own model of another kind, with the same weights."""
    other = Decoder(replace(model.config, attention=attention))
    other.load_state_dict(model.state_dict(), strict=False)
    return other


# -- parts ---------------------------------------------------------------------------------------


def test_dense_and_sparse_forwards_are_the_examples_own(model: Decoder, ids: Tensor) -> None:
    torch.testing.assert_close(look(model, ids).logits, forward(twin(model, "yoco"), ids))
    torch.testing.assert_close(look(model, ids, topk=5).logits, forward(model, ids))


def test_the_teacher_is_the_mean_of_all_layers_and_heads_probabilities(model: Decoder, ids: Tensor) -> None:
    found: list[Tensor] = []
    attend = index_training.attend

    def watched(q: Tensor, memory: Any, allowed: Any) -> Tensor:
        k = memory.k.repeat_interleave(2, dim=1)
        scores = (q @ k.transpose(-1, -2)).double() / q.shape[-1] ** 0.5
        future = torch.ones(24, 24, dtype=torch.bool).triu(1)
        found.append(scores.masked_fill(future, -torch.inf).softmax(-1))
        return attend(q, memory, allowed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_training, "attend", watched)
        seen = look(model, ids, teach=True)
    assert len(found) == 2
    torch.testing.assert_close(seen.teacher, torch.stack(found).mean((0, 2)).float())
    assert not seen.teacher.requires_grad


def test_in_the_joint_stage_the_teacher_is_over_what_was_selected(model: Decoder, ids: Tensor) -> None:
    seen = look(model, ids, topk=5, teach=True)
    assert (seen.teacher[~seen.allowed] == 0).all()
    torch.testing.assert_close(seen.teacher.sum(-1), torch.ones(2, 24))
    assert seen.allowed.sum(-1).max() == 5


def test_the_divergence_is_the_kl_over_what_is_allowed() -> None:
    torch.manual_seed(0)
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()
    scores = torch.randn(2, 6, 6, requires_grad=True)
    teacher = torch.randn(2, 6, 6).masked_fill(~allowed, -torch.inf).softmax(-1)
    loss = divergence(Seen(torch.zeros(()), scores, allowed, teacher))
    expected = 0.0
    for row in range(6):
        p = teacher[:, row, : row + 1].double()
        q = scores[:, row, : row + 1].double().softmax(-1)
        expected += (p * (p / q).log()).sum(-1).mean().item() / 6
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert scores.grad.isfinite().all()
    same = Seen(torch.zeros(()), teacher.log(), allowed, teacher)
    assert divergence(same).item() == pytest.approx(0.0, abs=1e-6)


def test_coverage_is_the_mass_of_the_selected_tokens() -> None:
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    teacher = torch.tensor([[[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.6, 0.3, 0.1, 0], [0.5, 0.1, 0.1, 0.3]]])
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0]).expand(1, 4, 4)  # the last tokens
    found = coverage(Seen(torch.zeros(()), scores, allowed, teacher), topk=2)
    assert found.index == pytest.approx((0.4 + 0.4) / 2)
    assert found.recent == pytest.approx(found.index)
    assert found.best == pytest.approx((0.9 + 0.8) / 2)
    assert found.chance == pytest.approx((2 / 3 + 2 / 4) / 2)


def test_known_tokens_count_more_in_the_loss() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 3, 7), torch.tensor([[1, 2, 3]])
    known = torch.tensor([[False, False, True]])
    first, second = (next_token_loss(logits[:, i : i + 2], ids[:, i : i + 2]) for i in range(2))
    assert next_token_loss(logits, ids, known=known, emphasis=3.0).item() == pytest.approx(
        ((first + 3 * second) / 4).item()
    )
    assert next_token_loss(logits, ids, start=1).item() == pytest.approx(second.item())


def test_a_lesson_says_where_a_value_can_be_known() -> None:
    generator = torch.Generator().manual_seed(0)
    ids, known = training_text.lesson(torch.arange(64) % 100, 12, 4, generator)
    values: dict[int, int] = {}
    for i, token in enumerate(ids.tolist()):
        if i and training_text.KEYS <= ids[i - 1] < training_text.VALUES:
            key = int(ids[i - 1])
            assert bool(known[i]) == (key in values)
            assert values.setdefault(key, token) == token
        else:
            assert not known[i]
    assert len(values) <= 4
    assert ids[ids < training_text.KEYS].tolist() == list(range(40)), "the text around pairs stays in order"


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_lies_at_its_depth_and_is_asked_for_at_the_end(depth: float) -> None:
    ids = training_text.needle(
        torch.arange(50) % 100, depth, 3, 16, torch.Generator().manual_seed(0)
    ).tolist()
    assert len(ids) == 50
    first = ids.index(ids[-2])
    assert ids[first : first + 2] == ids[-2:]
    assert first < 48
    before = sum(token < training_text.KEYS for token in ids[:first])
    assert before == round(depth * 40)
    keys = [t for t in ids if training_text.KEYS <= t < training_text.VALUES]
    assert len(set(keys)) == 4


def test_held_out_text_is_no_training_text(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"<{i}>" * 200)
    found = training_text.read(sorted(tmp_path.iterdir()), 16)
    train, held_out = (
        {part.split(">")[0] for part in bytes(t.tolist()).decode().split("<")[1:]}
        for t in (found.train, found.held_out)
    )
    assert not train & held_out
    assert len(train | held_out) == 40


def test_every_machine_has_enough_text() -> None:
    found = training_text.read(training_text.standard_library(), 1024)
    assert len(found.train) > 4e6
    assert len(found.held_out) > 2e5
    assert max(found.train.max(), found.held_out.max()) < training_text.KEYS


# -- runs ----------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / json.loads((folder / "state.json").read_text())["tensors"])


def results(folder: Path) -> Any:
    return json.loads((folder / "state.json").read_text())["state"]


def test_a_run_trains_compares_and_draws(tmp_path: Path, text: list[str], capsys: Any) -> None:
    code = train_indexer.main([*SHORT, *text, "--out", str(tmp_path / "run")])
    assert code in (0, 1)
    state = results(tmp_path / "run")
    assert list(state["evaluations"]) == ["dense", "index", "joint"]
    assert [e["stage"] for e in state["history"]] == ["dense"] * 4 + ["index"] * 3 + ["joint"] * 3
    assert ["loss" in e for e in state["history"]] == [True] * 4 + [False] * 3 + [True] * 3
    assert ["kl" in e for e in state["history"]] == [False] * 4 + [True] * 6
    assert (tmp_path / "run/training.png").stat().st_size > 10_000
    assert len(list((tmp_path / "run").iterdir())) == 3, "one checkpoint stays"
    printed = capsys.readouterr().out
    assert "mass" in printed
    assert "too few to compare; train longer" in printed, "after ten steps nothing is recalled"


def test_the_backbone_stays_while_the_index_learns(tmp_path: Path, text: list[str]) -> None:
    arguments = [*SHORT, "--steps", "1", "30", "1", "--out", "x"]
    settings = train_indexer.settings_of(train_indexer.parse_arguments(arguments))
    found = training_text.read([Path(text[1])], settings.length)
    trainer = train_indexer.Trainer(settings, found, train_indexer.Folder(tmp_path, {}), torch.device("cpu"))
    trainer.state.stage = 1
    trainer.optimizers = trainer._optimizers()
    before = {name: w.clone() for name, w in trainer.model.named_parameters()}
    first = trainer.step()["kl"]
    for _ in range(29):
        last = trainer.step()["kl"]
    changed = {n for n, w in trainer.model.named_parameters() if not torch.equal(w, before[n])}
    assert changed == {n for n in before if "indexer" in n}
    assert len(changed) == 2
    assert last < first / 2


class Killed(BaseException):
    """What ends a run between two steps."""


@pytest.mark.parametrize("steps", [1, 3, 5, 9])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    steps: int, tmp_path: Path, text: list[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train_indexer.main([*SHORT, *text, "--out", str(whole)])
    made, step = [], train_indexer.Trainer.step

    def mortal(trainer: Any) -> Any:
        if len(made) == steps:
            raise Killed
        made.append(1)
        return step(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_indexer.Trainer, "step", mortal)
        with pytest.raises(Killed):
            train_indexer.main([*SHORT, *text, "--out", str(cut)])
    kept = results(cut)["history"] if (cut / "state.json").exists() else []
    assert steps - len(kept) < 2, "no more than an interval is lost"
    train_indexer.main([*SHORT, *text, "--out", str(cut)])
    assert results(cut) == results(whole)
    mine, its = weights(cut), weights(whole)
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path, text: list[str]) -> None:
    out = ["--out", str(tmp_path / "run")]
    replaces, replace_file = [], train_indexer.Folder._replace

    def mortal(folder: Any, name: str, write: Any) -> None:
        replaces.append(name)
        if len(replaces) == 4:  # the second checkpoint's state
            (folder.path / f".{name}.part").write_text('{"half')
            raise Killed
        replace_file(folder, name, write)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_indexer.Folder, "_replace", mortal)
        with pytest.raises(Killed):
            train_indexer.main([*SHORT, *text, *out])
    assert results(tmp_path / "run")["step"] == 2
    assert train_indexer.main([*SHORT, *text, *out]) in (0, 1)


def test_a_run_whose_time_is_up_goes_on_with_the_same_command(tmp_path: Path, text: list[str]) -> None:
    command = [*SHORT, *text, "--out", str(tmp_path / "run")]
    assert train_indexer.main([*command, "--minutes", "0"]) == 2
    assert results(tmp_path / "run")["step"] == 2
    assert train_indexer.main(command) in (0, 1)
    assert train_indexer.main(command) in (0, 1), "a finished run only prints"


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = train_indexer.next_token_loss, []

    def diverging(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return loss(*args, **kwargs) * (torch.nan if len(calls) == 4 else 1.0)

    monkeypatch.setattr(train_indexer, "next_token_loss", diverging)
    with pytest.raises(SystemExit, match=r"diverged.*nan.*step 3 of stage dense.*last good checkpoint"):
        train_indexer.main([*SHORT, *text, "--out", str(tmp_path / "run")])
    assert results(tmp_path / "run")["step"] == 2
    assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())


def test_a_gradient_that_is_infinite_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, text: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last step before a checkpoint, which would hold what the step made of the weights."""
    loss, calls = train_indexer.next_token_loss, []

    def steep(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        found = loss(*args, **kwargs)
        if len(calls) == 4:
            found.register_hook(lambda gradient: gradient * torch.inf)
        return found

    monkeypatch.setattr(train_indexer, "next_token_loss", steep)
    message = r"diverged: a gradient of norm (inf|nan) in step 3 of stage dense.*last good checkpoint"
    with pytest.raises(SystemExit, match=message):
        train_indexer.main([*SHORT, *text, "--out", str(tmp_path / "run")])
    assert results(tmp_path / "run")["step"] == 2
    assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topk", "64"], "selects everything: give --topk below 64"),
        (["--window", "64"], "leaves nothing to look back for"),
        (["--length", "16"], "--length of at least 20"),
        (["--length", "100000"], "too few for sequences of 100000"),
        (["--text", "/nonexistent"], "no text to train on: .*nonexistent"),
    ],
)
def test_impossible_settings_say_what_to_do(
    arguments: list[str], message: str, tmp_path: Path, text: list[str]
) -> None:
    with pytest.raises(SystemExit, match=message):
        train_indexer.main([*SHORT, *text, "--out", str(tmp_path / "run"), *arguments])
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused_and_named(tmp_path: Path, text: list[str]) -> None:
    command = [*SHORT, *text, "--out", str(tmp_path / "run")]
    assert train_indexer.main([*command, "--minutes", "0"]) == 2
    with pytest.raises(SystemExit, match=r"other settings \(seed, topk\)"):
        train_indexer.main([*command, "--seed", "1", "--topk", "9"])


def test_only_the_variant_with_one_index_is_trained() -> None:
    with pytest.raises(ValueError, match="only yoco-clsa"):
        new_decoder(replace(CONFIG, attention="yoco"))


def test_scripts_stay_short() -> None:
    for name in ("train_indexer", "index_training", "training_text", "training_folder", "training_report"):
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 400, name


@pytest.mark.exhaustive
def test_the_tiny_size_learns_to_recall_and_the_index_keeps_it(tmp_path: Path) -> None:
    assert train_indexer.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)]) == 0
    found = results(tmp_path)["evaluations"]
    assert sum(found["dense"]["dense"]["needles"]) / 5 > 0.9
    covered = found["joint"]["coverage"]
    assert covered["index"] > (covered["chance"] + covered["best"]) / 2
    first = next(e for e in results(tmp_path)["history"] if "kl" in e)
    assert found["dense"]["coverage"]["index"] < covered["index"] - 0.1, "an untrained index covers less"
    assert results(tmp_path)["history"][-1]["kl"] < first["kl"] / 5
