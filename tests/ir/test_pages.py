"""Paged caches: the references over pages equal those over the same keys in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clsa_compile.ir.ops import DECODE_ROWS
from clsa_compile.ir.pages import gathered, key_slots
from clsa_compile.ir.references import REFERENCES
from clsa_compile.ir.scores import LIGHTNING

OPS = ["attention", "sparse_attention", "index_topk"]
NONSENSE = torch.tensor([-1, 2**31 - 1, -(2**31), 99], dtype=torch.int32)


def first_of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def arguments(op: str, k: Tensor, v: Tensor, lengths: Tensor, s: int) -> tuple[Any, ...]:
    """Returns contract arguments without a block table; the mask allows the first `lengths` tokens."""
    b = len(lengths)
    g = torch.Generator().manual_seed(1)
    q = torch.randn(b, 4, s, k.shape[3], generator=g)
    mask = (None, None, [lengths], None, 0.3, 0.0, "kv < in0(b)")
    indices = torch.randint(0, 10**6, (b, 1, s, 4), generator=g) % lengths.view(b, 1, 1, 1)
    indices = torch.where(indices % 3 == 0, -1, indices).to(torch.int32)
    return {
        "attention": (q, k, v, *mask),
        "sparse_attention": (q, k, v, indices, *mask),
        "index_topk": (
            q, k, torch.randn(b, 4, s, generator=g), None, None, None, [lengths], 4, 0.3, LIGHTNING.text,
            "kv < in0(b)", False,
        ),
    }[op]  # fmt: skip


def pooled(page: int, lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (k, v) in order, the same as pools, and the block table, whose unused entries are nonsense."""
    g = torch.Generator().manual_seed(seed)
    b, used = len(lengths), [-(-n // page) for n in lengths]
    m, count = max(used) + 1, sum(used) + 2
    order = torch.randperm(count, generator=g).to(torch.int32)
    table = NONSENSE[torch.randint(0, 4, (b, m), generator=g)]
    pools = [torch.randn(count, page, 2, d, generator=g) for d in (8, 5)]
    plain = [torch.zeros(b, 2, m * page, d) for d in (8, 5)]
    at = 0
    for row, pages in enumerate(used):
        for entry in range(pages):
            table[row, entry] = order[at]
            for pool, x in zip(pools, plain, strict=True):
                x[row, :, entry * page : (entry + 1) * page] = pool[order[at]].transpose(0, 1)
            at += 1
    return *plain, *(pool.transpose(1, 2) for pool in pools), table


@pytest.mark.parametrize("op", OPS)
@given(
    page=st.sampled_from([1, 3, 4]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    s=st.sampled_from([1, DECODE_ROWS + 1]),
    seed=st.integers(0, 5),
)
def test_a_paged_cache_means_its_tokens_in_order(
    op: str, page: int, lengths: list[int], s: int, seed: int
) -> None:
    k, v, kp, vp, table = pooled(page, lengths, seed)
    valid = torch.tensor(lengths, dtype=torch.int32)
    wanted = REFERENCES[op](*arguments(op, k, v, valid, s))
    got = REFERENCES[op](*arguments(op, kp, vp, valid, s), table)
    torch.testing.assert_close(got, wanted)
    through_the_op = getattr(torch.ops.clsa, op)(*arguments(op, kp, vp, valid, s), pages=table)
    torch.testing.assert_close(through_the_op, wanted)


@pytest.mark.parametrize("op", OPS)
def test_fakes_take_the_batch_from_the_queries(op: str) -> None:
    _, _, kp, vp, table = pooled(4, [9, 2], 0)
    args = (*arguments(op, kp, vp, torch.tensor([9, 2]), 3), table)
    real = getattr(torch.ops.clsa, op)(*args)
    with (mode := FakeTensorMode(allow_non_fake_inputs=True)):
        fakes = (mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
        fake = getattr(torch.ops.clsa, op)(*fakes)
    assert first_of(fake).shape == first_of(real).shape
    assert first_of(fake).stride() == first_of(real).stride()


@pytest.mark.parametrize("op", OPS)
def test_the_ops_pass_torchs_own_checks(op: str) -> None:
    _, _, kp, vp, table = pooled(4, [9, 2], 0)
    args = (*arguments(op, kp, vp, torch.tensor([9, 2]), 3), table)
    target = getattr(torch.ops.clsa, op).default
    torch.library.opcheck(target, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(2, 3), "pages must be int32 .B, M., not torch.float32 of 2 dimensions"),
        (torch.zeros(2, 3, dtype=torch.int64), "not torch.int64"),
        (torch.zeros(6, dtype=torch.int32), "of 1 dimensions"),
        (torch.zeros(3, 3, dtype=torch.int32), "rows for 3 sequences, q has 2"),
    ],
)
def test_a_block_table_of_another_kind_is_refused(op: str, table: Tensor, message: str) -> None:
    _, _, kp, vp, _ = pooled(4, [9, 2], 0)
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.clsa, op)(*arguments(op, kp, vp, torch.tensor([9, 2]), 1), table)


@pytest.mark.parametrize("op", ["attention", "sparse_attention"])
def test_keys_and_values_must_be_paged_alike(op: str) -> None:
    _, _, kp, vp, table = pooled(4, [9, 2], 0)
    lengths = torch.tensor([9, 2])
    with pytest.raises(ValueError, match="pages of K hold 4 tokens, those of V 3"):
        REFERENCES[op](*arguments(op, kp, vp[:, :, :3], lengths, 1), table)
    with pytest.raises(ValueError, match="pages, V 2"):
        REFERENCES[op](*arguments(op, kp, vp[:2], lengths, 1), table)
    with pytest.raises(ValueError, match="no pages"):
        REFERENCES[op](*arguments(op, kp[:0], vp[:0], lengths, 1), table)


def test_caches_without_a_table_are_as_they_are() -> None:
    x = torch.randn(2, 3, 5, 4)
    assert gathered(x, None) is x
    assert key_slots(x, None) == 5
    assert key_slots(x, torch.zeros(2, 7, dtype=torch.int32)) == 35
