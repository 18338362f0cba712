"""What headline.py compares: the decoders of examples/yoco_decoder.py, each in the form that serves it best.

The Transformer's attention is called without a mask, so that torch's flash kernels run: over the prompt
itself, and in a step at the last slot of its cache over the whole cache. Layers that attend to a window keep
a window's slots (a ring), as the formula of a decoder that caches once supposes.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import yoco_decoder
from yoco_decoder import (
    Attention,
    Cache,
    Config,
    Decoder,
    SelfAttention,
    StaticStore,
    Step,
    rotate,
    split_heads,
)


@dataclass(frozen=True)
class Variant:
    """What a decoder's upper half reads, what compiles it, and how.

    depths: two numbers of layers whose times give the time of one; a schedule repeats between them. exact: it
    computes what the eager model computes.
    """

    attention: Attention
    backend: str = "clsa"
    options: dict[str, Any] = field(default_factory=dict)
    depths: tuple[int, int] = (4, 8)
    exact: bool = True


VARIANTS = {
    "transformer": Variant("transformer", backend="inductor"),
    "yoco": Variant("yoco"),
    "indexer per layer": Variant("yoco-dsa"),
    "shared every 4": Variant("yoco-dsa", options={"share": 4}, depths=(8, 16), exact=False),
    "clsa": Variant("yoco-clsa"),
}


class FlashAttention(SelfAttention):
    """Attention over everything: a prompt at the start of the cache, or a step at its last slot."""

    def forward(self, x: Tensor, memory: None, step: Step) -> Tensor:
        """Attends from x [B, S, hidden] without a mask tensor."""
        q = rotate(self.query_norm(split_heads(self.query(x), self.config.heads)), step.rope)
        k = rotate(self.key_norm(split_heads(self.key(x), self.config.kv_heads)), step.rope)
        v = split_heads(self.value(x), self.config.kv_heads)
        keys, values = step.cache.own[self.layer]
        kept = keys.write(k, step.positions), values.write(v, step.positions)
        prompt = x.shape[1] > 1
        k, v = (k, v) if prompt else kept
        attend = yoco_decoder.F.scaled_dot_product_attention  # looked up, for `without_attention`
        out = attend(q, k, v, is_causal=prompt, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(-2))


class WindowStore(StaticStore):
    """The last tokens, each in the slot of its position modulo the window. Prompts start an empty store."""

    def write(self, new: Tensor, positions: Tensor) -> Tensor:
        """Writes the tokens at `positions` [S]; returns a prompt's tokens, or in a step all slots."""
        window = self.data.shape[-2]
        self.data.index_copy_(-2, positions[-window:] % window, new[..., -window:, :])
        return new if new.shape[-2] > 1 else self.data


class HeadlineDecoder(Decoder):
    """The example's decoder over caches no larger than they must be."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.attention == "transformer":
            for i, layer in enumerate(self.layers):
                layer.attention = FlashAttention(config, i)

    def new_cache(self, batch: int, length: int | None = None) -> Cache:
        """Returns an empty cache of `length` tokens, of which layers with a window keep a window."""
        assert length is not None
        if self.config.attention == "transformer":
            cache = super().new_cache(batch, length)
            cache.shared = ()  # nothing reads it
            cache.stores = [store for pair in cache.own for store in pair]
            return cache
        like = self.embedding.weight
        cache = Cache(self.config, batch, min(self.config.window, length), like)
        cache.own = [tuple(ring(store, like) for store in pair) for pair in cache.own]
        cache.shared = tuple(longer(store, length, like) for store in cache.shared)
        cache.index = [longer(store, length, like) for store in cache.index]
        cache.stores = [s for pair in (*cache.own, cache.shared) for s in pair] + cache.index
        cache.length = length
        return cache

    def new_step(self, positions: Tensor, cache: Cache, keys: int) -> Step:
        """Returns what layers have in common; a window sees a prompt's own tokens, or in a step its slots."""
        step = super().new_step(positions, cache, keys)
        if self.config.attention == "transformer":
            return step
        if len(positions) > 1:
            return replace(step, local=super().new_step(positions, cache, len(positions)).local)
        slots = torch.arange(cache.own[0][0].data.shape[-2], device=positions.device)
        return replace(step, local=slots <= positions.unsqueeze(-1))


def ring(store: StaticStore, like: Tensor) -> WindowStore:
    """Returns an empty ring of a store's shape."""
    return WindowStore(*store.data.shape, like=like)


def longer(store: StaticStore, length: int, like: Tensor) -> StaticStore:
    """Returns an empty store of `length` tokens."""
    *outer, _, width = store.data.shape
    return StaticStore(*outer, length, width, like=like)


def build(config: Config, device: torch.device, dtype: torch.dtype) -> HeadlineDecoder:
    """Builds a decoder with random weights, directly on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return HeadlineDecoder(config).eval()
    finally:
        torch.set_default_dtype(before)


def fill(cache: Cache) -> None:
    """Fills a cache with normal random numbers, as if there had been a prompt."""
    generator = torch.Generator(cache.stores[0].data.device).manual_seed(1)
    for store in cache.stores:
        store.data.normal_(generator=generator)


@contextmanager
def without_attention() -> Iterator[None]:
    """Makes attention hand its queries on and indexers select all, in what is traced meanwhile."""
    functional, select = yoco_decoder.F, yoco_decoder.select
    names = {name: getattr(functional, name) for name in ("silu", "relu")}
    yoco_decoder.F = SimpleNamespace(**names, scaled_dot_product_attention=lambda q, k, v, **_: q)
    yoco_decoder.select = lambda scores, allowed, topk: allowed
    try:
        yield
    finally:
        yoco_decoder.F, yoco_decoder.select = functional, select


# -- bytes ---------------------------------------------------------------------------------------


def cache_formula(config: Config, batch: int, length: int, item: int) -> int:
    """Counts the bytes of a cache: L N rows of a Transformer, else N + L/2 W rows and index keys."""
    row = 2 * config.kv_heads * config.head_dim * item
    if config.attention == "transformer":
        return batch * config.layers * length * row
    indexers = {"yoco-dsa": config.layers - config.self_layers, "yoco-clsa": 1}.get(config.attention, 0)
    index = indexers * length * config.index_dim * item
    return batch * ((length + config.self_layers * min(config.window, length)) * row + index)


def attention_bytes(variant: Variant, config: Config, batch: int, length: int, item: int) -> int:
    """Counts the bytes of cache that attention and selection of one decode step must read."""
    row = 2 * config.kv_heads * config.head_dim * item
    if config.attention == "transformer":
        return batch * config.layers * length * row
    cross = config.layers - config.self_layers
    attended = length if config.attention == "yoco" else min(config.topk, length)
    share = variant.options.get("share", 1)
    indexers = {"yoco-dsa": -(-cross // share), "yoco-clsa": 1}.get(config.attention, 0)
    tokens = config.self_layers * min(config.window, length) + cross * attended
    return batch * (tokens * row + indexers * length * config.index_dim * item)


def weight_bytes(model: Decoder) -> int:
    """Counts the bytes of weights that a step reads: all but the table that tokens are looked up in."""
    total = sum(w.numel() * w.element_size() for w in model.parameters())
    return total - model.embedding.weight.numel() * model.embedding.weight.element_size()


def weight_count(config: Config) -> int:
    """Counts a decoder's weights without making them."""
    with torch.device("meta"):
        return sum(w.numel() for w in Decoder(config).parameters())
