"""Findings: operands as elements of what holds them."""

from __future__ import annotations

import pytest
import torch

from clsa_compile.dump.findings import _shared_head, element
from clsa_compile.ir.sites import Operand


@pytest.mark.parametrize(
    ("dims", "text"),
    [
        ((0, 1, 2, 3), "x[b, h, q, c]"),
        ((0, 2, 1, 3), "x[b, q, h, c]"),
        ((0, None, 1, 2), "x[b, q, c]"),
        ((None, None, None, 0), "x[c]"),
    ],
)
def test_an_operand_is_an_element_of_its_root(dims: tuple[int | None, ...], text: str) -> None:
    root = torch.fx.Graph().placeholder("x")
    assert element(Operand(root, dims), ("b", "h", "q", "c")) == text


def test_heads_that_share_keys_are_counted_together() -> None:
    assert _shared_head(8, 8) == "h"
    assert _shared_head(8, 2) == "h // 4"
    assert _shared_head(8, 1) == "0"
