"""Layers that read the keys and values of one of them: one index for the group, over the shared keys.

gemma3n of transformers, and a decoder in the form of YOCO (arXiv 2405.05254) written here, each against its
own eager attention.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clsa_compile.config import Options
from clsa_compile.passes.analyze import storages
from clsa_compile.testing import Transcript, generate_steps, largest_difference, tiny

TOPK, FIRST, LAST, TOLERANCE = 8, 2, 3, 1e-4
# More than rounding: what another choice of tokens changes.
VISIBLE = 1e-3
MASS = {"topk": TOPK, "keep_first": FIRST, "keep_last": LAST, "prefill": "sparse"}
CONTRACT = ("attention", "attention_mass", "select_topk", "index_topk", "sparse_attention")


class Following:
    """Dense attention with a schedule: F chooses tokens, S attends to those of the last F, others to all."""

    def __init__(self, schedule: str) -> None:
        self.schedule = schedule

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """q [B, H, S, D], k and v [B, Hkv, T, D], mask boolean [B, 1, S, T]."""
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q @ k.mT * scale).masked_fill(~mask, -math.inf)
        role = self.schedule[layer]
        if role == "S":
            scores = scores.masked_fill(~self.chosen, -math.inf)
        weights = scores.softmax(-1).nan_to_num()
        if role == "F":
            self.chosen = self.choice(weights.mean(1, keepdim=True), mask)
        return weights @ v

    def choice(self, mass: Tensor, mask: Tensor) -> Tensor:
        place, count = mask.cumsum(-1), mask.sum(-1, keepdim=True)
        ends = (place <= FIRST) | (place > count - LAST)
        rank = (mass + 2.0 * ends).masked_fill(~mask, -1.0)
        best = rank.sort(dim=-1, descending=True, stable=True).indices[..., :TOPK]
        return torch.zeros_like(mask).scatter(-1, best, True) & mask


def counted(calls: list[tuple[str, tuple[Any, ...]]]) -> dict[str, int]:
    """Returns how many contract ops of each kind a rewritten graph has, none left out."""
    names = [name for name, _ in calls]
    return {name: names.count(name) for name in (*CONTRACT, *names) if name in names}


def keys_of(calls: list[tuple[str, tuple[Any, ...]]], *names: str) -> set[int]:
    """Returns the storages that contract ops of these names read their keys from."""
    return {s for name, arguments in calls if name in names for s in storages(arguments[1].meta["val"])}


# -- gemma3n ------------------------------------------------------------------------------------------

LAYERS, PROMPT, STEPS, LENGTH = 8, 20, 6, 48
WINDOWS = (0, 2, 4)
FULL = (1, 3, 5, 6, 7)
# The last four layers read keys and values of layer 3, where they are full, and of layer 2.
GROUP = (3, 5, 6, 7)


def gemma() -> nn.Module:
    return tiny(
        "gemma3n_text",
        num_hidden_layers=LAYERS,
        intermediate_size=[128] * LAYERS,
        layer_types=["sliding_attention" if i in WINDOWS else "full_attention" for i in range(LAYERS)],
        num_kv_shared_layers=4,
        activation_sparsity_pattern=[0.0] * LAYERS,
    )


def run(model: Any, config: Any, cache: str) -> Transcript:
    return generate_steps(model, config, cache=cache, steps=STEPS, prompt=PROMPT, padding=3, length=LENGTH)


def by_oracle(model: nn.Module, schedule: str, cache: str) -> Transcript:
    """Runs the model with `Following` in place of attention; `schedule` has a letter a layer of `FULL`."""
    letters = dict(zip(FULL, schedule, strict=True))
    following = Following("".join(letters.get(i, "-") for i in range(LAYERS)))

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        out = following(module.layer_idx, q, k, v, mask, kwargs["scaling"])
        return out.transpose(1, 2), None

    name = "clsa_following"
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    twin: Any = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    twin.eval().set_attn_implementation(name)
    try:
        return run(twin, model.config, cache)
    finally:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]


@pytest.mark.parametrize("cache", [pytest.param("static", marks=pytest.mark.slow), "none"])
def test_a_group_of_gemma3n_reads_one_index_over_its_keys(cache: str, passes: Any) -> None:
    passes.options = Options.read({**MASS, "share": "FFSSS"})
    model = gemma()
    ours = run(torch.compile(model, backend=passes), model.config, cache)
    expected = by_oracle(model, "FFSSS", cache)
    assert largest_difference(expected, ours) < TOLERANCE
    assert largest_difference(run(model, model.config, cache), ours) > VISIBLE
    for plan, calls in zip(passes.plans, passes.calls, strict=True):
        assert plan.schedule == "FFSSS"
        assert {g.members for g in plan.groups if g.kind == "kv"} == {(2, 4), GROUP}
        assert [(g.anchor, g.members) for g in plan.groups if g.kind == "mass"] == [(GROUP[0], GROUP[1:])]
        dense = {"attention": 4, "attention_mass": 1, "select_topk": 1, "sparse_attention": 3}
        assert counted(calls) == dense
        assert len(keys_of(calls, "attention_mass", "sparse_attention")) == 1
        assert not passes.reasons


def test_an_index_over_other_keys_of_gemma3n_is_the_oracles_too(passes: Any) -> None:
    """A schedule that does not follow the groups: layer 1 chooses for layers that read other keys."""
    passes.options = Options.read({**MASS, "share": 4})
    model = gemma()
    ours = run(torch.compile(model, backend=passes), model.config, "none")
    assert largest_difference(by_oracle(model, "FSSSF", "none"), ours) < TOLERANCE
    assert largest_difference(by_oracle(model, "FFSSS", "none"), ours) > VISIBLE
    (plan,) = passes.plans
    assert [(g.anchor, g.members) for g in plan.groups if g.kind == "mass"] == [(1, (3, 5, 6))]


# -- YOCO ---------------------------------------------------------------------------------------------

B, S, KEYS, WIDTH, HEADS, KV_HEADS, WINDOW, CROSS = 2, 18, 24, 32, 4, 2, 5, 4
INDEX_HEADS, INDEX_WIDTH = 32, 8


def turned(x: Tensor, places: Tensor) -> Tensor:
    """Rotary embedding of x [B, S, C], head by head."""
    x = x.unflatten(-1, (-1, WIDTH // HEADS))
    angles = places[:, None, None] * 10.0 ** -torch.arange(0, x.shape[-1], 2).div(x.shape[-1])
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).flatten(
        -2
    )


class Yoco(nn.Module):
    """Two layers with a window, one pair of keys and values made of what they give, and layers that read it.

    indexers: each cross layer chooses its tokens with an indexer over one more shared key; `schedule` says
    which of them run theirs, as in `Following`. Caches are written in place.
    """

    def __init__(self, indexers: bool = False, schedule: str = "F" * CROSS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.indexers, self.schedule = indexers, schedule
        narrow = WIDTH // HEADS * KV_HEADS
        own = {"q": WIDTH, "k": narrow, "v": narrow, "o": WIDTH}
        cross = {"q": WIDTH, "o": WIDTH, "iq": INDEX_HEADS * INDEX_WIDTH, "iw": INDEX_HEADS}
        self.windows = nn.ModuleList(self.linears(own) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.shared = self.linears({"k": narrow, "v": narrow, "ik": INDEX_WIDTH})
        self.cross = nn.ModuleList(self.linears(cross) for _ in range(CROSS))

    @staticmethod
    def linears(widths: dict[str, int]) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(WIDTH, width, bias=False) for name, width in widths.items()})

    def forward(
        self, x: Tensor, kept: Tensor, places: Tensor, past: dict[str, Tensor] | None = None
    ) -> Tensor:
        """x [B, S, WIDTH], kept [B, T] (no padding), places [S] of the rows among the T tokens."""
        keys = torch.arange(kept.shape[1])
        rows = places[:, None]
        causal = (keys <= rows) & kept[:, None, None]
        near = causal & (keys > rows - WINDOW)
        for i, layer in enumerate(self.windows):
            k, v = self.kept(layer, x, places, past, f"{i}.", ("k", "v"))
            x = x + self.attended(layer, x, places, k, v, near)
        k, v, index = self.kept(self.shared, self.norm(x), places, past, "", ("k", "v", "ik"))
        mask = causal
        for i, layer in enumerate(self.cross):
            if self.indexers and self.schedule[i] == "F":
                mask = causal & self.chosen(layer, x, index, causal)
            x = x + self.attended(layer, x, places, k, v, mask, i)
        return x

    def kept(
        self,
        layer: Any,
        x: Tensor,
        places: Tensor,
        past: dict[str, Tensor] | None,
        prefix: str,
        names: tuple[str, ...],
    ) -> list[Tensor]:
        """Returns the layer's keys and values [B, T, C], those of the past included."""
        made = {name: layer[name](x) for name in names}
        made["k"] = turned(made["k"], places)
        if past is not None:
            made = {name: past[prefix + name].index_copy_(1, places, new) for name, new in made.items()}
        return list(made.values())

    def attended(
        self, layer: Any, x: Tensor, places: Tensor, k: Tensor, v: Tensor, mask: Tensor, cross: int = -1
    ) -> Tensor:
        heads = [
            t.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for t in (turned(layer["q"](x), places), k, v)
        ]
        out: Tensor = layer["o"](self.attention(*heads, mask, cross).transpose(1, 2).flatten(-2))
        return out

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cross: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def chosen(self, layer: Any, x: Tensor, index: Tensor, causal: Tensor) -> Tensor:
        q = layer["iq"](x).unflatten(-1, (INDEX_HEADS, INDEX_WIDTH))
        heads = F.relu(q @ index.mT.unsqueeze(1))
        scores = (layer["iw"](x).unsqueeze(-2) @ heads).squeeze(-2)
        best = scores.masked_fill(~causal[:, 0], -math.inf).topk(TOPK, -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)[:, None]


class FollowingYoco(Yoco):
    """What `MASS` makes of it, in eager torch."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.following = Following(schedule)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cross: int) -> Tensor:
        if cross < 0:
            return super().attention(q, k, v, mask, cross)
        return self.following(cross, q, k, v, mask.expand(B, 1, -1, -1), q.shape[-1] ** -0.5)


def outputs(model: Any, cached: bool) -> list[Tensor]:
    """Returns what a prompt gives, and five more tokens one at a time where there is a cache."""
    x = torch.randn(B, S, WIDTH, generator=torch.Generator().manual_seed(1))
    total = KEYS if cached else S
    kept = torch.ones(B, total, dtype=torch.bool)
    kept[0, :2] = False
    narrow = WIDTH // HEADS * KV_HEADS
    widths = {"0.k": narrow, "0.v": narrow, "1.k": narrow, "1.v": narrow, "k": narrow, "v": narrow}
    widths["ik"] = INDEX_WIDTH
    past = {name: torch.zeros(B, KEYS, width) for name, width in widths.items()} if cached else None
    prompt = S - 5 if cached else S
    spans = [(0, prompt), *((i, i + 1) for i in range(prompt, S))]
    with torch.no_grad():
        found = [model(x[:, a:b].clone(), kept, torch.arange(a, b), past) for a, b in spans]
    # Rows of padding see no token: what is there does not matter, but must be a number.
    assert all(torch.isfinite(out).all() for out in found)
    found[0][0, :2] = 0
    return found


def difference(ones: list[Tensor], others: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ones, others, strict=True))


SPARSE_YOCO = {"attention": 2, "attention_mass": 1, "select_topk": 1, "sparse_attention": 3}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("share", "schedule", "counts"),
    [
        (4, "FSSS", SPARSE_YOCO),
        ("FSSS", "FSSS", SPARSE_YOCO),
        ("FSFS", "FSFS", {"attention": 2, "attention_mass": 2, "select_topk": 2, "sparse_attention": 2}),
    ],
)
def test_cross_layers_of_a_yoco_read_one_index_over_the_shared_keys(
    share: Any, schedule: str, counts: dict[str, int], cached: bool, passes: Any
) -> None:
    passes.options = Options.read({**MASS, "share": share})
    model = Yoco()
    ours = outputs(torch.compile(model, backend=passes), cached)
    assert difference(ours, outputs(FollowingYoco(schedule), cached)) < TOLERANCE
    assert difference(ours, outputs(model, cached)) > VISIBLE
    assert len(passes.plans) == 1 + cached
    for plan, calls in zip(passes.plans, passes.calls, strict=True):
        assert plan.schedule == schedule
        assert [g.members for g in plan.groups if g.kind == "kv"] == [(2, 3, 4, 5)]
        assert counted(calls) == counts
        assert len(keys_of(calls, "attention_mass", "sparse_attention")) == 1
    assert not passes.reasons


@pytest.mark.parametrize("cached", [False, True])
def test_indexers_of_a_yoco_become_one(cached: bool, passes: Any) -> None:
    passes.options = Options.read({"share": CROSS})
    ours = outputs(torch.compile(Yoco(indexers=True), backend=passes), cached)
    assert difference(ours, outputs(Yoco(indexers=True, schedule="FSSS"), cached)) < TOLERANCE
    assert difference(ours, outputs(Yoco(indexers=True), cached)) > VISIBLE
    for plan, calls in zip(passes.plans, passes.calls, strict=True):
        assert plan.schedule == "FSSS"
        assert [g.members for g in plan.groups if g.kind == "index"] == [(2, 3, 4, 5)]
        assert counted(calls) == {"attention": 2, "index_topk": 1, "sparse_attention": 4}
        assert len(keys_of(calls, "sparse_attention")) == 1


def test_windows_of_a_yoco_are_left_dense(passes: Any) -> None:
    """They are not counted in a schedule, and keep their windows."""
    passes.options = Options.read({**MASS, "share": "off"})
    outputs(torch.compile(Yoco(), backend=passes), True)
    for plan in passes.plans:
        assert [site.action for site in plan.sites] == ["attention"] * 2 + ["sparse"] * CROSS
