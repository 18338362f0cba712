"""Examples for the property tests of this folder, and small operands of contract ops."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

from clsa_compile.ir.scores import LIGHTNING

# "suite" draws the same examples each time; CLSA_EXAMPLES=search looks further.
settings.register_profile("suite", derandomize=True, max_examples=120, deadline=None, database=None)
settings.register_profile("search", max_examples=3000, deadline=None)
settings.load_profile(os.environ.get("CLSA_EXAMPLES", "suite"))


@pytest.fixture
def operands() -> Any:
    """Returns `operands(op, s, per_kv_head)`, small arguments of a contract op."""

    def made(op: str, s: int = 3, per_kv_head: bool = False) -> tuple[Any, ...]:
        torch.manual_seed(0)
        q, k, v = torch.randn(2, 4, s, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 5)
        mask = torch.rand(2, 1, s, 10) > 0.3
        indices = torch.randint(-1, 10, (2, 1, s, 4), dtype=torch.int32)
        return {
            "attention": (q, k, v, mask, None, [], None, 0.3, 0.0, "kv <= q"),
            "sparse_attention": (q, k, v, indices, mask, None, [], None, 0.3, 0.0, "kv <= q"),
            "index_topk": (
                q, k, torch.randn(2, 4, s), None, mask, None, [], 4, 0.3, LIGHTNING.text, "kv <= q",
                per_kv_head,
            ),
            "attention_mass": (
                q, k, v, torch.rand(3, 4), mask, None, [], None, 0.3, 0.0, "kv <= q", 0.5
            ),
            "select_topk": (torch.rand(2, 3, s, 10), None, 4, 1, 1),
            "mask_bounds": (q, mask, [], 4, 10, "kv <= q"),
        }[op]  # fmt: skip

    return made
