"""Programs as the pipeline rewrites them, and what tests that need torch-mlir do without it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from clsa_compile.backend import decided
from clsa_compile.capture import export
from clsa_compile.config import Options
from clsa_compile.passes.early import stop_early
from clsa_compile.passes.rewrite import rewrite

# Example sizes: unlike each other and every size of the models, so that each is seen to vary.
BATCH, LENGTH = 5, 37


@pytest.fixture(autouse=True)
def _torch_mlir(request: pytest.FixtureRequest, without: Callable[[str], Any]) -> None:
    if request.node.get_closest_marker("mlir") is None:
        return
    try:
        import torch_mlir.ir  # noqa: F401
    except ImportError as error:
        without(f"there is no torch-mlir ({error}); pip install torch-mlir, with Python 3.11")


@pytest.fixture
def without(missing: Callable[[str, str], Any]) -> Callable[[str], Any]:
    return partial(missing, "CLSA_MLIR")


class Step(nn.Module):
    """A Hugging Face decoder over caches that are arguments, and that it writes; returns logits."""

    def __init__(self, model: Any, cache: Any) -> None:
        super().__init__()
        self.model, self._cache = model, cache
        self._names = [
            (i, name)
            for i, layer in enumerate(cache.layers)
            for name, value in vars(layer).items()
            if isinstance(value, Tensor)
        ]

    def tensors(self) -> list[Tensor]:
        return [getattr(self._cache.layers[i], name) for i, name in self._names]

    def forward(self, ids: Tensor, positions: Tensor, caches: list[Tensor]) -> Tensor:
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for (i, name), value in zip(self._names, caches, strict=True):
            setattr(cache.layers[i], name, value)
        for layer in cache.layers:
            layer.max_cache_len, layer.batch_size = layer.keys.shape[2], ids.shape[0]
        return self.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits


def exported(
    module: nn.Module, args: Any, options: dict[str, Any], ranges: dict[int, Any]
) -> ExportedProgram:
    """Exports a module and takes its graph through the passes of the backend, up to the rewrite.

    `ranges` says which example sizes vary, as dimensions by size.
    """
    leaves, tree = torch.utils._pytree.tree_flatten(args)
    shapes = [{i: ranges[n] for i, n in enumerate(x.shape) if n in ranges} for x in leaves]
    program = export.trace(module, args, {}, torch.utils._pytree.tree_unflatten(shapes, tree))
    captured = export.capture_program(program)
    decision = decided(captured, Options.read(options))
    rewrite(captured, decision.sites, decision.plan, decision.tensors)
    stop_early(captured)
    made = export.exported(program, captured)
    made._validate()
    return made


@pytest.fixture
def rewritten() -> Callable[..., ExportedProgram]:
    return exported


@pytest.fixture
def varying() -> dict[int, Any]:
    """Batch and cache length, by their example sizes."""
    return {BATCH: Dim("B", min=1, max=64), LENGTH: Dim("T", min=9, max=4096)}


@pytest.fixture
def call() -> Callable[..., tuple[Step, Any]]:
    """A decoder's step after a prompt, and its arguments."""

    def make(model: Any, batch: int = BATCH, length: int = LENGTH, prompt: int = 6) -> tuple[Step, Any]:
        from transformers import StaticCache

        cache = StaticCache(config=model.config, max_cache_len=length)
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(0, model.config.vocab_size, (batch, prompt + 1), generator=generator)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
        step = Step(model, cache)
        return step, (ids[:, -1:], torch.full((batch, 1), prompt), step.tensors())

    return make
