"""kernels/sparse_attention/rows.py against `sparse_attention_reference`, and what its blocks read."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.ir.pages import gathered
from clsa_compile.ir.references import sparse_attention_reference
from clsa_compile.ir.variants import Facts, select
from clsa_compile.kernels.catalog import VARIANTS
from clsa_compile.kernels.sparse_attention import gather
from clsa_compile.kernels.sparse_attention.rows import LEAST_ROWS, merged, rows_of, supports

Run = Callable[..., Any]


def near_rows(device: str, b: int, sets: int, s: int, t: int, topk: int) -> Tensor:
    """Returns indices of rows that select much the same tokens as their neighbours, some of them fewer."""
    score = torch.rand(b, sets, 1, t) + 0.2 * torch.rand(b, sets, s, t)
    order = score.argsort(-1, descending=True)[..., :topk].sort(-1).values
    kept = torch.where(torch.rand(b, sets, s, 1) < 0.3, torch.randint(0, topk + 1, (b, sets, s, 1)), topk)
    return torch.where(torch.arange(topk) < kept, order, -1).to(device, torch.int32)


def arguments(device: str, sizes: tuple[int, ...], topk: int, sets: int = 1, **given: Any) -> list[Any]:
    b, h, hkv, s, t, d, dv = sizes
    dtype = given.get("dtype", torch.float32)
    q, k, v = (
        torch.randn(*x, device=device, dtype=dtype) for x in ((b, h, s, d), (b, hkv, t, d), (b, hkv, t, dv))
    )
    indices = near_rows(device, b, sets, s, t, topk)
    sinks = torch.randn(h, device=device, dtype=dtype) * 3 if given.get("sinks") else None
    inputs, predicate = list(given.get("inputs", ())), given.get("predicate", "")
    return [
        q,
        k,
        v,
        indices,
        given.get("mask"),
        None,
        inputs,
        sinks,
        d**-0.5,
        given.get("softcap", 0.0),
        predicate,
    ]


SIZES = [
    ((1, 4, 4, 9, 60, 16, 16), 7),  # one head: 8 rows
    ((2, 6, 2, 7, 77, 16, 32), 30),  # three heads: 4 rows
    ((1, 10, 2, 5, 50, 32, 16), 50),  # five: 2 rows
    ((1, 2, 1, 8, 40, 80, 48), 33),
    ((1, 2, 2, 3, 10, 16, 16), 24),  # more asked for than there are
]
FEW = 2, 8, 2, 5, 60, 16, 16  # four heads: a block of 4 rows and one of 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("sizes", "topk"), SIZES)
def test_sizes(device: str, run: Run, judge: Any, sizes: Any, topk: int, dtype: torch.dtype) -> None:
    args = arguments(device, sizes, min(topk, sizes[4]), dtype=dtype)
    if topk > sizes[4]:
        args[3] = torch.nn.functional.pad(args[3], (0, topk - sizes[4]), value=-1)
    judge("sparse_attention")(run("sparse_attention", "rows", *args), args)


@pytest.mark.parametrize("sets", [1, 2])
def test_a_set_per_kv_head_and_rows_without_tokens(device: str, run: Run, judge: Any, sets: int) -> None:
    args = arguments(device, FEW, 12, sets)
    args[3][0, :, 1] = -1
    args[3][1, :, 2:] = -1
    judge("sparse_attention")(run("sparse_attention", "rows", *args), args)


def test_tokens_in_any_order_and_holes_among_them(device: str, run: Run, judge: Any) -> None:
    """Rows that do not ascend stand among rows that do."""
    args = arguments(device, (1, 4, 2, 8, 60, 16, 16), 12)
    args[3][0, 0, 2] = args[3][0, 0, 2].flip(0)
    args[3][0, 0, 5] = args[3][0, 0, 5][torch.randperm(12)]
    args[3][0, 0, 6, 4] = -1
    judge("sparse_attention")(run("sparse_attention", "rows", *args), args)


@pytest.mark.parametrize(
    "predicate", ["kv <= q + 40", "(kv <= q + in0(b)) & (kv > q + in0(b) - 30)", "h < 2"]
)
@pytest.mark.parametrize(("sinks", "softcap"), [(False, 0.0), (True, 5.0)])
def test_predicates_sinks_and_softcap(
    device: str, run: Run, judge: Any, predicate: str, sinks: bool, softcap: float
) -> None:
    inputs = (torch.tensor([40, 20], device=device),) if "in0" in predicate else ()
    given = {"predicate": predicate, "inputs": inputs, "sinks": sinks, "softcap": softcap}
    args = arguments(device, FEW, 20, **given)
    judge("sparse_attention")(run("sparse_attention", "rows", *args), args)


@pytest.mark.parametrize("shape", [(1, 1, 1, 60), (2, 1, 5, 60), (2, 8, 5, 60), (1, 8, 1, 1), (5, 60)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_mask_tensors(device: str, run: Run, judge: Any, shape: Any, kind: str) -> None:
    mask = torch.rand(shape, device=device) < 0.7
    mask.view(-1)[0] = True
    if kind == "additive":
        mask = torch.where(mask, torch.randn(shape, device=device), -math.inf)
    args = arguments(device, FEW, 20, mask=mask)
    judge("sparse_attention")(run("sparse_attention", "rows", *args), args)


def test_strided_indices_keys_and_pages(device: str, run: Run, judge: Any) -> None:
    args = arguments(device, (2, 8, 2, 5, 64, 16, 16), 20)
    args[3] = args[3].transpose(2, 3).contiguous().transpose(2, 3)
    pages = torch.randperm(16, device=device).to(torch.int32).view(2, 8)
    for at in (1, 2):
        pool = torch.empty(16, 8, 2, 16, device=device)
        pool[pages.long().view(-1)] = args[at].transpose(1, 2).reshape(16, 8, 2, 16)
        args[at] = pool.transpose(1, 2)
    paged = [*args, pages]
    plain = [*args]
    plain[1], plain[2] = gathered(args[1], pages), gathered(args[2], pages)
    expected = sparse_attention_reference(*plain)
    torch.testing.assert_close(run("sparse_attention", "rows", *paged), expected, atol=1e-5, rtol=1e-4)


def test_rows_of_few_tokens_are_gathered(device: str, run: Run, judge: Any) -> None:
    args = arguments(device, (1, 4, 2, 9, 60, 16, 16), 12, predicate="kv <= q + 4")
    args[3] = torch.where(args[3] <= torch.arange(9, device=device).view(9, 1) + 4, args[3], -1)
    args[3][:, :, 2] = -1  # reads all of its 7 tokens nonetheless
    whole = [*args, None, 20]
    judge("sparse_attention")(run("sparse_attention", "rows", *whole), whole)


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_each_token_of_a_block_is_there_once_with_its_readers(device: str, rows: int) -> None:
    indices = near_rows(device, 1, 2, 11, 50, 13)
    tokens, readers, counts = merged(indices, rows, lambda kernel: kernel)
    blocks = -(-11 // rows)
    for line, count in enumerate(counts.tolist()):
        first = line % blocks * rows
        chosen = indices.flatten(0, 1)[line // blocks, first : first + rows].tolist()
        expected = {
            token: sum(1 << r for r, row in enumerate(chosen) if token in row)
            for token in {token for row in chosen for token in row} - {-1}
        }
        found = dict(zip(tokens[line, :count].tolist(), readers[line, :count].tolist(), strict=True))
        assert found == expected
        assert count == len(expected)


def test_what_takes_blocks_and_what_does_not() -> None:
    facts = Facts(
        "sparse_attention", "cuda", torch.bfloat16, 1, 24, 8, 4096, 8192, 128, 128, 64, *[False] * 4
    )
    assert supports(facts).ok
    assert [rows_of(group) for group in (1, 2, 3, 4, 5, 8)] == [8, 8, 4, 4, 2, 2]

    def variant(**changes: Any) -> str:
        found, _ = select(VARIANTS, replace(facts, **changes))
        assert found is not None
        return found.name

    assert variant() == variant(S=None) == "rows"
    assert variant(S=LEAST_ROWS - 1) == "gather"
    assert variant(H=128, Hkv=1) == "gather"
    assert gather.GATHER in VARIANTS
