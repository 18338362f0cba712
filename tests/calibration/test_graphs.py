"""Graphs: they compute what the model computes, and with sharing what the compiler does, for any family."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from clsa_compile.backend import requested
from clsa_compile.calibration import attend
from clsa_compile.calibration.attend import Tokens
from clsa_compile.calibration.graphs import Forward, fitting
from clsa_compile.calibration.index_training import FORMS
from clsa_compile.config import Options
from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import Index, Pool, Request, Weights
from clsa_compile.testing import tiny

IDS = torch.randint(1, 100, (1, 40), generator=torch.Generator().manual_seed(5))
OPTIONS = {"topk": 8, "keep_first": 2, "keep_last": 3, "prefill": "sparse", "share": 2}
WINDOWS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES = {"llama": {}, "gemma3_text": WINDOWS}
MORE = {"deepseek_v3": {}, "cohere2": WINDOWS, "gemma3n_text": {}, "granite": {}, "qwen3_moe": {}}


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.exhaustive) for family in MORE)]
)
def test_logits_are_the_models_and_the_compilers(family: str, passes: Any) -> None:
    model = tiny(family, **{**FAMILIES, **MORE}[family])
    forward = fitting(model, IDS)
    options = Options.read(OPTIONS)
    with torch.no_grad():
        dense, shared = (
            graph.logits(*graph.run(IDS)) for graph in (forward.graph(), forward.graph(requested(options)))
        )
        torch.testing.assert_close(dense, model(input_ids=IDS, use_cache=False).logits, atol=1e-5, rtol=1e-4)
        compiled = torch.compile(model, backend=passes(**OPTIONS))(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(shared, compiled, atol=1e-5, rtol=1e-4)
    assert (shared - dense).abs().max() > 1e-3
    assert forward.graph().head is not None
    assert all(layer.path in dict(model.named_modules()) for layer in forward.layers)
    assert [layer.ordinal for layer in forward.layers] == list(range(len(forward.layers)))


def test_taps_see_the_layers_that_may_share_and_can_change_them() -> None:
    model = tiny("gemma3_text", **WINDOWS)
    graph = fitting(model, IDS).graph(requested(Options.read({**OPTIONS, "share": "FS"})))
    seen = []

    def tap(layer: int, call: Any, out: Tensor, chosen: Tokens | None) -> Tensor:
        seen.append((layer, out.shape, chosen is not None))
        return torch.zeros_like(out)

    with torch.no_grad():
        before, after = graph.run(IDS)[0], graph.run(IDS, tap)[0]
    shape = (1, 4, 40, 16)
    assert seen == [(0, shape, False), (1, shape, True)]
    assert not torch.equal(before, after)


def test_a_layer_that_chooses_for_itself_is_seen_once() -> None:
    graph = fitting(tiny("llama"), IDS).graph(requested(Options.read({**OPTIONS, "share": "off"})))
    seen = []
    with torch.no_grad():
        graph.run(IDS, lambda layer, call, out, chosen: seen.append((layer, chosen is not None)) or out)
    assert seen == [(0, True), (1, True)]


class Live(TorchDispatchMode):
    """Counts elements of memory: most of tensors of `least` and more at a time, and of the largest one."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.now, self.most, self.largest = least, 0, 0, 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes() // tensor.itemsize
        self.largest = max(self.largest, size)
        if size < self.least or storage.data_ptr() in self._seen:
            return
        self._seen.add(storage.data_ptr())
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, storage.data_ptr(), size)

    def _freed(self, pointer: int, size: int) -> None:
        self._seen.discard(pointer)
        self.now -= size


LONG = torch.randint(1, 100, (1, 512), generator=torch.Generator().manual_seed(6))
SQUARE = LONG.shape[1] ** 2


def mixed(anchors: int, sets: int) -> Request:
    """Layers that attend to what they choose, each by the mass of all up to itself."""

    def pools(layers: Any) -> tuple[Pool, ...]:
        def weight(pool: int, source: int) -> Weights:
            return tuple(tuple(1.0 + h * n + pool + source for h in range(4)) for n in range(sets))

        return tuple(
            Pool(
                anchor=i,
                topk=32,
                sources={j: weight(i, j) for j in range(i + 1)},
                members=(i,),
                rows={i: tuple(range(sets))} if sets > 1 else {},
                power=0.5,
            )
            for i in range(anchors)
        )

    return Request(pools, prompts=True)


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "BLOCK", SQUARE // 4)


@pytest.mark.usefixtures("_small_blocks")
def test_mass_of_long_sequences_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is held up to a size, with one sum a later selection; above that there are some rows of it only."""
    anchors, sets = 6, 2
    graph = fitting(tiny("llama", num_hidden_layers=anchors), LONG).graph(mixed(anchors, sets))
    with torch.no_grad(), Live(SQUARE) as live:
        held, _ = graph.run(LONG)
    assert sets * anchors * SQUARE <= live.most <= 3 * sets * anchors * SQUARE
    monkeypatch.setattr(attend, "HELD", 0)
    with torch.no_grad(), Live(SQUARE) as live:
        again, _ = graph.run(LONG)
    assert live.largest < SQUARE
    torch.testing.assert_close(again, held, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("family", ["deepseek_v32", "deepseek_v3"])
def test_attention_to_long_sequences_is_never_whole(family: str) -> None:
    """Selections of a model's own, all that an index may say, and values that are not as wide as keys."""
    settings = {"index_n_heads": 4} if family == "deepseek_v32" else {}
    graph = fitting(tiny(family, **settings), LONG).graph()
    for index_tap in (None, lambda *_: None):
        with torch.no_grad(), Live(SQUARE) as live:
            graph.run(LONG, index_tap=index_tap)
        assert live.largest < SQUARE


class Bare(nn.Module):
    """A decoder that is not Hugging Face's: ids in, logits out, which are bounded after the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(3))
        self.head = nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).flatten(2)
        return torch.tanh(self.head(x) / 3) * 3


def test_any_decoder_will_do() -> None:
    model = Bare()
    ids = IDS % 50
    forward = fitting(torch.compile(model), ids)
    graph = forward.graph()
    assert graph.head is not None
    with torch.no_grad():
        hidden, others = graph.run(ids)
        assert hidden.shape == (1, 40, 16)
        torch.testing.assert_close(graph.logits(hidden[:, 7:9], others), model(ids)[:, 7:9])


class Mixed(nn.Module):
    """Layers whose queries are made otherwise, each in a way that an index may not begin with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(5))
        self.adapter = nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(1, 2, 1, 40))
        self.head = nn.Linear(16, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x, at = self.embed(ids), torch.arange(ids.shape[1])
        causal = at[None] <= at[:, None]
        ahead = causal | (at < 4)[None]
        added = torch.zeros(40, 40).masked_fill(~causal, -torch.inf)
        for i, layer in enumerate(self.layers):
            q, k, v = layer(x).chunk(3, -1)
            q = q + self.adapter(x) if i == 1 else q
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
            mask = {2: ahead, 3: added + self.bias[:, :1], 4: added + self.bias}.get(i, causal)
            y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
            x = x + y.transpose(1, 2).flatten(2)
        logits: Tensor = self.head(x)
        return logits


@pytest.fixture(scope="module")
def two_masks() -> Forward:
    return fitting(Mixed(), IDS % 50)


def test_layers_that_cannot_begin_a_group_say_why(two_masks: Forward) -> None:
    why = two_masks.unable()
    assert sorted(why) == [1, 3, 4]
    assert why[1].startswith("2 products with weights make the queries of ")
    assert "is added to scores, which an index does not learn" in why[3]
    assert "differs by head, and an index has one for all" in why[4]
    with pytest.raises(OptionError, match="an index cannot begin at layer 1: 2 products with weights make"):
        two_masks.product(1)


def test_a_layer_of_another_mask_cannot_read_an_index(two_masks: Forward) -> None:
    weight, width = two_masks.product(0)
    index = Index("0", FORMS["mixture"], 0, 2)
    tensors = {"0.query": weight, "0.head": torch.zeros(2, width), "0.bias": torch.zeros(2)}
    two_masks.probe([Pool(0, 8, {}, (0, 1), index=index)], tensors)
    why = r"layer 2 cannot read an index: it stays dense, for its tokens are not .*: it has another mask"
    with pytest.raises(OptionError, match=why):
        two_masks.probe([Pool(0, 8, {}, (0, 1, 2), index=index)], tensors)


class Broken(Bare):
    """A forward that Dynamo cannot follow in one piece."""

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        torch._dynamo.graph_break()
        return x * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny("llama", num_hidden_layers=1), "1 of the model's 1 attentions .* it takes 2 at least"),
        (lambda: nn.Sequential(nn.Embedding(128, 8), nn.Linear(8, 9)), "0 of the model's 0 attentions"),
        (Broken, "is no single graph"),
    ],
)
def test_models_that_cannot_share_are_errors(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fitting(make(), IDS % 50)
