"""Deselects the tests this machine cannot run, and the long ones unless they are asked for; reads pages."""

import gc
import os
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from typing import Any, NoReturn

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--exhaustive", action="store_true", help="also run the tests marked exhaustive")


def unwanted_markers(*, has_gpu: bool, slow: bool, exhaustive: bool) -> frozenset[str]:
    """Names the markers whose tests are left out."""
    wanted = {"gpu": has_gpu, "slow": slow, "exhaustive": exhaustive}
    return frozenset(marker for marker, is_wanted in wanted.items() if not is_wanted)


def split(
    items: Iterable[pytest.Item], unwanted: frozenset[str]
) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Splits `items` into those that stay and those that carry an unwanted marker."""
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        marked = any(item.get_closest_marker(marker) for marker in unwanted)
        (left_out if marked else kept).append(item)
    return kept, left_out


# Last, so that -k and -m have had their say and the counts stay true.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    given = {name: config.getoption(f"--{name}") for name in ("slow", "exhaustive")}
    unwanted = unwanted_markers(has_gpu=torch.cuda.is_available(), **given)
    kept, left_out = split(items, unwanted)
    if left_out:
        # Deselected, not skipped: a skip is a promise to look at it, and this needs no look.
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spares the garbage collector what is there before the first test: modules, half a million objects.

    Compilers make many objects that live, so it would go through all of them again and again, which took a
    sixth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


class Page(HTMLParser):
    """A page as it is read: its tags, its text, and that every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "link"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="session")
def missing() -> Callable[[str, str], NoReturn]:
    """Skips for what is not there; fails where an environment variable, its first argument, is "required"."""

    def stop(setting: str, why: str) -> NoReturn:
        if os.environ.get(setting) == "required":
            pytest.fail(f"{setting} is 'required', and {why}")
        pytest.skip(why)

    return stop


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    """Reads the text of a page."""
    return Page
