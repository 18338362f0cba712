"""The command line: inspects a configuration without weights, and says what cannot be in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import clsa_compile.configurations
from clsa_compile.__main__ import main
from clsa_compile.testing import tiny

SMALL = ("--cache", "64", "--prompt", "8", "--at", "64,1024", "--device", "h100")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").config.save_pretrained(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Runs `clsa inspect` on what cannot be; returns the one line that it says."""
    assert main(["inspect", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "", "nothing half-written"
    assert err.count("\n") == 1
    assert err.startswith("clsa: ")
    return err


def test_a_configuration_is_enough(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "config.json"), *SMALL]) == 0
    out = capsys.readouterr().out
    assert out.count("2 dense with each key read once") == 2
    assert (
        out.index("== prefill: llama") < out.index("predicted for 8 tokens") < out.index("== decode: llama")
    )
    assert "predicted for a token a sequence, batch 1, on NVIDIA H100" in out
    assert "attention.decode" in out


@pytest.mark.parametrize("form", ["folder", "file", "option", "other name"])
def test_forms_of_the_path(form: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "config.json"
    if form == "other name":
        file = file.rename(folder / "small.json")
    given = {"folder": [folder], "file": [file]}.get(form, ["--config", file])
    assert main(["inspect", *map(str, given), *SMALL, "--graph", "decode"]) == 0
    out = capsys.readouterr().out
    assert "== decode: llama" in out
    assert "prefill" not in out


def test_json_holds_both_graphs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), *SMALL, "--json", "--batch", "3"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["schema"], data["model_type"]) == (1, "llama")
    assert data["parameters"] == sum(p.numel() for p in tiny("llama").parameters())
    for name, queries in (("prefill", 8), ("decode", 1)):
        assert data[name]["schema"] == 1
        assert data[name]["counts"]["attention"] == 2
        (graph,) = data[name]["graphs"]
        assert (graph["prediction"]["batch"], graph["prediction"]["queries"]) == (3, queries)
        assert [entry["tokens"] for entry in graph["prediction"]["at"]] == [64, 1024]
        assert [layer["cache"] for layer in graph["layers"]] == ["static", "static"]
        assert all(layer["mask"].startswith("kv <= ") for layer in graph["layers"])


def test_options_reach_the_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--topk", "40", "--share", "2", "--graph", "decode")
    assert main(["inspect", str(folder), *SMALL, *asked]) == 0
    out = capsys.readouterr().out
    assert "40 tokens that layer 0 looked at most" in out
    assert "break-even: selected tokens are faster" in out


def test_a_page_has_both_graphs_and_comes_before_the_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pages" / "report.html"
    assert main(["inspect", "--config", str(folder), *SMALL, "--html", str(path)]) == 0
    assert "== decode: llama" in capsys.readouterr().out
    text = path.read_text(encoding="utf-8")
    assert text.index('<h2 class="first">decode') < text.index('<h2 class="first">prefill')
    assert "clsa: llama" in text
    assert "def attention_decode(" in text
    assert list(path.parent.iterdir()) == [path]


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clsa_compile.__main__.inspect_configuration", None)  # is not called
    path = folder / "config.json" / "report.html"
    err = refused(capsys, folder, *SMALL, "--graph", "decode", "--html", path)
    assert f"--html: nothing can be written to '{path}': [Errno 20] Not a directory" in err


def test_eager_attention_can_be_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), *SMALL, "--attention", "eager", "--graph", "decode", "--json"]) == 0
    (graph,) = json.loads(capsys.readouterr().out)["decode"]["graphs"]
    assert {site["family"] for site in graph["sites"]} == {"eager"}


def test_a_missing_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = refused(capsys, tmp_path / "nothing" / "config.json")
    assert "cannot make a model from" in err
    assert "No such file" in err


def test_a_folder_without_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused(capsys, tmp_path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "it is not JSON"),
        ("[]", "it holds no object"),
        ("{}", "it names no model_type"),
        ('{"model_type": "abacus"}', "this transformers has no model type 'abacus'"),
        ('{"model_type": ["llama"]}', "it names no model_type"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "cannot make a model from"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "cannot make a model from"),
        ('{"model_type": "clip"}', "cannot make a model from"),
    ],
)
def test_configurations_that_cannot_be(
    text: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    err = refused(capsys, file)
    assert why in err
    assert str(file) in err


def test_a_configuration_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "cannot make a model from" in refused(capsys, tmp_path)


def test_a_model_that_cannot_be_traced(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def untraceable(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a device that nobody has\nand more lines")

    monkeypatch.setattr(clsa_compile.configurations, "inspect", untraceable)
    err = refused(capsys, folder, *SMALL)
    assert "the prefill of this llama cannot be traced: a device that nobody has" in err
    assert "more lines" not in err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "a.json"), "[Errno 28] No space left on device: 'a.json'"),
        (OSError("cannot be read\nand more lines"), "cannot be read"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_errors_of_the_machine_are_one_line(
    error: OSError,
    line: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("clsa_compile.__main__.inspect_configuration", failing)
    assert refused(capsys, folder, *SMALL) == f"clsa: {line}\n"


def test_without_transformers(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "needs transformers: pip install clsa[hf]" in refused(capsys, folder)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--prompt", "0"), "prompt is 0; give a number of at least 1"),
        (("--batch", "-1"), "batch is -1"),
        (("--cache", "0"), "cache is 0"),
        (("--cache", "64", "--prompt", "65"), "a prompt of 65 tokens does not fit into a cache of 64"),
        (("--device", "abacus"), "no device is called 'abacus'; known are h100"),
        (("--topk", "0"), "topk"),
        (("--share", "maybe"), "share"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: tuple[str, ...], why: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert why in refused(capsys, folder, *arguments)


@pytest.mark.parametrize("arguments", [(), ("--at", "many"), ("--at", "0"), ("a", "--config", "b")])
def test_usage_errors_have_their_exit_code(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["inspect", *arguments])
    assert exit_code.value.code == 2
    assert "usage: clsa inspect" in capsys.readouterr().err
