"""Deselects the tests this machine cannot run, and the long ones unless they are asked for."""

from collections.abc import Iterable

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def unwanted_markers(*, has_gpu: bool, slow: bool) -> frozenset[str]:
    """Names the markers whose tests are left out."""
    wanted = {"gpu": has_gpu, "slow": slow}
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
    unwanted = unwanted_markers(has_gpu=torch.cuda.is_available(), slow=config.getoption("--slow"))
    kept, left_out = split(items, unwanted)
    if left_out:
        # Deselected, not skipped: a skip is a promise to look at it, and this needs no look.
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
