"""Files of pages: whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clsa_compile.errors import OptionError
from clsa_compile.html.file import write


def test_a_page_is_written_into_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "page.html"
    write(path, "µ")
    assert path.read_text(encoding="utf-8") == "µ"


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    write(path, "old")

    def full(self: Path, content: str, **_: Any) -> None:
        with self.open("w") as file:
            file.write(content[:1])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OptionError, match=r"no page can be written to '.*page.html': no space left"):
        write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="no page can be written to"):
        write(tmp_path / "file" / "page.html", "")
