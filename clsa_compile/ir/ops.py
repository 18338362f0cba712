"""The contract ops: schemas and fakes. `ir/references.py` says what each computes.

Dimension letters, used everywhere, templates included:

    B  batch            H  query heads         Hkv  key/value heads     G  H / Hkv
    S  query rows       T  key slots           D    head width of q, k  Dv head width of v
    Hi index heads      K  selected tokens     Di   head width of the index
    N  pages of a pool  P  tokens a page       M    pages a sequence, T = M * P

`pages` int32 [B, M] says that k and v are pools of pages, [N, Hkv, P, D] and [N, Hkv, P, Dv], instead of
[B, Hkv, T, D] and [B, Hkv, T, Dv]. `ir/pages.py` says how, with an example.

All ops are functional and return fresh tensors. Indices are int32, -1 means "no token". A row that
may attend to nothing gives zeros and an lse of -inf, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

# Queries up to this many are decode: one token, or a few speculative ones.
DECODE_ROWS = 8

_LIBRARY = Library("clsa", "DEF")
_LIBRARY.define(
    "index_topk(Tensor q, Tensor k, Tensor? weight, Tensor? lse, Tensor? mask, Tensor? bounds,"
    " Tensor[] mask_inputs, SymInt topk, float scale, str score, str predicate, bool per_kv_head,"
    " Tensor? pages=None, Tensor? candidates=None) -> Tensor"
)
_LIBRARY.define(
    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor? mask, Tensor? bounds,"
    " Tensor[] mask_inputs, Tensor? sinks, float scale, float softcap, str predicate,"
    " Tensor? pages=None, int dense_below=0) -> Tensor"
)
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bounds,"
    " Tensor[] mask_inputs, Tensor? sinks, float scale, float softcap, str predicate,"
    " Tensor? pages=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "attention_mass(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor? mask, Tensor? bounds,"
    " Tensor[] mask_inputs, Tensor? sinks, float scale, float softcap, str predicate, float power,"
    " Tensor? indices=None) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "select_topk(Tensor mass, Tensor? bounds, SymInt topk, int keep_first, int keep_last) -> Tensor"
)
_LIBRARY.define(
    "mask_bounds(Tensor like, Tensor? mask, Tensor[] mask_inputs, SymInt heads, SymInt keys, str predicate)"
    " -> Tensor"
)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, h, s, _ = q.shape
    out = q.new_empty(b, s, h, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(b, h, s, dtype=torch.float32)


def _sparse_attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return _attention_fake(q, k, v)[0]


def _index_topk_fake(
    q: Tensor,
    k: Tensor,
    weight: Tensor | None,
    lse: Tensor | None,
    mask: Tensor | None,
    bounds: Tensor | None,
    mask_inputs: Sequence[Tensor],
    topk: int,
    scale: float,
    score: str,
    predicate: str,
    per_kv_head: bool,
    pages: Tensor | None = None,
    candidates: Tensor | None = None,
) -> Tensor:
    heads = k.shape[1] if per_kv_head else 1
    return q.new_empty((q.shape[0], heads, q.shape[2], topk), dtype=torch.int32)


def _attention_mass_fake(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    sizes = (q.shape[0], weight.shape[0], q.shape[2], k.shape[2])
    return _attention_fake(q, k, v)[0], q.new_empty(sizes, dtype=torch.float32)


def _select_topk_fake(mass: Tensor, bounds: Tensor | None, topk: int, *rest: Any) -> Tensor:
    return mass.new_empty((*mass.shape[:3], topk), dtype=torch.int32)


def _mask_bounds_fake(like: Tensor, *rest: Any) -> Tensor:
    return like.new_empty((like.shape[0], like.shape[2], 2), dtype=torch.int32)


_FAKES: dict[str, Callable[..., Any]] = {
    "attention": _attention_fake,
    "attention_mass": _attention_mass_fake,
    "select_topk": _select_topk_fake,
    "sparse_attention": _sparse_attention_fake,
    "index_topk": _index_topk_fake,
    "mask_bounds": _mask_bounds_fake,
}


def _reference(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from clsa_compile.ir.references import CALLABLE  # its imports take longer than all else here

        return CALLABLE[name](*args)

    return call


for _name, _fake in _FAKES.items():
    _LIBRARY.impl(_name, _reference(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"clsa::{_name}", _fake, lib=_LIBRARY)


def contract_op(target: Any) -> str | None:
    """Returns "attention", "index_topk", ... when an FX target is a contract op, else None."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "clsa":
        return None
    return target._schema.name.partition("::")[2]
