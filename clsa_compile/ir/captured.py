"""Captured: a graph in the dialect that passes read (pre-dispatch ATen), and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(slots=True)
class Captured:
    """A graph module whose nodes carry `meta["val"]`, with the fake mode that made those values."""

    module: torch.fx.GraphModule
    fake_mode: FakeTensorMode
    origin: Literal["dynamo", "export"]

    @property
    def graph(self) -> torch.fx.Graph:
        """The FX graph."""
        return self.module.graph
