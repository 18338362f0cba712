"""`clsa search`, `distill`, `evaluate`, `tasks`: a folder and texts in, a report out; mistakes in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import clsa_compile
from clsa_compile import commands
from clsa_compile.__main__ import main
from clsa_compile.calibration import searching, tasks
from clsa_compile.calibration.finding import Found
from clsa_compile.calibration.task_report import TaskCell, TaskReport
from clsa_compile.commands import windows
from clsa_compile.errors import OptionError, PlanError
from clsa_compile.ir.sharing import SharingPlan
from clsa_compile.testing import tiny

SETTINGS = ["--length", "48", "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers whose tokens are letters, and two texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    letters = "abcdefghijklmnopqrstuvwxyz .,;-'\n"
    tokenizer = Tokenizer(
        models.WordLevel({letter: i + 1 for i, letter in enumerate(letters)} | {"?": 0}, "?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    tiny("llama", num_hidden_layers=4, max_position_embeddings=640).save_pretrained(folder)
    (folder / "prose.txt").write_text("the quick brown fox jumps over the lazy dog; " * 5)
    (folder / "other.txt").write_text("who chooses tokens, and who attends to them? " * 3)
    return folder


def arguments(command: str, folder: Path, *more: str) -> list[str]:
    texts = [str(folder / name) for name in ("prose.txt", "other.txt")]
    return [command, str(folder), "--text", *texts, *SETTINGS, *more]


@pytest.mark.slow
def test_a_plan_is_found_and_measured_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    more = (
        "--topk",
        "16",
        "--anchors",
        "2",
        "--keep-last",
        "4",
        "--out",
        str(out),
    )
    assert main(arguments("search", folder, *more)) == 0
    plan = SharingPlan.load(out)
    assert plan.pattern().count("F") == 2
    assert f"schedule {plan.pattern()}, 16 tokens: perplexity" in capsys.readouterr().out
    page = tmp_path / "report.html"
    more = ("--plan", str(out), "--json", "--sequences", "2", "--html", str(page))
    assert main(arguments("evaluate", folder, *more)) == 0
    assert plan.pattern() in page.read_text()
    report = json.loads(capsys.readouterr().out)
    assert report["schedule"] == plan.pattern()
    assert report["tokens"] == 2 * 23
    assert len(report["worst_token"]["text"]) == 1
    assert any((tmp_path / "plan.stages").iterdir())
    assert main(arguments("evaluate", folder, "--plan", str(out), "--keep-last", "4")) == 2
    assert "the option 'keep_last' comes from the plan in 'share'; leave it out" in capsys.readouterr().err


def test_stages_are_kept_beside_the_plan_unless_said_otherwise(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plan:
        def save(self, path: Path) -> None:
            if path.stem == "full":
                raise PlanError(f"the plan cannot be written to '{path}': no space left")

    used: list[Path | None] = []

    def found(model: Any, batches: Any, asked: Any, folder: Path | None, progress: bool) -> Found:
        used.append(folder)
        return Found(Plan(), None)  # type: ignore[arg-type]

    monkeypatch.setattr(searching, "find", found)
    monkeypatch.setattr(commands, "_report", lambda *_: None)

    def searched(name: str, *more: str) -> tuple[int, str]:
        out = str(tmp_path / f"{name}.json")
        asked = arguments("search", folder, "--topk", "64", "--anchors", "2", "--out", out, *more)
        asked.remove("--quiet")
        return main(asked), capsys.readouterr().err

    stages = tmp_path / "full.stages"
    status, err = searched("full")
    assert (status, used) == (2, [stages])
    assert f"clsa: stages are kept in {stages}: the same command goes on after an" in err
    assert "full.json': no space left; the same command with another --out and " in err
    assert f"--folder '{stages}' goes on from what that folder has kept" in err
    status, err = searched("other", "--folder", str(stages))
    assert (status, used) == (0, [stages, stages])
    assert f"clsa: the plan is in {tmp_path / 'other.json'}; {stages} may be deleted" in err
    status, err = searched("full", "--no-folder")
    assert (status, used[2:]) == (2, [None])
    assert "no space left; what was found is lost, since --no-folder was given" in err
    assert "are kept" not in err


@pytest.mark.slow
def test_indices_are_trained_and_measured_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    more = ["--topk", "16", "--steps", "2", "--out", str(out), "--folder", str(tmp_path / "kept")]
    assert main(arguments("distill", folder, *more, "--groups", "0", "1")) == 0
    assert SharingPlan.load(out).pattern() == "IISS"
    assert "schedule IISS, 16 tokens: perplexity" in capsys.readouterr().out
    assert main(arguments("distill", folder, *more, "--groups", "2", "--kv-heads", "1")) == 0
    assert SharingPlan.load(out).pattern().count("I") == 2
    capsys.readouterr()
    assert main(arguments("evaluate", folder, "--plan", str(out))) == 0
    assert SharingPlan.load(out).pattern() in capsys.readouterr().out


@pytest.mark.slow
def test_tasks_are_measured(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["--share", "2", "--topk", "48", "--quiet", "--device", "cpu", "--folder", str(tmp_path)]
    few = ["--tasks", "single_needle", "--lengths", "400", "--depths", "0", "0.5", "--samples", "1"]
    page = tmp_path / "tasks.html"
    assert main(["tasks", str(folder), *plan, *few, "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "tasks, schedule FSFS, 48 tokens:" in shown
    assert [line.split()[:4] for line in shown.splitlines()[2:]] == [
        ["single_needle", "400", "0", "1"],
        ["single_needle", "400", "0.5", "1"],
    ]
    assert "single_needle" in page.read_text()
    assert main(["tasks", str(folder), *plan, *few, "--json", "--seed", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 2
    other = ["--filler", str(folder / "other.txt")]
    assert main(["tasks", str(folder), *plan, *few, *other]) == 0
    assert capsys.readouterr().out != shown


def test_tasks_are_measured_with_text_and_shown_on_its_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = TaskCell("single_needle", 48, 0.5, 1, 1.0, 0.0, -0.1, -0.3, 0.5)

    def measured(model: Any, plan: Any, tokenizer: Any, **settings: Any) -> TaskReport:
        assert settings == {"lengths": 48, "folder": None, "progress": False}
        assert plan == {"share": 2, "topk": 16, "keep_first": 1, "keep_last": 4, "dense_below": 20}
        return TaskReport(plan["topk"], "FSFS", 0, (cell,))

    monkeypatch.setattr(tasks, "evaluate_tasks", measured)
    plan = ("--share", "2", "--topk", "16", "--keep-first", "1", "--keep-last", "4", "--dense-below", "20")
    asked = arguments("evaluate", folder, "--tasks", "--sequences", "1", *plan)
    page = tmp_path / "report.html"
    assert main([*asked, "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "schedule FSFS, 16 tokens: perplexity" in shown
    assert "tasks, schedule FSFS, 16 tokens: 100.0% right -> 0.0%" in shown
    assert "Synthetic tasks" in page.read_text()
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["cells"][0]["task"] == "single_needle"


def test_mistakes_in_tasks_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["--share", "2", "--topk", "48", "--quiet", "--device", "cpu"]
    for more, message in (
        (["--tasks", "needle"], "unknown task 'needle'; did you mean 'single_needle'?"),
        (["--lengths", "60"], "a sequence of 60 tokens is too short for topk=48"),
        (["--depths", "2"], "'depths' holds 2.0"),
        (["--filler", "nowhere.txt"], "the text 'nowhere.txt' cannot be read"),
    ):
        assert main(["tasks", str(folder), *plan, *more]) == 2
        assert message in capsys.readouterr().err


class Loaded:
    """A model of short sequences, whose tokens are a text's first letter."""

    class model:
        class config:
            max_position_embeddings = 40

    @staticmethod
    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(text[0])] * len(text)}


def test_every_part_of_the_windows_has_all_texts(tmp_path: Path) -> None:
    texts = [tmp_path / name for name in "abc"]
    for path, count in zip(texts, (10, 10, 100), strict=True):
        path.write_text(path.name * 4 * count)

    def kinds(most: int | None) -> str:
        return "".join(chr(int(ids[0, 0])) for ids in windows(Loaded, texts, 4, most))  # type: ignore[arg-type]

    every = kinds(None)
    assert [every.count(kind) for kind in "abc"] == [10, 10, 100]
    for start in range(0, 120, 30):
        assert all(every[start : start + 30].count(kind) in (2, 3) for kind in "ab")
    # Fewer are of each kind alike, as far as there is enough of it, and spread too.
    assert kinds(9) == "abcabcabc"
    fewer = kinds(40)
    assert [fewer.count(kind) for kind in "abc"] == [10, 10, 20]
    assert set(fewer[-10:]) == set("abc")


def test_windows_are_spread_over_texts(folder: Path) -> None:
    texts = [folder / "prose.txt", folder / "other.txt"]
    found = windows(Loaded, texts, None, None)  # type: ignore[arg-type]
    assert [chr(int(ids[0, 0])) for ids in found] == ["t", "w", "t", "t", "w", "t", "w", "t"]
    assert {ids.shape for ids in found} == {(1, 40)}
    assert len(windows(Loaded, texts, 20, 3)) == 3  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no text is as long as 999 tokens"):
        windows(Loaded, texts, 999, None)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"nothing.txt' cannot be read"):
        windows(Loaded, [folder / "nothing.txt"], 20, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["search", "--topk", "16", "--out", "plan.json"], "clsa: give 'anchors'"),
        (
            ["search", "--topk", "0", "--anchors", "2", "--out", "plan.json"],
            "'topk' is 0; accepted: 1 to 4096",
        ),
        (["search", "--topk", "64", "--anchors", "2", "--out", "plan"], "a plan's file ends in .json"),
        (["search", "--topk", "64", "--anchors", "2", "--out", "plan.json"], "cannot load a model from"),
        (["distill", "--topk", "64", "--groups", "1", "2", "--out", "a.json"], "begins at layer 0"),
        (["distill", "--topk", "64", "--out", "a.json"], "give 'groups', how many indices"),
        (["distill", "--topk", "64", "--groups", "2", "--out", "a"], "a plan's file ends in .json"),
        (
            ["search", "--topk", "64", "--anchors", "2", "--out", "/dev/null/plan.json"],
            "--out: nothing can be written to '/dev/null/plan.json'",
        ),
        (["evaluate", "--heatmap", "/dev/null/a.png"], "--heatmap: nothing can be written to"),
        (["tasks", "--html", "/"], "--html: nothing can be written to '/'"),
        (["evaluate"], "give --plan, or --share with --topk"),
        (["evaluate", "--plan", "a.json", "--share", "2"], "give --plan, or --share with --topk"),
        (["evaluate", "--plan", "a.json"], "the plan 'a.json' cannot be read"),
        (
            ["evaluate", "--share", "2", "--topk", "16"],
            "keep_first=4 and keep_last=32 are more tokens than topk=16 selects; give smaller ones",
        ),
        (["tasks", "--share", "2", "--topk", "64", "--pool", "99"], "'pool' needs an R in 'share'"),
        (["tasks", "--share", "2", "--keep-last", "4"], "'keep_last' is for dense layers, and needs 'topk'"),
        (["evaluate", "--share", "2", "--topk", "64"], "cannot load a model from"),
        (["tasks"], "give --plan, or --share with --topk"),
        (["tasks", "--share", "2", "--topk", "64"], "cannot load a model from"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = more
    model = str(tmp_path / "model.gguf")
    text = [] if command == "tasks" else ["--text", str(tmp_path / "a.txt")]
    assert main([command, model, *text, "--quiet", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_export_writes_a_package_and_prints_its_digest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # No tokenizer lies beside the model: it takes none.
    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    path = tmp_path / "a.pt2"
    sizes = ("--batch", "1", "--cache", "32:64", "--prompt", "2:16")
    asked = ("export", str(tmp_path / "model"), "--out", str(path), "--format", "program", "--device", "cpu")
    assert main([*asked, *sizes, "--padding", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["path"], facts["bytes"]) == (str(path), path.stat().st_size)
    package = clsa_compile.load(path, digest=facts["digest"])
    assert package.step(torch.zeros(1, 3, dtype=torch.long), package.caches(1, 40)).shape == (1, 128)
    assert package.manifest.decoding.is_padded
    with pytest.raises(clsa_compile.PackageError, match="has 2 in dimension 0; the program takes 1"):
        package.caches(2, 40)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("missing", "--out", "a.pt2"), "cannot load a model from"),
        (("model", "--out", "a.zip"), "a package's file ends in .pt2"),
        (("model", "--out", "a.pt2", "--topk", "0"), "'topk' is 0"),
        (("model", "--out", "a.pt2", "--batch", "4:2"), "dynamic_shapes['batch'] is (4, 2)"),
    ],
)
def test_export_says_what_cannot_be(
    arguments: tuple[str, ...], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    folder, *rest = arguments
    given = ["export", str(tmp_path / folder), "--device", "cpu", "--format", "program", *rest]
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    # Hugging Face's own progress comes before.
    last = err.rstrip("\n").rpartition("\n")[2]
    assert last.startswith("clsa: ")
    assert reason in last
