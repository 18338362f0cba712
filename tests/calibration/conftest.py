"""A tiny trained-like model, tokens, and one search, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.calibration.searching import Asked, Found, find
from clsa_compile.testing import tiny

LAYERS, LENGTH = 5, 48
ASKED = Asked(topk=12, anchors=2, keep_first=2, keep_last=3)


@pytest.fixture(scope="session")
def model() -> Any:
    """A small llama whose heads look at few tokens, as trained ones do."""
    made = tiny("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight *= 8
    return made


@pytest.fixture(scope="session")
def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, 120, (2, LENGTH), generator=generator) for _ in range(2)]


@pytest.fixture(scope="session")
def asked() -> Asked:
    return ASKED


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="session")
def found(model: Any, tokens: list[Tensor], folder: Path) -> Found:
    """One search, kept in `folder`."""
    return find(model, tokens, ASKED, folder, progress=False)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
