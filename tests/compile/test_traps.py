"""Traps that other implementations of shared sparse indices fell into: one list, every one of them tested.

An exception from "one test file a source file": most traps lie between parts. Each entry says what goes
wrong, where it was seen, and which test would fail here (in this file where no other is named).

1. Attention skips its mask (`is_causal`) and the indexer loses causality; boolean masks taken for additive
   ones; left padding; a cache that changes the choice (transformers #48363, #48289).
   test_a_mask_that_is_skipped_holds_for_the_choice_too, test_an_indexer_without_a_mask_is_given_none,
   test_no_token_sees_a_later_one, test_padding_changes_no_token, test_a_cache_changes_no_token,
   test_masks_of_every_kind_select_the_same.
2. Keys that stand for several tokens need a causal mask of their own (transformers #45820).
   test_no_token_sees_a_later_one[deepseek_v4]: such a selection stays the mask that the model makes of it.
3. A row with fewer valid keys than are selected is filled with masked ones; -inf makes NaN (NeMo Automodel
   #2633). test_rows_with_fewer_keys_than_selected_are_dense; ir/test_ops.py (-1, rows without keys).
4. Scores accumulated in place into the mask that all layers read (ik_llama.cpp #2069).
   test_masks_and_scores_written_in_place.
5. Nothing shows until a sequence is longer than the selection (mlx-lm #1419, #1453; ik_llama.cpp #2045).
   test_decoding_past_the_number_of_selected_tokens. All tests here select fewer tokens than there are.
6. The indexer's rotary embedding, interleaved or by halves (llama.cpp #25407, transformers #46842,
   mlx-lm #1419). test_the_rotation_of_an_indexer_is_the_models; test_families.py (glm_moe_dsa is
   interleaved, deepseek_v32 by halves).
7. The first layer shares, and there is no index yet (ATOM #1080). test_config.py and test_dense_sharing.py
   (such schedules are errors), policies/test_schedule.py (everyone reads an indexer that runs); 10.
8. One layer too early or too late, FFSSS or FSSS (vllm-ascend #9390, prime-rl #2541).
   policies/test_schedule.py (the rule of transformers, layer by layer), test_sharing.py (schedules against
   the same weights in transformers).
9. A configuration contradicts itself about who shares (TensorRT-LLM #15574).
   test_the_graph_says_who_shares_and_not_the_configuration.
10. A part of the model begins with a layer that shares (sglang #29014, #29162, #28659, vllm #49085).
    test_a_part_that_begins_with_a_shared_layer, test_each_graph_of_a_model_has_an_anchor_of_its_own,
    test_a_schedule_for_the_whole_model_does_not_fit_a_part.
11. A buffer that a captured CUDA graph does not know, flags that are read on the device (sglang #29014,
    #36527, #47269). Indices are values in the graph, there is no buffer:
    test_a_step_holds_no_flag_and_asks_the_host_for_nothing; test_cuda.py (graphs replayed at other lengths).
12. Two batches in flight share one buffer (vllm #49085, sglang #36527).
    test_sequences_that_take_turns_do_not_see_each_other.
13. Draft layers inherit the schedule (vllm-ascend #15754, ATOM #1362, vllm #48528, sglang #33284, #30842).
    Not applicable: there is no speculative decoding here. A draft model is a model of its own, whose graph
    says what is shared.
14. Who owns the key caches of indexers that do not run (vllm #49286, sglang #30531, vllm-ascend #15758).
    test_sharing.py (written unless `reclaim`, and then not), passes/test_reclaim.py.
15. Code that takes every layer for one with an indexer (vllm #46506).
    test_families.py and test_sharing.py (layers without), 10.
16. Positions in a cache's memory shared between layers whose tables differ (sglang #32771, TensorRT-LLM
    #15574). test_one_index_over_tables_that_differ.
17. Caches of other page sizes, overwritten in silence (vllm #54359). test_one_index_over_tables_that_differ;
    ir/test_pages.py (tables that do not fit are errors); passes/test_group.py (other keys, another index).
18. Padding told by the token's number hides real tokens (NeMo Automodel #2633).
    test_padding_is_what_the_mask_says. Its FP8 half (sglang #26133) does not apply: nothing is quantised.
19. Choices of several ranks merged (vllm-ascend #13177). Not applicable: sharded models are left whole
    (test_backend.py, DTensor).
20. Ties and rounding that differ from run to run (cudnn-frontend #831).
    test_ties_go_to_the_first_tokens_every_time, test_every_run_gives_the_same_bits;
    kernels/test_select.py and test_gather.py (same bits on the chip), ir/test_ops.py (ties).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import clsa_compile.ir.ops  # noqa: F401 (registers the contract ops)
from clsa_compile.config import Options
from clsa_compile.errors import OptionError
from clsa_compile.testing import tiny

TOPK, TOLERANCE = 6, 1e-4
# More than rounding: what another choice of tokens changes.
VISIBLE = 1e-3
LOWEST = torch.finfo(torch.float32).min
MASS = {"topk": TOPK, "keep_first": 1, "keep_last": 2, "prefill": "sparse"}


# -- a decoder with indexers, one part at a time exchangeable ----------------------------------------

B, S, LENGTH, WIDTH, HEADS, INDEX_HEADS, INDEX_WIDTH = 2, 14, 24, 32, 4, 32, 8


def unturned(x: Tensor, places: Tensor) -> Tensor:
    return x


def _angles(x: Tensor, places: Tensor) -> Tensor:
    """Angles [S, 1, C / 2] for x [B, S, H, C]."""
    return places[:, None, None] * 10.0 ** -torch.arange(0, x.shape[-1], 2).div(x.shape[-1])


def by_halves(x: Tensor, places: Tensor) -> Tensor:
    """Rotary embedding of dimension i with i + C / 2."""
    angles = _angles(x, places)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def interleaved(x: Tensor, places: Tensor) -> Tensor:
    """Rotary embedding of dimension 2i with 2i + 1."""
    angles = _angles(x, places)
    a, b = x[..., 0::2], x[..., 1::2]
    turned = [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()]
    return torch.stack(turned, -1).flatten(-2)


def scatter(indices: Tensor, keys: int) -> Tensor:
    chosen = torch.zeros(*indices.shape[:-1], keys, dtype=torch.bool)
    return chosen.scatter(-1, indices, True)


def best(scores: Tensor) -> Tensor:
    return scatter(scores.topk(min(TOPK, scores.shape[-1]), -1).indices, scores.shape[-1])


def choose(scores: Tensor, mask: Tensor) -> Tensor:
    """The usual selection, [B, S, T]: under the mask that attention has too, boolean or additive."""
    return best(scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask)


def choose_without_a_mask(scores: Tensor, mask: Tensor) -> Tensor:
    return best(scores)


def choose_into_the_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Accumulates into the tensor that attention and later layers read: the trap."""
    mask += scores
    return best(mask)


def choose_into_a_copy(scores: Tensor, mask: Tensor) -> Tensor:
    total = mask.clone()
    total += scores
    return best(total)


def choose_before_a_write(scores: Tensor, mask: Tensor) -> Tensor:
    """The mask of this layer is read, then that of the next one written, then the choice made."""
    total = scores + mask
    mask -= 9.0 * torch.arange(mask.shape[-1]).remainder(2)
    return best(total)


def choose_all(scores: Tensor, mask: Tensor) -> Tensor:
    """A dense model: attention takes this for its mask."""
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    if chosen is mask:
        allowed = mask
    elif mask.dtype == torch.bool:
        allowed = chosen & mask
    else:
        allowed = mask.masked_fill(~chosen, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])


def attend_without_a_mask(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_in_place(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores += mask.masked_fill(~chosen, -math.inf)[:, None]
    return scores.softmax(-1) @ v


def attend_through_the_mask(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    """Later layers see what earlier ones chose: the trap."""
    mask.masked_fill_(~chosen, LOWEST)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])


class FollowMass:
    """What `MASS` makes of a dense decoder's attention, in eager torch: F chooses, S reads the choice."""

    def __init__(self, schedule: str) -> None:
        self.schedule, self.calls = schedule, 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
        role = self.schedule[self.calls % len(self.schedule)]
        self.calls += 1
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask[:, None], -math.inf)
        if role == "F":
            mass = scores.softmax(-1).nan_to_num().mean(1)
            place, count = mask.cumsum(-1), mask.sum(-1, keepdim=True)
            ends = (place <= MASS["keep_first"]) | (place > count - MASS["keep_last"])
            self.chosen = best((mass + 2.0 * ends).masked_fill(~mask, -1.0))
            return scores.softmax(-1).nan_to_num() @ v
        return scores.masked_fill(~self.chosen[:, None], -math.inf).softmax(-1).nan_to_num() @ v


def attend_after_a_write(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    """The mask of this layer is read, then that of the next one written, then attention computed."""
    own = mask.masked_fill(~chosen, -math.inf)
    mask -= 9.0 * torch.arange(mask.shape[-1]).remainder(2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=own[:, None])


def attend_in_place_after_a_write(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores += mask.masked_fill(~chosen, -math.inf)[:, None]
    mask -= 9.0 * torch.arange(mask.shape[-1]).remainder(2)
    return scores.softmax(-1) @ v


Past = dict[str, Tensor]


class Decoder(nn.Module):
    """Attentions over tokens that indexers choose; an S in `schedule` reads the last choice.

    forward: x [B, S, WIDTH], mask [B, S, T], places [S] of the rows in the sequence; past [B, T, C] by
    name is written in place, or grows. `cut`: the graph breaks before that layer.
    """

    def __init__(
        self,
        schedule: str = "FF",
        *,
        rotate: Callable[[Tensor, Tensor], Tensor] = by_halves,
        choose: Callable[[Tensor, Tensor], Tensor] = choose,
        attend: Callable[..., Tensor] = attend,
        cut: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.schedule, self.rotate, self.choose, self.attend = schedule, rotate, choose, attend
        self.cut = cut
        widths = {"q": WIDTH, "k": WIDTH, "v": WIDTH, "o": WIDTH}
        widths |= {"iq": INDEX_HEADS * INDEX_WIDTH, "ik": INDEX_WIDTH, "iw": INDEX_HEADS}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(WIDTH, width, bias=False) for name, width in widths.items()})
            for _ in schedule
        )

    def forward(
        self, x: Tensor, mask: Tensor, places: Tensor, past: Past | None = None, grows: bool = False
    ) -> Tensor:
        if not self.cut:
            return self.part(0, x, mask, places, past, grows)
        x = self.part(0, x, mask, places, past, grows, self.cut)
        torch._dynamo.graph_break()
        return self.part(self.cut, x, mask, places, past, grows)

    def part(
        self,
        first: int,
        x: Tensor,
        mask: Tensor,
        places: Tensor,
        past: Past | None,
        grows: bool,
        last: int | None = None,
    ) -> Tensor:
        chosen = mask
        for i, role in [*enumerate(self.schedule)][first:last]:
            layer = self.layers[i]
            assert isinstance(layer, nn.ModuleDict)
            kept = {n: layer[n](x) for n in ("k", "v", "ik")}
            kept["k"] = self.rotate(kept["k"].unflatten(-1, (HEADS, -1)), places).flatten(-2)
            kept["ik"] = self.rotate(kept["ik"].unsqueeze(2), places).squeeze(2)
            if past is not None:
                kept = {n: store(past, f"{i}.{n}", new, places, grows) for n, new in kept.items()}
            if role == "F":
                chosen = self.choose(self.scores(layer, x, kept["ik"], places), mask)
            q = self.rotate(layer["q"](x).unflatten(-1, (HEADS, -1)), places).transpose(1, 2)
            k, v = (kept[n].unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "kv")
            x = x + layer["o"](self.attend(q, k, v, chosen, mask).transpose(1, 2).flatten(-2))
        return x

    def scores(self, layer: nn.ModuleDict, x: Tensor, keys: Tensor, places: Tensor) -> Tensor:
        """Returns index scores [B, S, T]."""
        q = self.rotate(layer["iq"](x).unflatten(-1, (INDEX_HEADS, INDEX_WIDTH)), places)
        return (layer["iw"](x).unsqueeze(-2) @ F.relu(q @ keys.mT.unsqueeze(1))).squeeze(-2)


def store(past: Past, name: str, new: Tensor, places: Tensor, grows: bool) -> Tensor:
    if grows:
        past[name] = torch.cat([past[name], new], 1) if name in past else new
    else:
        past[name].index_copy_(1, places, new)
    return past[name]


def dense(schedule: str = "FF", **parts: Any) -> Decoder:
    return Decoder(schedule, choose=choose_all, **parts)


def following(schedule: str) -> Decoder:
    return dense(schedule, attend=FollowMass(schedule))


def hidden(length: int = S, seed: int = 1) -> Tensor:
    return torch.randn(B, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def visible(padding: int = 3, keys: int = S, additive: float | None = None) -> Tensor:
    """A causal mask [B, T, T] with padding in the first row: boolean, or 0 and `additive`."""
    kept = torch.ones(B, 1, keys, dtype=torch.bool)
    kept[0, :, :padding] = False
    # Padding sees itself, so that no row is empty.
    mask = torch.ones(keys, keys, dtype=torch.bool).tril() & kept | torch.eye(keys, dtype=torch.bool)
    return mask if additive is None else torch.zeros(B, keys, keys).masked_fill(~mask, additive)


def run(model: Any, mask: Tensor, x: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(hidden() if x is None else x, mask, torch.arange(S))
    return found


PROMPT = TOPK - 3


def steps(model: Any, seed: int, grows: bool) -> Iterator[Tensor]:
    """Yields what a prompt gives, then each token, in a cache of its own; `seed` is the padding too."""
    x = hidden(S, seed)
    past = {}
    if not grows:
        widths = {"k": WIDTH, "v": WIDTH, "ik": INDEX_WIDTH}
        past = {f"{i}.{n}": torch.zeros(B, LENGTH, w) for i in range(2) for n, w in widths.items()}
    mask = visible(seed, LENGTH)
    for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, S))]:
        # A copy: rows of a mask are no contiguous tensor, and strides are guarded.
        rows = mask[:, start:end, : end if grows else LENGTH].clone()
        # Not around the yield: two of these take turns, and each would restore what the other has set.
        with torch.no_grad():
            found = model(x[:, start:end].clone(), rows, torch.arange(start, end), past, grows)
        yield found


@dataclass(frozen=True)
class Decoded:
    """What a compiled decoder gave, a token at a time, for two sequences in turns; and one of them at once.

    `expected` is what eager gives for each of them. `graphs` were made for the steps.
    """

    grows: bool
    turns: tuple[list[Tensor], list[Tensor]]
    expected: tuple[list[Tensor], list[Tensor]]
    whole: Tensor
    passes: Any
    graphs: int


CACHES = [
    pytest.param((Decoder, False), id="indexers, static cache"),
    pytest.param((dense, False), id="dense, static cache"),
    pytest.param((Decoder, True), id="indexers, growing cache"),
    pytest.param((dense, True), id="dense, growing cache", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def decoded(request: pytest.FixtureRequest, make_passes: Any) -> Decoded:
    make, grows = request.param
    torch._dynamo.reset()
    passes = make_passes(options=Options.read({"share": "FS"} | (MASS if make is dense else {})))
    compiled = torch.compile(make("FF"), backend=passes)
    pairs = [*zip(steps(compiled, 1, grows), steps(compiled, 2, grows), strict=True)]
    graphs = len(passes.plans)
    whole = run(compiled, visible(1), hidden(S, 1))
    eager = [[*steps(following("FS") if make is dense else Decoder("FS"), seed, grows)] for seed in (1, 2)]
    turns = [one for one, _ in pairs], [two for _, two in pairs]
    return Decoded(grows, turns, (eager[0], eager[1]), whole, passes, graphs)


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().nan_to_num(nan=math.inf).item()


# -- decoders of transformers -------------------------------------------------------------------------

COMPRESSED: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    "sliding_window": 4,
    "num_key_value_heads": 1,
    "index_topk": 3,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "hc_mult": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_layer_types": ["moe"] * 3,
}


def pretrained(name: str, attention: str = "sdpa", layers: int = 2, **changes: Any) -> nn.Module:
    """Initial weights are wider than usual, so that another choice of tokens shows in the logits."""
    settings = {"num_hidden_layers": layers, "initializer_range": 0.1}
    if name == "glm_moe_dsa":
        settings |= {"mlp_layer_types": ["dense"] * layers, "index_topk": TOPK}
    return tiny(name, attention, **{**settings, **changes})


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns logits [B, S, vocabulary]; `mask` [B, T] says which tokens are no padding."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found: Tensor = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    return found


# -- 1, 2, 3: masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attention", "changes", "options"),
    [
        pytest.param("glm_moe_dsa", "sdpa", {}, {"share": 2}, id="boolean masks"),
        pytest.param("glm_moe_dsa", "eager", {}, {}, id="additive masks"),
        pytest.param("llama", "sdpa", {}, {**MASS, "share": 2}, id="boolean masks and mass"),
        pytest.param("llama", "eager", {}, {**MASS, "share": "off"}, id="additive masks and mass"),
        pytest.param("deepseek_v4", "eager", COMPRESSED, {}, id="deepseek_v4", marks=pytest.mark.slow),
    ],
)
def test_no_token_sees_a_later_one(
    name: str, attention: str, changes: dict[str, Any], options: dict[str, Any], passes: Any
) -> None:
    """Later tokens change nothing before them, whatever mask the model did or did not make."""
    passes.options = Options.read(options)
    model = pretrained(name, attention, **changes)
    ids, seen = tokens(2, S), S - 4
    other = ids.clone()
    other[:, seen:] = tokens(2, 4, seed=9)
    compiled = torch.compile(model, backend=passes)
    one, two = logits(compiled, ids), logits(compiled, other)
    assert difference(one[:, :seen], two[:, :seen]) < 1e-5
    assert difference(one[:, seen:], two[:, seen:]) > VISIBLE
    if not options:
        assert difference(one, logits(model, ids)) < TOLERANCE
    assert passes.count("left") == 0, passes.reasons
    assert (passes.count("sparse") > 0) == (name != "deepseek_v4")


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param("glm_moe_dsa", {}, marks=pytest.mark.slow), ("llama", {**MASS, "share": 2})],
)
def test_padding_changes_no_token(name: str, options: dict[str, Any], passes: Any) -> None:
    """A sequence longer than the selection, alone and behind padding."""
    passes.options = Options.read(options)
    compiled = torch.compile(pretrained(name), backend=passes)
    ids, padding = tokens(1, S), 3
    rows = torch.cat([F.pad(ids, (padding, 0)), tokens(1, S + padding)])
    mask = torch.ones_like(rows)
    mask[0, :padding] = 0
    padded = logits(compiled, rows, mask)
    assert difference(padded[:1, padding:], logits(compiled, ids)) < TOLERANCE
    assert all(plan.count("sparse") for plan in passes.plans)


@pytest.mark.parametrize("decoded", CACHES, indirect=True)
def test_a_cache_changes_no_token(decoded: Decoded) -> None:
    """A token at a time, and all at once."""
    assert difference(torch.cat(decoded.turns[0], 1), decoded.whole) < TOLERANCE


@pytest.mark.parametrize("additive", [None, -math.inf, LOWEST])
def test_masks_of_every_kind_select_the_same(additive: float | None, passes: Any) -> None:
    expected = run(Decoder(), visible())
    actual = run(torch.compile(Decoder(), backend=passes), visible(additive=additive))
    assert difference(actual, expected) < TOLERANCE
    assert passes.count("sparse") == 2, passes.reasons


@pytest.mark.parametrize("share", [2, "off"])
def test_a_mask_that_is_skipped_holds_for_the_choice_too(share: int | str, passes: Any) -> None:
    """`is_causal`: no tensor says what may be read, for attention nor for what is made of its mass."""
    passes.options = Options.read({**MASS, "share": share})
    compiled = torch.compile(dense(attend=attend_without_a_mask), backend=passes)
    other = hidden()
    other[:, S - 4 :] += 1.0
    mask = visible(0)
    ours = run(compiled, mask)
    assert difference(ours[:, : S - 4], run(compiled, mask, other)[:, : S - 4]) < 1e-5
    if share == 2:
        assert difference(ours, run(following("FS"), mask)) < TOLERANCE
    assert difference(ours, run(dense(), mask)) > VISIBLE
    assert passes.count("sparse") == (1 if share == 2 else 2)


def test_an_indexer_without_a_mask_is_given_none(passes: Any) -> None:
    """Its choice falls on later tokens too, which attention then drops: what the model does stands."""
    model = Decoder(choose=choose_without_a_mask)
    expected = run(model, visible())
    assert difference(run(torch.compile(model, backend=passes), visible()), expected) < TOLERANCE
    assert difference(run(Decoder(), visible()), expected) > VISIBLE
    assert passes.count("sparse") == 2, passes.reasons


@pytest.mark.parametrize(
    ("make", "options"), [(Decoder, {}), (Decoder, {"share": 2}), (dense, {**MASS, "share": 2})]
)
@pytest.mark.parametrize("additive", [None, -math.inf, LOWEST])
def test_rows_with_fewer_keys_than_selected_are_dense(
    additive: float | None, make: Any, options: dict[str, Any], passes: Any
) -> None:
    """Where no more tokens can be seen than are selected, all of them are, and nothing but them."""
    passes.options = Options.read(options)
    padding = 3
    mask = visible(padding, additive=additive)
    if additive != LOWEST:
        # Rows that see nothing at all: no NaN comes of them, in later layers neither.
        mask[0].diagonal()[:padding] = False if additive is None else additive
    found = run(torch.compile(make(), backend=passes), mask)
    expected = run(dense(), visible(padding))
    for row, first in ((0, padding), (1, 0)):
        enough = first + TOPK
        assert difference(found[row, first:enough], expected[row, first:enough]) < TOLERANCE
        assert difference(found[row, enough:], expected[row, enough:]) > VISIBLE
    assert torch.isfinite(found).all()
    assert passes.count("sparse") == (1 if make is dense else 2), passes.reasons


# -- 4: writes in place -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "corrupts"),
    [
        ({"attend": attend_in_place}, False),
        ({"choose": choose_into_a_copy}, False),
        ({"choose": choose_into_a_copy, "attend": attend_in_place}, False),
        ({"choose": choose_into_the_mask}, True),
        ({"choose": choose_into_the_mask, "attend": attend_in_place}, True),
        ({"attend": attend_through_the_mask}, True),
        ({"choose": choose_before_a_write}, True),
        ({"attend": attend_after_a_write}, True),
        ({"attend": attend_in_place_after_a_write}, True),
    ],
)
def test_masks_and_scores_written_in_place(parts: dict[str, Any], corrupts: bool, passes: Any) -> None:
    """Exact where a model writes the mask of later layers too, and the mask ends as the model leaves it."""
    mask = visible(additive=LOWEST)
    model = Decoder("FFF", **parts)
    written, ours = mask.clone(), mask.clone()
    expected = run(model, written)
    actual = run(torch.compile(model, backend=passes), ours)
    assert difference(actual, expected) < TOLERANCE
    torch.testing.assert_close(ours, written, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(written, mask) != corrupts
    assert (difference(expected, run(Decoder("FFF"), mask)) > VISIBLE) == corrupts
    assert len(passes.plans[0].sites) == 3


# -- 5, 6 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoded", CACHES, indirect=True)
def test_decoding_past_the_number_of_selected_tokens(decoded: Decoded) -> None:
    """Dense while a sequence has no more tokens than are selected, and what the model does from then on."""
    everything = [*steps(dense(), 1, decoded.grows)]
    early = 1 + TOPK - PROMPT
    for i, (ours, expected, whole) in enumerate(
        zip(decoded.turns[0], decoded.expected[0], everything, strict=True)
    ):
        assert difference(ours, expected) < TOLERANCE, i
        # The first row has a token of padding, and so one more step.
        assert (difference(ours[1], whole[1]) < TOLERANCE) == (i < early), i
        assert (difference(ours[0], whole[0]) < TOLERANCE) == (i < early + 1), i


@pytest.mark.parametrize("rotate", [by_halves, interleaved, unturned])
def test_the_rotation_of_an_indexer_is_the_models(rotate: Any, passes: Any) -> None:
    expected = run(Decoder(rotate=rotate), visible())
    actual = run(torch.compile(Decoder(rotate=rotate), backend=passes), visible())
    assert difference(actual, expected) < TOLERANCE
    assert passes.count("sparse") == 2, passes.reasons
    for other in {by_halves, interleaved, unturned} - {rotate}:
        assert difference(run(Decoder(rotate=other), visible()), expected) > VISIBLE


# -- 9, 10: who shares --------------------------------------------------------------------------------


def types(schedule: str) -> list[str]:
    return [{"F": "full", "S": "shared"}[role] for role in schedule]


def test_the_graph_says_who_shares_and_not_the_configuration(passes: Any) -> None:
    model: Any = pretrained(
        "glm_moe_dsa", layers=5, indexer_types=types("FSSFS"), index_topk_freq=2, index_skip_topk_offset=1
    )
    # What a model that is built no longer reads says something else still.
    model.config.indexer_types = types("FFFFF")
    model.config.index_topk_pattern = "FSFSF"
    ids = tokens(2, S)
    assert difference(logits(torch.compile(model, backend=passes), ids), logits(model, ids)) < TOLERANCE
    (plan,) = passes.plans
    assert plan.schedule == "FSSFS"
    (targets,) = passes.rewritten
    assert targets[torch.ops.clsa.index_topk.default] == 2


def stage(model: Any, first: int, last: int) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """Layers `first` to `last - 1` as a function of hidden states and the last index."""

    def forward(x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        positions = torch.arange(S)[None]
        mask = (positions.mT >= positions).expand(x.shape[0], 1, -1, -1)
        angles = model.model.rotary_emb(x, position_ids=positions)
        for layer in model.model.layers[first:last]:
            x, index = layer(
                x,
                attention_mask=mask,
                position_embeddings=angles,
                position_ids=positions,
                prev_topk_indices=index,
            )
        assert index is not None
        return x, index

    return forward


@pytest.mark.parametrize("hands_on", [False, True])
def test_a_part_that_begins_with_a_shared_layer(hands_on: bool, passes: Any) -> None:
    """The index comes in as an input: attention reads the mask made of it, and the rest is as ever."""
    passes.options = Options.read({"share": 2})
    model = pretrained("glm_moe_dsa", layers=5, indexer_types=types("FSSFS"))
    whole = stage(model, 1, 5)

    def part(x: Tensor, index: Tensor) -> Any:
        return whole(x, index) if hands_on else whole(x, index)[0]

    x = torch.randn(2, S, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        middle, index = stage(model, 0, 1)(x, None)
        expected = part(middle, index)
        actual = torch.compile(part, backend=passes)(middle, index)
        wrong = whole(middle, torch.randint_like(index, S))[0]
    if hands_on:
        assert torch.equal(scatter(actual[1].long(), S), scatter(expected[1].long(), S))
        expected, actual = expected[0], actual[0]
    assert difference(actual, expected) < TOLERANCE
    assert difference(wrong, expected) > VISIBLE
    (plan,) = passes.plans
    # An index that another part needs stays the model's own, as a mask.
    own = ["attention"] * 2 if hands_on else ["sparse"] * 2
    assert [entry.action for entry in plan.sites] == ["attention", "attention", *own]
    assert plan.schedule == ("" if hands_on else "FS")
    assert all(hands_on == ("also used by output" in entry.reason) for entry in plan.sites[2:])


@pytest.mark.parametrize(("make", "options"), [(Decoder, {"share": 2}), (dense, {**MASS, "share": 2})])
def test_each_graph_of_a_model_has_an_anchor_of_its_own(
    make: Any, options: dict[str, Any], passes: Any
) -> None:
    """Cut after its first layer: the index that the second would read is in another graph."""
    passes.options = Options.read(options)
    eager = following if make is dense else Decoder
    cut = run(torch.compile(make("FFF", cut=1), backend=passes), visible())
    assert [plan.schedule for plan in passes.plans if plan.sites] == ["F", "FS"]
    assert difference(cut, run(eager("FFS"), visible())) < TOLERANCE
    assert difference(cut, run(eager("FSF"), visible())) > VISIBLE


@pytest.mark.parametrize(("make", "options"), [(Decoder, {}), (dense, MASS)])
def test_a_schedule_for_the_whole_model_does_not_fit_a_part(
    make: Any, options: dict[str, Any], passes: Any
) -> None:
    passes.options = Options.read({**options, "share": "FSF"})
    message = "'FSF' is for 3 layers; this graph has 1"
    with pytest.raises((OptionError, BackendCompilerFailed), match=message):
        run(torch.compile(make("FFF", cut=1), backend=passes), visible())


# -- 11, 12: state ------------------------------------------------------------------------------------

HOST = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}


@pytest.mark.parametrize("decoded", CACHES[:2], indirect=True)
def test_a_step_holds_no_flag_and_asks_the_host_for_nothing(decoded: Decoded) -> None:
    assert decoded.graphs == 2, "one for the prompts, one for all steps, below TOPK tokens and above"
    step = decoded.passes.modules[1].graph
    assert not HOST & {getattr(node.target, "_name", "").partition(".")[0] for node in step.nodes}
    assert all(isinstance(node.meta["val"], Tensor) for node in step.nodes if node.op == "placeholder")
    calls = decoded.passes.calls[1]
    assert [name for name, _ in calls].count("sparse_attention") >= 1
    for _, arguments in calls:
        constants = [a for a in arguments if not isinstance(a, torch.fx.Node | list | tuple)]
        assert all(a is None or isinstance(a, bool | int | float | str) for a in constants)


@pytest.mark.parametrize("decoded", CACHES, indirect=True)
def test_sequences_that_take_turns_do_not_see_each_other(decoded: Decoded) -> None:
    (one, two), (first, second) = decoded.turns, decoded.expected
    for i in range(len(one)):
        assert difference(one[i], first[i]) < TOLERANCE, i
        assert difference(two[i], second[i]) < TOLERANCE, i
        assert difference(first[i], second[i]) > VISIBLE, i
    assert {plan.schedule for plan in decoded.passes.plans if plan.count("sparse")} == {"FS"}


# -- 16, 17: pages ------------------------------------------------------------------------------------


def paged(x: Tensor, page: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns x [B, H, T, D] in a pool of shuffled pages with garbage between, and its block table [B, M]."""
    b, h, t, d = x.shape
    many = -(-t // page)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(2 * b * many, generator=generator)[: b * many].view(b, many).int()
    pool = torch.full((2 * b * many, h, page, d), 1e4)
    whole = torch.zeros(b, h, many * page, d)
    whole[:, :, :t] = x
    pool[table.flatten().long()] = whole.unflatten(2, (many, page)).transpose(1, 2).flatten(0, 1)
    return pool, table


@pytest.mark.parametrize(("index_page", "page"), [(4, 4), (4, 16), (16, 4), (5, 3)])
def test_one_index_over_tables_that_differ(index_page: int, page: int) -> None:
    """Indices are tokens of a sequence, not places in memory: each layer looks them up in its own table."""
    torch.manual_seed(0)
    t, lengths = 30, torch.tensor([30, 17])
    iq, ik, weight = torch.randn(2, 32, 1, 8), torch.randn(2, 1, t, 8), torch.randn(2, 32, 1)
    pool, table = paged(ik, index_page, 1)
    rest = (None, None, None, [lengths], TOPK, 1.0, "sum: weight*Max(0, dot)", "kv < in0(b)", False)
    plain = torch.ops.clsa.index_topk(iq, ik, weight, *rest)
    index = torch.ops.clsa.index_topk(iq, pool, weight, *rest, table)
    assert torch.equal(index, plain)
    for layer in (2, 3):
        q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, t, 16), torch.randn(2, 2, t, 16)
        (keys, places), (values, same) = paged(k, page, layer), paged(v, page, layer)
        assert torch.equal(places, same)
        assert places.shape != table.shape or not torch.equal(places, table)
        attend = torch.ops.clsa.sparse_attention
        tail: tuple[Any, ...] = (None, None, [], None, 0.25, 0.0, "")
        expected = attend(q, k, v, plain, *tail)
        torch.testing.assert_close(attend(q, keys, values, index, *tail, places), expected)


# -- 18, 20 -------------------------------------------------------------------------------------------


def test_padding_is_what_the_mask_says(passes: Any) -> None:
    """Tokens with the number of padding, which is that of the end too, inside of a sequence are real."""
    model: Any = pretrained("glm_moe_dsa", pad_token_id=0, eos_token_id=0)
    with torch.no_grad():
        # As in a model that was trained to end its texts; padding of its own has a row of zeros.
        model.get_input_embeddings().weight[0] = torch.randn(64)
    ids = tokens(2, S)
    ids[:, 4:8] = 0
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    guessed = mask * (ids != 0)
    expected = logits(model, ids, mask)[:, 3:]
    actual = logits(torch.compile(model, backend=passes), ids, mask)[:, 3:]
    assert difference(actual, expected) < TOLERANCE
    assert passes.count("sparse") == 2, passes.reasons
    assert difference(logits(model, ids, guessed)[:, 8:], logits(model, ids, mask)[:, 8:]) > VISIBLE


def test_ties_go_to_the_first_tokens_every_time(passes: Any) -> None:
    """All scores are equal: the first tokens that may be read are chosen."""
    model: Any = Decoder()
    for layer in model.layers:
        nn.init.zeros_(layer["iw"].weight)
    compiled = torch.compile(model, backend=passes)
    first = visible() & (visible().cumsum(-1) <= TOPK)
    expected = run(Decoder(choose=lambda scores, mask: first), visible())
    assert difference(run(compiled, visible()), expected) < TOLERANCE
    assert passes.count("sparse") == 2, passes.reasons


@pytest.mark.parametrize(
    ("make", "options"), [(Decoder, {"share": 2}), (dense, {**MASS, "share": 2}), (dense, MASS)]
)
def test_every_run_gives_the_same_bits(make: Any, options: dict[str, Any], passes: Any) -> None:
    passes.options = Options.read(options)
    x = hidden()
    x[:, 5:9] = x[:, 4:5]  # the same token again and again
    compiled = torch.compile(make(rotate=unturned), backend=passes)
    one, *others = (run(compiled, visible(), x) for _ in range(4))
    assert all(torch.equal(one, other) for other in others)
    assert len(passes.plans) == 1
