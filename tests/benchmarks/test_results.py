"""What benchmarks found is written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from results import write_text


def test_a_text_takes_the_place_of_the_last_one_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a/b/found.json"
    for text in ("1\n", "2\n"):
        write_text(path, text)
        assert path.read_text() == text
    assert [*path.parent.iterdir()] == [path]


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.json"
    write_text(path, "before")
    whole = Path.write_text

    def half(self: Path, text: str, **more: Any) -> int:
        whole(self, text[:2], **more)
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left on device"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]
