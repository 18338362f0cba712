"""A tiny trained-like model, tokens, tokenizers, and one search, made once."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clsa_compile.backend import decided
from clsa_compile.calibration import given, judging
from clsa_compile.calibration.finding import Found
from clsa_compile.calibration.graphs import Forward
from clsa_compile.calibration.searching import Asked, find
from clsa_compile.capture.dynamo import capture
from clsa_compile.config import Options
from clsa_compile.passes.pipeline import carry_out
from clsa_compile.testing import tiny

LAYERS, LENGTH = 5, 48
ASKED = Asked(topk=12, anchors=2, keep_first=2, keep_last=3)


class Tokenizer:
    """Words, digits and signs as tokens, each with the blank before it; 0 begins a text.

    With a `size` ids are hashes below it, for a model with few of them; without one texts can be read again.
    """

    def __init__(self, size: int | None = None) -> None:
        self._size = size
        self._known: dict[str, int] = {}
        self._texts: dict[int, str] = {0: ""}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        start = [0] if add_special_tokens else []
        return {"input_ids": start + [self._id(piece) for piece in re.findall(r" ?[A-Za-z]+| ?.|\n", text)]}

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._texts[i] for i in ids)

    def _id(self, piece: str) -> int:
        if self._size is not None:
            return 1 + zlib.crc32(piece.encode()) % (self._size - 1)
        number = self._known.setdefault(piece, len(self._known) + 1)
        self._texts[number] = piece
        return number


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """A tokenizer whose texts can be read again."""
    return Tokenizer()


@pytest.fixture(scope="session")
def hashes() -> Tokenizer:
    """A tokenizer for a model of 128 ids."""
    return Tokenizer(128)


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


@pytest.fixture(scope="session")
def glm() -> Callable[..., Any]:
    """Makes a small model with indexers, whose heads look at few tokens."""

    def make(**changes: Any) -> Any:
        mlp = ["dense"] * LAYERS
        made = tiny("glm_moe_dsa", num_hidden_layers=LAYERS, mlp_layer_types=mlp, **changes)
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if "q_" in name or "k_" in name:
                    weight *= 4
        return made

    return make


@pytest.fixture(scope="session")
def selecting(glm: Callable[..., Any]) -> Any:
    """A model with an indexer in each layer."""
    return glm()


@pytest.fixture(scope="session")
def uneven(glm: Callable[..., Any]) -> Any:
    """A model with indexers, the third of which selects fewer tokens than the others."""
    made = glm()
    made.model.layers[2].self_attn.indexer.index_topk = 4
    return made


class Ahead(nn.Module):
    """A decoder of four layers, the third of which reads four tokens ahead where there are enough."""

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(128, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(4))
        self.head = nn.Linear(16, 128)
        self.least = least

    def forward(self, ids: Tensor) -> Tensor:
        x, at = self.embed(ids), torch.arange(ids.shape[1])
        causal = at[None] <= at[:, None]
        for i, layer in enumerate(self.layers):
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            ahead = i == 2 and ids.shape[1] >= self.least
            mask = causal | (at < 4)[None] if ahead else causal
            y = nn.functional.scaled_dot_product_attention(q, k, v, mask)
            x = x + y.transpose(1, 2).flatten(2)
        logits: Tensor = self.head(x)
        return logits


@pytest.fixture(scope="session")
def ahead() -> type[nn.Module]:
    """What makes a decoder of which one layer stays dense, whatever is asked."""
    return Ahead


@pytest.fixture(scope="session", autouse=True)
def _captured_once(model: Any, selecting: Any, uneven: Any) -> Iterator[None]:
    """Captures these models once a length for all tests: that takes longer than all else that is done."""
    known: dict[tuple[int, int], Forward] = {}
    real = given.fitting

    def fitting(other: Any, ids: Tensor) -> Forward:
        if not any(other is one for one in (model, selecting, uneven)):
            return real(other, ids)
        key = (id(other), ids.shape[1])
        if key not in known:
            known[key] = real(other, ids)
        return known[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(given, "fitting", fitting)
        yield


@pytest.fixture
def passes() -> Callable[..., Any]:
    """Returns what makes a backend of options: the rewritten graph is run as it is, Inductor left out."""

    def make(**options: Any) -> Callable[..., Any]:
        def backend(module: Any, _: Any, **__: Any) -> Callable[..., Any]:
            captured = capture(module)
            carry_out(captured, decided(captured, Options.read(options)), (), lambda kernel: kernel)
            return captured.module.forward

        return backend

    return make


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture
def only_layer_3_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """To every judge the divergence is twice as large where layer 3 follows another one."""
    real = judging.Judge.measure

    def measured(self: Any, change: Any, *args: Any) -> Any:
        figures, pools = real(self, change, *args)
        followed = any(3 in pool.members for pool in pools)
        return [{**f, "kl": f["kl"] * (1 + followed)} for f in figures], pools

    monkeypatch.setattr(judging.Judge, "measure", measured)
