"""A decoder that caches once, in plain PyTorch: a self-decoder, then a cross-decoder over one shared K and V.

The first half of the layers attends to a window (RoPE); keys and values are projected once from what it
hands on, the memory H, and the second half attends to them globally and without positions (YOCO,
arXiv 2405.05254). `Config.attention` chooses what the cross-decoder reads:

    transformer   no cross-decoder: every layer attends to everything with keys and values of its own
    yoco          all tokens
    yoco-dsa      the tokens that an indexer in each cross layer selects (arXiv 2512.02556)
    yoco-clsa     the tokens that one indexer selects for all layers and heads (arXiv 2606.06467):
                  I = (H W_Q) (H W_K)^T, S_t = TopK(I_t, k)

The last one is written without a thought of speed: every layer calls the indexer, and every call writes the
same index keys into the same cache. Nothing says what may be shared, hoisted, or skipped in a prompt.

    python examples/yoco_decoder.py --attention yoco-clsa --prompt 512 --tokens 32
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Literal["transformer", "yoco", "yoco-dsa", "yoco-clsa"]


@dataclass(frozen=True)
class Config:
    """Sizes of a decoder. `window` is what a self-decoder's token sees, `topk` what a cross layer reads."""

    attention: Attention = "yoco-clsa"
    vocabulary: int = 32000
    layers: int = 32
    hidden: int = 2560
    ffn: int = 7680
    heads: int = 20
    kv_heads: int = 4
    head_dim: int = 128
    window: int = 512
    topk: int = 2048
    index_heads: int = 16  # of yoco-dsa; yoco-clsa has one
    index_dim: int = 128
    eps: float = 1e-6

    @property
    def self_layers(self) -> int:
        """How many layers keep keys and values of their own."""
        return self.layers if self.attention == "transformer" else self.layers // 2


PRESETS = {
    "4b": Config(),  # the paper's shape
    "small": Config(
        vocabulary=512, layers=8, hidden=256, ffn=768, heads=8, kv_heads=2, head_dim=32, window=64,
        topk=64, index_heads=4, index_dim=32,
    ),
}  # fmt: skip


# -- caches: tensors whose second last dimension is tokens ---------------------------------------


class StaticStore(nn.Module):
    """A buffer for all tokens there will ever be; a token is written at its position."""

    data: Tensor

    def __init__(self, *shape: int, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("data", like.new_zeros(shape), persistent=False)

    def write(self, new: Tensor, positions: Tensor) -> Tensor:
        """Writes the tokens at `positions` [S]; returns all slots."""
        self.data.index_copy_(-2, positions, new)
        return self.data


class GrowingStore:
    """The tokens so far, and behind them those of this forward. Writing them again changes nothing."""

    def __init__(self) -> None:
        self.past: Tensor | None = None
        self.data: Tensor | None = None

    def write(self, new: Tensor, positions: Tensor) -> Tensor:
        """Appends this forward's tokens; returns all tokens."""
        self.data = new if self.past is None else torch.cat((self.past, new), dim=-2)
        return self.data


Store = StaticStore | GrowingStore


class Cache:
    """All stores of a model: `length` slots for each sequence, or growing ones without it."""

    def __init__(self, config: Config, batch: int, length: int | None, like: Tensor) -> None:
        def store(*sizes: int) -> Store:
            shape = (batch, *sizes[:-1], length or 0, sizes[-1])
            return StaticStore(*shape, like=like) if length else GrowingStore()

        def pair() -> tuple[Store, Store]:
            sizes = config.kv_heads, config.head_dim
            return store(*sizes), store(*sizes)

        cross = config.layers - config.self_layers
        indexers = {"yoco-dsa": cross, "yoco-clsa": 1}.get(config.attention, 0)
        self.length = length
        self.own = [pair() for _ in range(config.self_layers)]
        self.shared = pair()
        self.index = [store(config.index_dim) for _ in range(indexers)]
        self.stores = [store for both in (*self.own, self.shared) for store in both] + self.index
        self.seen = 0

    def advance(self, tokens: int) -> None:
        """Ends a forward over so many tokens."""
        self.seen += tokens
        for store in self.stores:
            if isinstance(store, GrowingStore):
                store.past = store.data


# -- layers --------------------------------------------------------------------------------------

linear = partial(nn.Linear, bias=False)


@dataclass
class Step:
    """What layers have in common. rope: two of [S, head_dim]; local, causal [S, T]: who may read whom."""

    positions: Tensor
    rope: tuple[Tensor, Tensor]
    local: Tensor
    causal: Tensor
    cache: Cache


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Turns [B, S, heads * D] into [B, heads, S, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates [B, H, S, D] by positions; the two halves of D are the two coordinates."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]


class SelfAttention(nn.Module):
    """Attention with keys and values of its own, RoPE and normalised queries and keys."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.query = linear(config.hidden, config.heads * config.head_dim)
        self.key = linear(config.hidden, config.kv_heads * config.head_dim)
        self.value = linear(config.hidden, config.kv_heads * config.head_dim)
        self.out = linear(config.heads * config.head_dim, config.hidden)
        self.query_norm = nn.RMSNorm(config.head_dim, config.eps)
        self.key_norm = nn.RMSNorm(config.head_dim, config.eps)

    def forward(self, x: Tensor, memory: None, step: Step) -> Tensor:
        """Attends from x [B, S, hidden] to the tokens of the layer's window."""
        config = self.config
        q = rotate(self.query_norm(split_heads(self.query(x), config.heads)), step.rope)
        k = rotate(self.key_norm(split_heads(self.key(x), config.kv_heads)), step.rope)
        v = split_heads(self.value(x), config.kv_heads)
        keys, values = step.cache.own[self.layer]
        k, v = keys.write(k, step.positions), values.write(v, step.positions)
        mask = step.causal if config.attention == "transformer" else step.local
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(-2))


@dataclass
class Memory:
    """What the self-decoder hands on: H [B, S, hidden], and the keys and values [B, Hkv, T, D] made of it."""

    hidden: Tensor
    k: Tensor
    v: Tensor


def select(scores: Tensor, allowed: Tensor, topk: int) -> Tensor:
    """Returns who may read whom [B, S, T]: the best-scoring allowed tokens of each row."""
    chosen = scores.masked_fill(~allowed, -torch.inf).topk(min(topk, scores.shape[-1]), dim=-1).indices
    return allowed & torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


class Indexer(nn.Module):
    """The single-head indexer: both sides read H, and a score is a plain dot product."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.topk = config.topk
        self.query = linear(config.hidden, config.index_dim)
        self.key = linear(config.hidden, config.index_dim)

    def forward(self, x: Tensor, memory: Memory, store: Store, step: Step) -> Tensor:
        """Returns the tokens [B, S, T] that each row attends to."""
        q = self.query(memory.hidden)
        k = store.write(self.key(memory.hidden), step.positions)
        return select(q @ k.transpose(-1, -2), step.causal, self.topk)


class LightningIndexer(nn.Module):
    """A layer's own indexer: several heads, weighted by the token that asks."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.topk, self.heads, self.width = config.topk, config.index_heads, config.index_dim
        self.query = linear(config.hidden, config.index_heads * config.index_dim)
        self.key = linear(config.hidden, config.index_dim)
        self.weight = linear(config.hidden, config.index_heads)

    def forward(self, x: Tensor, memory: Memory, store: Store, step: Step) -> Tensor:
        """Returns the tokens [B, S, T] that each row attends to."""
        q = self.query(x).unflatten(-1, (self.heads, -1))
        k = store.write(self.key(memory.hidden), step.positions)
        points = F.relu(torch.matmul(q, k.transpose(-1, -2).unsqueeze(1)) * self.width**-0.5)
        weight = self.weight(x) * self.heads**-0.5
        scores = torch.matmul(weight.unsqueeze(-2), points).squeeze(-2)
        return select(scores, step.causal, self.topk)


class CrossAttention(nn.Module):
    """Attention with queries of its own over the shared keys and values, without positions."""

    def __init__(self, config: Config, layer: int, indexer: nn.Module | None) -> None:
        super().__init__()
        self.config, self.layer, self.indexer = config, layer, indexer
        self.query = linear(config.hidden, config.heads * config.head_dim)
        self.out = linear(config.heads * config.head_dim, config.hidden)

    def forward(self, x: Tensor, memory: Memory, step: Step) -> Tensor:
        """Attends from x [B, S, hidden] to the memory."""
        q = split_heads(self.query(x), self.config.heads)
        mask = step.causal
        if self.indexer is not None:
            store = step.cache.index[self.layer if len(step.cache.index) > 1 else 0]
            mask = self.indexer(x, memory, store, step).unsqueeze(1)
        out = F.scaled_dot_product_attention(q, memory.k, memory.v, attn_mask=mask, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """The feed-forward half of a layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = linear(config.hidden, config.ffn)
        self.up = linear(config.hidden, config.ffn)
        self.down = linear(config.ffn, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Maps each row by itself."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and a feed-forward network, each behind a norm and added to what came in."""

    def __init__(self, config: Config, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = attention, SwiGLU(config)
        self.attention_norm = nn.RMSNorm(config.hidden, config.eps)
        self.mlp_norm = nn.RMSNorm(config.hidden, config.eps)

    def forward(self, x: Tensor, memory: Memory | None, step: Step) -> Tensor:
        """Maps [B, S, hidden] to [B, S, hidden]."""
        x = x + self.attention(self.attention_norm(x), memory, step)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """The whole model, from tokens to logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.memory_norm = nn.RMSNorm(config.hidden, config.eps)
        self.key = linear(config.hidden, config.kv_heads * config.head_dim)
        self.value = linear(config.hidden, config.kv_heads * config.head_dim)
        shared = Indexer(config) if config.attention == "yoco-clsa" else None
        own = config.attention == "yoco-dsa"
        parts: list[nn.Module] = [SelfAttention(config, i) for i in range(config.self_layers)]
        cross = range(config.layers - config.self_layers)
        parts += [CrossAttention(config, i, LightningIndexer(config) if own else shared) for i in cross]
        self.layers = nn.ModuleList(Layer(config, part) for part in parts)
        self.norm = nn.RMSNorm(config.hidden, config.eps)
        self.head = linear(config.hidden, config.vocabulary)

    def new_cache(self, batch: int, length: int | None = None) -> Cache:
        """Returns an empty cache: of `length` tokens, or a growing one."""
        return Cache(self.config, batch, length, self.embedding.weight)

    def forward(self, ids: Tensor, positions: Tensor, cache: Cache, logits_to_keep: int = 0) -> Tensor:
        """Returns logits [B, S, vocabulary], or those of the last `logits_to_keep` tokens.

        ids [B, S] are the tokens at `positions` [S]; the cache holds all before them.
        """
        step = self.new_step(positions, cache, cache.length or cache.seen + ids.shape[1])
        x = self.embedding(ids)
        memory = None
        for i, layer in enumerate(self.layers):
            if i == self.config.self_layers:
                memory = self.remember(x, step)
            x = layer(x, memory, step)
        cache.advance(ids.shape[1])
        return self.head(self.norm(x)[:, -logits_to_keep:])

    def new_step(self, positions: Tensor, cache: Cache, keys: int) -> Step:
        """Returns what all layers have in common over tokens at `positions` [S] and `keys` slots."""
        config = self.config
        base = 5e5 if config.attention == "transformer" else 1e4  # for long and for short distances
        half = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
        angles = (positions.float().unsqueeze(-1) * base**-half).repeat(1, 2)
        dtype = self.embedding.weight.dtype
        q, kv = positions.unsqueeze(-1), torch.arange(keys, device=positions.device)
        causal = kv <= q
        local = causal & (kv > q - config.window)
        return Step(positions, (angles.cos().to(dtype), angles.sin().to(dtype)), local, causal, cache)

    def remember(self, x: Tensor, step: Step) -> Memory:
        """Projects the one pair of keys and values that all cross layers read."""
        hidden = self.memory_norm(x)
        keys, values = step.cache.shared
        k = keys.write(split_heads(self.key(hidden), self.config.kv_heads), step.positions)
        v = values.write(split_heads(self.value(hidden), self.config.kv_heads), step.positions)
        return Memory(hidden, k, v)


# -- running it ----------------------------------------------------------------------------------


@torch.no_grad()
def generate(forward: Any, cache: Cache, prompt: Tensor, tokens: int) -> tuple[list[int], list[float]]:
    """Decodes greedily from a prompt [1, S]; returns tokens and the seconds of each forward."""
    ids, positions = prompt, torch.arange(prompt.shape[1], device=prompt.device)
    chosen, seconds = [], []
    for _ in range(tokens):
        begin = time.perf_counter()
        logits = forward(ids, positions, cache, 1)
        ids, positions = logits[:, -1].argmax(-1, keepdim=True), positions[-1:] + 1
        chosen.append(int(ids))  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return chosen, seconds


def compare(model: Decoder, prompt: Tensor, tokens: int, static: bool) -> bool:
    """Generates eagerly and compiled, prints both, and tells whether the tokens are equal."""
    length = prompt.shape[1] + tokens if static else None
    found = {}
    for backend in ("eager", "clsa"):
        forward: Any = model if backend == "eager" else torch.compile(model, backend=backend)
        generate(forward, model.new_cache(1, length), prompt, min(tokens, 4))  # compiles
        found[backend], seconds = generate(forward, model.new_cache(1, length), prompt, tokens)
        step = 1e3 * statistics.median(seconds[1:])
        name = f"{model.config.attention}, {'static' if static else 'growing'} cache, {backend}:"
        print(f"{name:42} prompt {1e3 * seconds[0]:7.1f} ms, then {step:6.2f} ms a token")
    return found["eager"] == found["clsa"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demo; returns 0 when the compiled models gave the eager models' tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", nargs="+", default=["yoco-clsa"], choices=get_args(Attention))
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate (at least 2)")
    parser.add_argument("--growing", action="store_true", help="a growing cache instead of a static one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args(arguments)
    dtype = torch.bfloat16 if chosen.device == "cuda" else torch.float32
    equal = True
    for attention in chosen.attention:
        torch.compiler.reset()
        torch.manual_seed(0)
        config = replace(PRESETS[chosen.preset], attention=attention)
        model = Decoder(config).to(chosen.device, dtype).eval()
        prompt = torch.randint(0, config.vocabulary, (1, chosen.prompt), device=chosen.device)
        same = compare(model, prompt, chosen.tokens, not chosen.growing)
        print("the tokens are equal" if same else "the tokens differ")
        equal &= same
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
