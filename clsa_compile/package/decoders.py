"""Decoders: a Hugging Face model as two programs, for prompts and for single tokens, with caches as inputs.

A static cache's tensors become inputs that the programs write in place, and so does the one number of tokens
that they hold; Hugging Face counts it once a layer. Layers with a window get caches of full length, which
their masks cut: a ring buffer's layout depends on a length that Python would have to know.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from clsa_compile.errors import ExportError
from clsa_compile.package.manifest import Decoding, Input

__all__ = ["Decoder", "Traced", "is_decoder"]

# Example sizes: unlike each other, so that none is taken for another; torch takes 0 and 1 for constants.
_BATCH, _PROMPT = 3, 7
# Tokens that a static cache holds beyond what a selection takes, while a program is traced.
_ROOM = 16
_MOST_ROWS = 1 << 10


@dataclass(frozen=True, slots=True)
class Traced:
    """A module to export, with example arguments and what may vary among their sizes."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    inner: str = ""


def is_decoder(model: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Tells whether a call is one of a Hugging Face decoder on tokens, with a static cache or none."""
    ids = args[0] if args else kwargs.get("input_ids")
    can_generate = getattr(model, "can_generate", None)
    if not isinstance(model, nn.Module) or not callable(can_generate) or kwargs.get("use_cache") is False:
        return False
    return bool(can_generate()) and isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()


class Decoder:
    """A decoder's two programs. Raises ExportError for a model whose caches are not static tensors.

    `given` is what may vary: "batch", "prompt" and "cache", each a number that is fixed, or (least, most).
    """

    def __init__(self, model: Any, args: Sequence[Any], kwargs: dict[str, Any], given: Any) -> None:
        known = {"input_ids", "past_key_values", "attention_mask", "use_cache", "logits_to_keep"}
        if unknown := sorted(set(kwargs) - known):
            raise ExportError(
                "a decoder is exported from input_ids, past_key_values and attention_mask, not "
                f"{unknown[0]!r}: its programs make positions by themselves"
            )
        self.model = model
        self.device = next(model.parameters()).device
        self.is_padded = kwargs.get("attention_mask") is not None
        self._sizes = _Sizes.of(model.config, kwargs.get("past_key_values"), given)
        self._template = _primed(model, self._sizes.cache)
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    @contextmanager
    def exportable(self) -> Iterator[None]:
        """Has experts multiply in a way that native code can, while programs are made.

        Hugging Face groups tokens by expert with an op of bfloat16 alone, and with Python for other dtypes.
        """
        choose = getattr(self.model, "set_experts_implementation", None)
        before = getattr(self.model.config, "_experts_implementation", None)
        if choose is None or before != "grouped_mm" or self.model.dtype == torch.bfloat16:
            yield
            return
        choose("batched_mm")
        try:
            yield
        finally:
            choose(before)

    def traced(self, name: str) -> Traced:
        """Returns "prefill" or "decode" to export."""
        sizes = self._sizes
        rows = sizes.prompt if name == "prefill" else 1
        ids = torch.zeros(sizes.batch, rows, dtype=torch.long, device=self.device)
        caches = [self._made(value, sizes.batch) for value in _buffers(self._template)]
        args: tuple[Any, ...] = (ids, caches, torch.zeros((), dtype=torch.long, device=self.device))
        dims = sizes.dims
        shapes: list[Any] = [
            _varying({0: dims["batch"], 1: dims["prompt"] if rows > 1 else None}),
            [_varying({0: dims["batch"], value.dim() - 2: dims["cache"]}) for value in caches],
            None,
        ]
        if self.is_padded:
            args = (*args, torch.zeros(sizes.batch, dtype=torch.long, device=self.device))
            shapes.append(_varying({0: dims["batch"]}))
        module = _Program(self.model, self._template).eval()
        return Traced(module, args, {}, tuple(shapes), inner="model")

    def decoding(self) -> Decoding:
        """Returns how the caches look."""
        found = []
        for name, value in _named_buffers(self._template):
            sizes: list[int | str] = list(value.shape)
            sizes[0], sizes[-2] = "B", "T"
            found.append(Input(name, str(value.dtype).removeprefix("torch."), tuple(sizes)))
        return Decoding(tuple(found), self.is_padded, self.vocabulary)

    def _made(self, like: Tensor, batch: int) -> Tensor:
        return torch.zeros((batch, *like.shape[1:]), dtype=like.dtype, device=self.device)


def _varying(dims: dict[int, Any]) -> dict[int, Any]:
    return {axis: dim for axis, dim in dims.items() if dim is not None}


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Example sizes of a batch, a prompt and a cache, and a dimension where one may vary."""

    batch: int
    prompt: int
    cache: int
    dims: dict[str, Any]

    @classmethod
    def of(cls, config: Any, cache: Any, given: Any) -> _Sizes:
        text = config.get_text_config()
        least = 1 + max(int(getattr(text, "index_topk", 0) or 0), 1)
        longest = max(int(getattr(text, "max_position_embeddings", 0) or 0), least + _ROOM)
        ranges: dict[str, Any] = {
            "batch": (1, _MOST_ROWS),
            "prompt": (2, longest),
            "cache": (least, max(longest, int(getattr(cache, "max_cache_len", 0) or 0))),
        }
        if given is not None and (not isinstance(given, dict) or set(given) - set(ranges)):
            raise ExportError(
                f"dynamic_shapes of a decoder is {given!r}; give a dict with 'batch', 'prompt' and 'cache', "
                "each a number that is fixed or a pair (least, most)"
            )
        ranges |= given or {}
        letters = {"batch": "B", "prompt": "S", "cache": "T"}
        examples = {"batch": _BATCH, "prompt": _PROMPT, "cache": least + _ROOM}
        dims = {}
        for name, value in ranges.items():
            examples[name], dims[name] = _dim(name, letters[name], value, examples[name])
        return cls(dims=dims, **examples)


def _dim(name: str, letter: str, value: Any, example: int) -> tuple[int, Any]:
    """Returns an example size, and a dimension where it may vary. Raises ExportError."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value, None
    fits = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(n, int) for n in value)
    if not fits or not 0 < value[0] < value[1]:
        raise ExportError(
            f"dynamic_shapes[{name!r}] is {value!r}; give a number that is fixed, or a pair (least, most)"
        )
    low, high = value
    return min(max(example, low, 2), high), Dim(letter, min=low, max=high)


class _Program(nn.Module):
    """One forward of a decoder over caches that are arguments; returns the last position's logits [B, V].

    Takes ids [B, S], caches [B, H, T, D] or [B, T, D], the number of tokens that they hold (int64, written),
    and where the decoder was exported with an attention mask the padding tokens before each row [B].
    """

    def __init__(self, model: Any, template: Any) -> None:
        super().__init__()
        self.model = model
        self._template = template
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(
        self, ids: Tensor, caches: list[Tensor], length: Tensor, padding: Tensor | None = None
    ) -> Tensor:
        """Runs the decoder once."""
        batch, rows = ids.shape
        slots = torch.arange(rows, device=ids.device) + length
        settings: dict[str, Any] = {"logits_to_keep": 1} if self._takes_rows else {}
        if padding is None:
            positions = slots[None].expand(batch, rows)
        else:
            positions = (slots[None] - padding[:, None]).clamp(min=0)
            every = torch.arange(caches[0].shape[-2], device=ids.device)
            settings["attention_mask"] = every[None] >= padding[:, None]
        logits: Tensor = self.model(
            input_ids=ids,
            past_key_values=_filled(self._template, caches, length),
            position_ids=positions,
            use_cache=True,
            **settings,
        ).logits
        length.add_(rows)
        return logits[:, -1]


def _primed(model: Any, length: int) -> Any:
    """Returns a static cache of one sequence that has its tensors, each of full length."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    cache: Any = StaticCache(config=model.config, max_cache_len=length)
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "is_sliding", False):
            cache.layers[i] = StaticLayer(max_cache_len=length)
        elif not isinstance(layer, StaticLayer):
            raise ExportError(
                f"layer {i} of this {model.config.model_type} keeps a {type(layer).__name__}, which is no "
                "static cache of keys and values"
            )
    with torch.no_grad():
        model(
            torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device), past_key_values=cache
        )
    return cache


def _named_buffers(cache: Any) -> list[tuple[str, Tensor]]:
    """Returns a cache's tensors by name, "0.keys" that of the first layer; lengths are none of them."""
    return [
        (f"{i}.{name}", value)
        for i, layer in enumerate(cache.layers)
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and value.dim() >= 3
    ]


def _buffers(cache: Any) -> list[Tensor]:
    return [value for _, value in _named_buffers(cache)]


def _filled(template: Any, caches: Sequence[Tensor], length: Tensor) -> Any:
    """Returns a cache like another one, over given tensors; each layer counts by itself, from `length`."""
    filled = copy.copy(template)
    given = iter(caches)
    filled.layers = []
    for like in template.layers:
        layer = copy.copy(like)
        for name, value in vars(like).items():
            if not isinstance(value, Tensor):
                continue
            setattr(layer, name, next(given) if value.dim() >= 3 else length.clone())
        if any(value.dim() >= 3 for value in vars(like).values() if isinstance(value, Tensor)):
            layer.max_cache_len, layer.batch_size = layer.keys.shape[2], layer.keys.shape[0]
        filled.layers.append(layer)
    return filled
