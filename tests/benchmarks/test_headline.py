"""The headline benchmark: its decoders equal the example's, its figures follow from its cells, it goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import decoders
import headline
import headline_report
import pytest
import torch
from decoders import VARIANTS, HeadlineDecoder, attention_bytes, cache_formula
from headline import Bench, Cell
from headline_report import Results
from yoco_decoder import PRESETS, Config, Decoder

CPU = torch.device("cpu")
CONFIG = Config(
    vocabulary=64, layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, head_dim=8, window=6, topk=5,
    index_heads=32, index_dim=8,
)  # fmt: skip
TINY = ["--tiny", "--device", "cpu", "--layers", "2", "--lengths", "256", "--batches", "1", "--repeats", "2"]


# -- decoders ------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prompt", [4, 6, 17])
@pytest.mark.parametrize("attention", ["transformer", "yoco", "yoco-dsa", "yoco-clsa"])
def test_decoders_equal_the_examples(attention: Any, prompt: int) -> None:
    torch.manual_seed(0)
    ours = HeadlineDecoder(replace(CONFIG, attention=attention)).eval()
    plain = Decoder(ours.config).eval()
    plain.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 64, (2, prompt + 4))
    # The Transformer's step reads the whole cache, so it is right at the last slot alone.
    ends = [prompt, prompt + 1] if attention == "transformer" else [prompt, *range(prompt + 1, prompt + 5)]
    caches = [model.new_cache(2, ends[-1]) for model in (ours, plain)]
    start = 0
    for end in ends:
        at = torch.arange(start, end)
        found, expected = (m(ids[:, start:end], at, c, 1) for m, c in zip((ours, plain), caches, strict=True))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        start = end


@pytest.mark.parametrize("attention", ["transformer", "yoco", "yoco-dsa", "yoco-clsa"])
@pytest.mark.parametrize("length", [4, 40])
def test_caches_are_as_large_as_the_formula_says(attention: Any, length: int) -> None:
    model = HeadlineDecoder(replace(CONFIG, attention=attention))
    cache = model.new_cache(3, length)
    assert headline.sum_bytes(cache) == cache_formula(model.config, 3, length, 4)


def test_a_cache_of_the_papers_shape_shrinks_by_the_papers_factor() -> None:
    """L N against N + L/2 W rows, and one row of index keys."""
    dense, shared = (
        cache_formula(replace(PRESETS["4b"], attention=a), 1, 131072, 2) for a in ("transformer", "yoco-clsa")
    )
    assert dense == 131072 * 64 * 1024
    assert shared == 131072 * 2048 + 16 * 512 * 2048 + 131072 * 256
    assert dense / shared == pytest.approx(26.9, abs=0.1)


def test_bytes_that_a_step_must_read() -> None:
    """By hand, for 40 tokens of 4 layers: rows of 2 * 2 * 8 floats, index keys of 8."""
    read = {
        n: attention_bytes(v, replace(CONFIG, attention=v.attention), 1, 40, 4) for n, v in VARIANTS.items()
    }
    row, key = 32 * 4, 8 * 4
    assert read["transformer"] == 4 * 40 * row
    assert read["yoco"] == (2 * 6 + 2 * 40) * row
    assert read["indexer per layer"] == (2 * 6 + 2 * 5) * row + 2 * 40 * key
    assert read["shared every 4"] == read["clsa"] == (2 * 6 + 2 * 5) * row + 40 * key


@torch.no_grad()
@pytest.mark.parametrize("attention", ["transformer", "yoco-dsa", "yoco-clsa"])
def test_without_attention_nothing_reads_the_cache(attention: Any) -> None:
    model = HeadlineDecoder(replace(CONFIG, attention=attention)).eval()
    cache = model.new_cache(1, 10)
    ids, at = torch.zeros(1, 1, dtype=torch.long), torch.tensor([9])
    with decoders.without_attention():
        before = model(ids, at, cache, 1)
        decoders.fill(cache)
        assert torch.equal(model(ids, at, cache, 1), before)
    assert not torch.allclose(model(ids, at, cache, 1), before), "attention is back"


# -- measuring -----------------------------------------------------------------------------------


def test_a_time_is_computed_from_two_numbers_of_layers() -> None:
    bench = Bench(replace(CONFIG, layers=32), CPU, 1, quick=True)

    def run(config: Config) -> dict[str, Any]:
        depth = config.layers
        return {"ms": 1 + 0.5 * depth, "wall_ms": 2.0 * depth, "layers": depth, "spread": 0.1 / depth}

    found = headline.by_layers(bench, VARIANTS["clsa"], 1, 64, run)
    assert found["ms"] == pytest.approx(17.0)
    assert found["wall_ms"] == pytest.approx(64.0)
    assert found["spread"] == pytest.approx(0.025), "the larger of both"
    assert found["computed_from"] == [4, 8]
    assert found["fits"]
    assert headline.by_layers(replace(bench, quick=False), VARIANTS["clsa"], 1, 64, run)["layers"] == 32


def test_what_does_not_fit_is_computed_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Config) -> dict[str, Any]:
        return {"ms": 1.0, "wall_ms": 1.0, "layers": config.layers, "spread": 0.0}

    bench = Bench(replace(CONFIG, layers=32), CPU, 1, quick=False)
    monkeypatch.setattr(Bench, "fits", lambda self, config, batch, length: config.layers <= 8)
    assert headline.by_layers(bench, VARIANTS["yoco"], 1, 64, run)["fits"] is False
    monkeypatch.setattr(Bench, "fits", lambda self, config, batch, length: False)
    assert headline.by_layers(bench, VARIANTS["yoco"], 1, 64, run) == {"error": "8 layers do not fit"}


def made_up(cell: Cell) -> dict[str, Any]:
    if cell.kind == "check":
        return {"difference": 0.0, "budget": 1.0, "layers": 2, "passed": True}
    place = list(VARIANTS).index(cell.variant)
    ms = {
        "prefill": 1e-3 * cell.length,
        "rest": 0.5,
        "decode": 1 + cell.length * cell.batch / 1000 / (1 + place),
    }
    common = {"wall_ms": 1.0, "compile_s": 1.0, "layers": 2, "computed_from": None, "peak_bytes": 2**30}
    return {"ms": ms[cell.kind], "cache_bytes": 2**20, "cache_formula": 2**20, **common}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells that were measured; measuring takes no time."""
    seen: list[Cell] = []

    def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
        seen.append(cell)
        return made_up(cell)

    monkeypatch.setattr(headline, "run_cell", run_cell)
    monkeypatch.setattr(headline, "read_bandwidth", lambda device: 1e12)
    return seen


def test_every_cell_is_measured_once_and_saved_at_once(
    measured: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--tiny", "--device", "cpu", "--out", str(tmp_path / "sub/h")]
    good = headline.run_cell

    def mortal(bench: Bench, cell: Cell) -> dict[str, Any]:
        if len(measured) == 7:
            raise KeyboardInterrupt
        return good(bench, cell)

    with monkeypatch.context() as patch:
        patch.setattr(headline, "run_cell", mortal)
        with pytest.raises(KeyboardInterrupt):
            headline.main(out)
    assert len(json.loads((tmp_path / "sub/h.json").read_text())["cells"]) == 7
    assert headline.main(out) == 0
    # 4 checks, 5 prompts and 2 batches of 5 steps at two lengths, and 5 steps without attention a batch.
    assert len(measured) == len({cell.key for cell in measured}) == 4 + 2 * 5 + 2 * 2 * 5 + 2 * 5
    assert headline.main([*out, "--report"]) == 0
    text = (tmp_path / "sub/h.md").read_text()
    assert text.count("| clsa |") == 4
    assert "44 of 44 cells are measured" in text
    assert "compiled against eager: equal" in text
    for name in ("h_decode.png", "h_end_to_end.png"):
        assert (tmp_path / "sub" / name).stat().st_size > 10_000


def test_only_and_minutes_leave_cells_for_later(measured: list[Cell], tmp_path: Path) -> None:
    out = ["--tiny", "--device", "cpu", "--out", str(tmp_path / "h")]
    assert headline.main([*out, "--only", "prefill/512", "decode/256/2"]) == 0
    assert {(c.kind, c.length) for c in measured} == {("prefill", 512), ("decode", 256)}
    assert headline.main([*out, "--minutes", "-1"]) == 2
    assert len(measured) == 10
    assert headline.main([*out, "--only", "prefill/512", "--again"]) == 0
    assert len(measured) == 15
    text = (tmp_path / "h.md").read_text()
    assert "10 of 44 cells are measured" in text
    assert "![tokens a second: h decode](h_decode.png)" in text


@pytest.mark.slow
def test_processes_measure_what_one_does(tmp_path: Path) -> None:
    """In a process of its own: the ones that it starts find its modules again."""
    given = [*TINY, "--out", str(tmp_path / "h"), "--jobs", "2"]
    chosen = ["--only", "check", "prefill", "--variants", "yoco"]
    subprocess.run([sys.executable, headline.__file__, *given, *chosen], check=True, capture_output=True)
    cells = json.loads((tmp_path / "h.json").read_text())["cells"]
    assert {key.partition("/")[0] for key in cells} == {"check", "prefill"}
    assert all(found.get("passed", found.get("ms")) for found in cells.values())


def test_memory_that_several_lacked_is_asked_for_again_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell("decode", "clsa", 64, batch) for batch in (1, 2)]
    lacking = {"error": "out of memory: 9 GiB"}
    monkeypatch.setattr(
        headline,
        "beside",
        lambda work, *_, **__: ((c, (lacking if c.batch == 2 else made_up(c), 1.0)) for c in work),
    )
    monkeypatch.setattr(headline, "run_cell", lambda bench, cell: made_up(cell))
    bench = Bench(replace(CONFIG, layers=32), CPU, 1, quick=False)
    found = list(headline.measured(cells, bench, 2, lambda: True))
    assert [(cell.batch, "error" in cells_found) for cell, cells_found, _ in found] == [
        (1, False),
        (2, False),
    ]


def test_memory_is_that_of_the_layers_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(replace(CONFIG, layers=32), CPU, 1, quick=False)
    whole = headline.memory(bench, Cell("decode", "transformer", 2**20, 8))
    assert whole > 32 * 2**20 * 8 * 2 * 2 * 8 * 4, "the cache of 32 layers"
    monkeypatch.setattr(Bench, "fits", lambda self, config, batch, length: False)
    assert headline.memory(bench, Cell("decode", "transformer", 2**20, 8)) < whole / 3


def test_without_matplotlib_there_is_a_table(
    measured: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = ["--tiny", "--device", "cpu", "--out", str(tmp_path / "h"), "--only", "decode/256/2"]
    assert headline.main(out) == 0
    assert "no pictures: pip install matplotlib" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.json", "h.md"]


def test_a_decoder_that_departs_from_eager_fails_the_run(
    measured: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headline, "run_cell", lambda bench, cell: made_up(cell) | {"passed": False})
    out = ["--tiny", "--device", "cpu", "--out", str(tmp_path / "h"), "--only", "check"]
    assert headline.main(out) == 1
    assert "**DIFFERENT**" in (tmp_path / "h.md").read_text()


def test_cells_of_another_machine_or_shape_are_refused(measured: list[Cell], tmp_path: Path) -> None:
    out = ["--tiny", "--device", "cpu", "--out", str(tmp_path / "h"), "--only", "check"]
    assert headline.main(out) == 0
    with pytest.raises(SystemExit, match="cells of another config"):
        headline.main([*out, "--layers", "2"])


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def prefill(*_: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 80 GiB.")

    monkeypatch.setattr(headline, "prefill", prefill)
    found = headline.run_cell(Bench(CONFIG, CPU, 1, False), Cell("prefill", "yoco", 64))
    assert found == {"error": "out of memory: CUDA out of memory. Tried to allocate 9 GiB"}


# -- figures -------------------------------------------------------------------------------------


def results(**milliseconds: float) -> Results:
    cells = {key.replace("_", "/"): {"ms": ms} for key, ms in milliseconds.items()}
    return Results({}, [], cells)


def test_end_to_end_is_a_prompt_and_the_steps_after_it() -> None:
    found = results(prefill_1000_1_yoco=500.0, decode_1000_2_yoco=2.0, decode_2000_2_yoco=4.0)
    # Steps grow from 2 to 4 ms, 3 in the mean; two prompts, one after the other.
    expected = 1e3 * 2 * 1000 / (2 * 500 + 1000 * 3)
    assert headline_report.end_to_end(found, 1000, 2, "yoco", 1000) == pytest.approx(expected)
    assert headline_report.end_to_end(found, 1000, 1, "yoco", 1000) is None
    assert headline_report.end_to_end(found, 2000, 2, "yoco", 1000) is None, "no prompt of 2000 was measured"


def test_steps_are_interpolated_and_extrapolated() -> None:
    points = [(10, 1.0), (20, 2.0), (40, 6.0)]
    assert [headline_report.step_at(points, at) for at in (10, 15, 30, 50)] == [1.0, 1.5, 4.0, 8.0]
    assert headline_report.step_at(points[:1], 99) == 1.0


@pytest.fixture
def rows_of_two() -> list[headline_report.Row]:
    """CLSA at batches 8 and 16, the Transformer at 8; a prompt 10 times as fast, a step 8 times."""
    figures = [("transformer", 8, 1e3, 80.0, (50.0, 60.0)), ("clsa", 8, 1e4, 10.0, (450.0, 510.0))]
    figures += [("clsa", 16, 1e4, 10.0, (500.0, 900.0))]
    cell = {"computed_from": None, "cache_bytes": 2**36}
    return [
        headline_report.Row(131072, batch, name, prefill, step, None, None, ends, cell)
        for name, batch, prefill, step, ends in figures
    ]


def test_the_ratio_end_to_end_is_told_beside_the_papers(rows_of_two: list[headline_report.Row]) -> None:
    first, second, _ = headline_report.beside_paper(rows_of_two)
    assert "a prompt of CLSA is 10.0x as fast as the Transformer's, a step of 8 sequences" in first
    assert "8.0x, and so end to end 9.00x with 1024 generated and 8.50x with 8192 generated" in first
    assert "prompts are 20.4x as fast, steps 7.6x, end to end 17.1x" in first
    assert "10.00x with 1024 generated and 15.00x with 8192" in second
    assert "With 16 sequences of CLSA to 8 of the Transformer, whose cache then takes 64 GiB" in second


def test_what_is_told_beside_the_paper_compares_steps_that_were_measured_whole(
    rows_of_two: list[headline_report.Row],
) -> None:
    base = rows_of_two[0]
    computed = replace(base, batch=16, cell=base.cell | {"computed_from": [4, 8]})
    first, second, _ = headline_report.beside_paper([*rows_of_two, computed])
    assert "a step of 8 sequences, the most at which both were measured" in first
    assert "With 16 sequences of CLSA to 8 of the Transformer" in second


def test_times_that_did_not_agree_are_named_and_those_measured_once_counted() -> None:
    found = Results({}, [], {
        "decode/8192/1/clsa": {"ms": 1.0, "spread": 0.2},
        "decode/8192/1/yoco": {"ms": 1.0, "spread": 0.01},
        "decode/8192/4/yoco": {"ms": 1.0},
        "check/8192/4/yoco": {"passed": True},
    })  # fmt: skip
    once, apart = headline_report.unsettled(found)
    assert once == "- 1 cells were timed once, in a call that did not repeat times: decode/8192/4/yoco"
    assert apart == "- decode/8192/1/clsa: the two shortest of its times differ by 20.0%"


@pytest.mark.parametrize("missing", ["transformer", "clsa"])
def test_nothing_is_told_beside_the_paper_where_a_decoder_is_missing(
    rows_of_two: list[headline_report.Row], missing: str
) -> None:
    assert not [*headline_report.beside_paper([r for r in rows_of_two if r.variant != missing])]


def test_cells_that_are_missing_are_gaps_in_the_pictures(rows_of_two: list[headline_report.Row]) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    full, empty = figure.subplots(1, 2)
    for axis, length in ((full, 131072), (empty, 8192)):
        headline_report.panel(axis, rows_of_two, length, [4, 8, 12, 16], lambda r: r.rate)
    drawn = {line.get_label(): list(line.get_ydata()) for line in full.lines}
    assert drawn["clsa: 2 of 4"] == pytest.approx([float("nan"), 800, float("nan"), 1600], nan_ok=True)
    assert set(drawn) >= {"transformer: 1 of 4", "yoco: 0 of 4"}
    assert [label.get_text() for label in full.get_xticklabels()] == ["4", "8", "12", "16"]
    assert [text.get_text() for text in empty.texts] == ["not measured"]
    assert not empty.lines


def test_pictures_have_room_for_cells_that_nobody_measured() -> None:
    found = results(decode_1000_12_yoco=2.0)
    planned = ["decode/8192/1/clsa", "decode/1000/4/yoco", "prefill/9/1/yoco"]
    assert headline_report.places(found, planned) == {1000: [4, 12], 8192: [1]}


# -- the real thing ------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_trial_run_measures_everything(tmp_path: Path) -> None:
    assert headline.main([*TINY, "--out", str(tmp_path / "h"), "--variants", "transformer", "clsa"]) == 0
    cells = json.loads((tmp_path / "h.json").read_text())["cells"]
    assert len(cells) == 8
    assert not any("error" in cell for cell in cells.values())
    assert all(cell["difference"] < 1e-4 for key, cell in cells.items() if key.startswith("check"))
    decoded = cells["decode/256/1/clsa"]
    assert decoded["cache_bytes"] == decoded["cache_formula"]


@pytest.mark.slow
def test_a_step_is_compiled_and_timed(tmp_path: Path) -> None:
    assert headline.main([*TINY, "--out", str(tmp_path / "h"), "--only", "decode", "--variants", "clsa"]) == 0
    found = json.loads((tmp_path / "h.json").read_text())["cells"]["decode/256/1/clsa"]
    assert found["ms"] > 0
    assert found["layers"] == 2
