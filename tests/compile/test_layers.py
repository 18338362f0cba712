"""Layers: what each attention is, by formula and by number, and what will run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, StaticCache

import clsa_compile.layers
from clsa_compile import Report, inspect
from clsa_compile.errors import MissingTritonError
from clsa_compile.ir.masks import KV_, Q_, load
from clsa_compile.ir.sites import MaskSpec
from clsa_compile.testing import tiny

IDS = torch.zeros(2, 12, dtype=torch.long)


def step(name: str, cache: str = "static", length: int = 48, **changes: Any) -> Report:
    model = tiny(name, **changes)
    kinds: dict[str, Any] = {
        "static": lambda: StaticCache(config=model.config, max_cache_len=length),
        "dynamic": lambda: DynamicCache(config=model.config),
    }
    held = kinds[cache]()
    with torch.no_grad():
        model(IDS, past_key_values=held)
    return inspect(model, IDS[:, :1], past_key_values=held)


def test_a_dense_layer() -> None:
    first, second = step("llama").layers
    assert (first.ordinal, first.layer, second.layer) == (0, 0, 1)
    assert first.path == "model.layers.0.self_attn"
    assert (first.kind, first.action, first.runs) == ("dense", "attention", "dense, each key read once")
    assert (first.heads, first.kv_heads, first.width, first.value_width) == (4, 2, 16, 16)
    assert (first.batch, first.queries, first.keys, first.dtype) == (2, 1, 48, "float32")
    assert first.scale == pytest.approx(16**-0.5)
    assert (first.softcap, first.sinks, first.window, first.index) == (0.0, False, 0, None)
    assert first.mask.startswith("kv <= ")
    assert first.kernels == ("attention.decode",)
    assert "scaled_dot_product_attention" in first.source
    assert "modeling_llama.py:" in first.caller
    assert "in forward" in first.caller


def test_an_indexer_and_its_group() -> None:
    first, second = step("glm_moe_dsa", indexer_types=["full", "shared"]).layers
    index = first.index
    assert index is not None
    assert (index.score, index.heads, index.width, index.topk) == ("sum: weight*Max(0, dot)", 32, 16, 8)
    assert index.scale == pytest.approx(16**-0.5)
    assert "topk" in index.source
    assert (first.width, first.value_width) == (24, 16)
    assert first.runs == "8 tokens by its own index"
    assert second.runs == "8 tokens by the index of layer 0"
    assert first.group == second.group == "index 0, 1"
    assert first.kernels == ("index_topk.decode", "sparse_attention.gather")
    assert second.kernels == ("sparse_attention.gather",)


def test_dense_layers_that_share() -> None:
    model = tiny("llama", num_hidden_layers=4)
    held = StaticCache(config=model.config, max_cache_len=48)
    with torch.no_grad():
        model(IDS, past_key_values=held)
    options = {"topk": 8, "share": 2, "keep_first": 1, "keep_last": 2}
    layers = inspect(model, IDS[:, :1], past_key_values=held, options=options).layers
    assert [layer.runs for layer in layers] == [
        "dense, each key read once, and chooses tokens",
        "8 tokens that layer 0 looked at most",
        "dense, each key read once, and chooses tokens",
        "8 tokens that layer 2 looked at most",
    ]
    assert layers[0].kernels == ("attention_mass.decode", "select_topk.radix")
    assert layers[1].action == "sparse"


def test_softcap_window_and_the_caches_behind_them() -> None:
    window, whole = step("gemma2", attention="eager").layers
    assert window.softcap == 5.0
    assert (window.keys, whole.keys) == (16, 48)
    assert (window.cache, whole.cache) == ("ring", "static")


def test_a_window_in_a_mask_is_a_number() -> None:
    window, whole = inspect(tiny("gemma2"), IDS.repeat(1, 4)[:, :40], use_cache=False).layers
    assert (window.window, whole.window) == (16, 0)
    assert window.mask != whole.mask


def test_sinks() -> None:
    assert all(layer.sinks for layer in step("gpt_oss", attention="eager").layers)


@pytest.mark.parametrize(("cache", "kind"), [("static", "static"), ("dynamic", "growing")])
def test_kinds_of_caches(cache: str, kind: str) -> None:
    assert [layer.cache for layer in step("llama", cache).layers] == [kind, kind]


def test_no_cache() -> None:
    layers = inspect(tiny("llama"), IDS, use_cache=False).layers
    assert [layer.cache for layer in layers] == ["none", "none"]
    assert [layer.kernels for layer in layers] == [("attention.rows",)] * 2


def test_a_cache_that_rolls_is_a_ring() -> None:
    def model(q: Tensor, new: Tensor, keys: Tensor) -> Tensor:
        rolled = keys.roll(-1, dims=-2)
        rolled[:, :, torch.tensor([-1])] = new
        keys.copy_(rolled)
        return F.scaled_dot_product_attention(q, keys, keys)

    q, keys = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 16, 8)
    (layer,) = inspect(model, q, q, keys).layers
    assert layer.cache == "ring"


def test_layers_that_read_the_same_keys() -> None:
    layers = step("gemma3n_text").layers
    assert layers[1].group == layers[3].group == layers[4].group == "kv 1, 3, 4"
    assert layers[2].group == ""


def refused(x: Tensor) -> tuple[Tensor, Tensor]:
    weights = (x @ x.mT).softmax(-1)
    return weights @ x, weights


@pytest.mark.filterwarnings("ignore:clsa left")
def test_a_layer_that_is_left_has_its_line_and_its_reason() -> None:
    (layer,) = inspect(refused, torch.randn(2, 4, 6, 8)).layers
    assert layer.runs == "left as it was"
    assert layer.reason.startswith("users: ")
    assert layer.source.endswith("in refused: weights = (x @ x.mT).softmax(-1)")
    assert "test_layers.py:" in layer.source
    assert layer.caller == ""
    assert layer.kernels == ()


def test_without_triton_no_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise MissingTritonError

    monkeypatch.setattr(clsa_compile.layers, "kernels", missing)
    assert [layer.kernels for layer in step("llama").layers] == [(), ()]


@pytest.mark.parametrize(
    ("predicate", "window"),
    [
        (sympy.And(KV_ <= Q_, KV_ > Q_ - 16), 16),
        (sympy.And(KV_ <= Q_ + 5, KV_ >= Q_), 6),
        (sympy.And(KV_ <= Q_, KV_ > Q_ - 16, sympy.Eq(load(0)(Q_), load(0)(KV_))), 16),
        (KV_ <= Q_, None),
        (sympy.And(KV_ <= Q_, KV_ >= 3), None),
        (sympy.Or(KV_ < 3, KV_ > 7), None),
        (sympy.true, None),
    ],
)
def test_windows_of_masks(predicate: Any, window: int | None) -> None:
    site = SimpleNamespace(mask=MaskSpec(predicate))
    assert clsa_compile.layers.window_of(site) == window  # type: ignore[arg-type]
