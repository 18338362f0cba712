"""Quality: the report says what was measured, as text, as plain data and as a picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from clsa_compile.calibration.quality import LayerQuality, Quality, WorstToken
from clsa_compile.errors import OptionError

QUALITY = Quality(
    topk=64,
    schedule="FSS",
    tokens=1000,
    dense_loss=3.0,
    loss=3.0 + math.log(1.02),
    kl=0.0123,
    agreement=0.97,
    layers=(
        LayerQuality("layers.0", "F"),
        LayerQuality("layers.1", "S", 0, 0.91),
        LayerQuality("layers.2", "S", 0, 0.84),
    ),
    worst_token=WorstToken(1, 700, 2.5, 42),
    by_sequence=(0.01, 0.03),
    serves=((1.0, 0.9, 0.8), (math.nan, 1.0, 0.85), (math.nan, math.nan, 1.0)),
)


def test_the_report_names_the_worst() -> None:
    text = str(QUALITY.with_text(" grace"))
    assert "schedule FSS, 64 tokens: perplexity +2.00% (loss 3.0000 -> 3.0198), KL 1.23e-02" in text
    assert "same greedy token 97.00%, over 1000 tokens" in text
    assert "worst layer: layers.2 keeps 84.0%" in text
    assert "worst token: 42 ' grace' at 700 of sequence 1, KL 2.500" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["1", "layers.1", "S", "0", "91.0%"],
        ["2", "layers.2", "S", "0", "84.0%"],
    ]


def test_plain_data_is_json() -> None:
    data = json.loads(json.dumps(QUALITY.to_dict(), allow_nan=False))
    assert data["worst_layer"] == 2
    assert math.isclose(data["perplexity_increase"], 0.02)
    assert data["serves"][1] == [None, 1.0, 0.85]
    assert data["layers"][1] == {"path": "layers.1", "role": "S", "anchor": 0, "recovered": 0.91}
    assert QUALITY.numbers()["least_recovered"] == 0.84


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    QUALITY.heatmap(tmp_path / "who.png")
    assert (tmp_path / "who.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["who.png"]
    with pytest.raises(OptionError, match="no picture can be written"):
        QUALITY.heatmap(tmp_path / "who.png" / "who.png")


def test_without_matplotlib_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(OptionError, match=r"needs matplotlib: pip install clsa\[search\]"):
        QUALITY.heatmap(tmp_path / "who.png")
