"""Contract ops called by themselves."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from clsa_compile.dispatch import _made_current, kernels, run
from clsa_compile.errors import MissingTritonError
from clsa_compile.ir.scores import DOT_PRODUCT
from clsa_compile.ir.variants import SUPPORTED, Facts, Support, Variant

SCALE = 0.25


def operands(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 1, 32, device=device, dtype=dtype)
    return q, *(torch.randn(2, 2, 50, 32, device=device, dtype=dtype) for _ in range(2))


def recorded(seen: list[Any], support: Support = SUPPORTED) -> Variant:
    def launch(*args: Any, wrap: Any) -> str:
        seen.append(wrap("kernel"))
        return "launched"

    def supports(facts: Facts) -> Support:
        seen.append(facts)
        return support

    return Variant("attention", "one", supports, launch)


def test_a_variant_that_can_runs() -> None:
    q, k, v = operands()
    seen: list[Any] = []
    args = (q, k, v, None, None, [], None, SCALE, 0.0, "")
    assert run("attention", (recorded(seen),), *args) == "launched"
    facts, kernel = seen
    assert kernel == "kernel", "not wrapped for tracing"
    assert (facts.B, facts.H, facts.Hkv, facts.S, facts.T, facts.D, facts.Dv) == (2, 4, 2, 1, 50, 32, 32)
    assert facts.lse_used


def test_the_reference_runs_where_no_variant_can(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = operands()
    args = (q, k, v, None, None, [], None, SCALE, 0.0, "")
    refusing = recorded([], Support(False, "too odd"))
    with caplog.at_level("DEBUG", "clsa_compile"):
        out, _ = run("attention", (refusing,), *args)
    torch.testing.assert_close(out, torch.ops.clsa.attention(*args)[0])
    assert "one: too odd" in caplog.text


def test_kernels_are_launched_where_their_operands_are(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    for device in ("cpu", "cuda:0", "cuda:1"):
        with _made_current(torch.device(device)):
            pass
    assert entered == [torch.device("cuda:1")]


@pytest.mark.parametrize(("b", "t"), [(0, 50), (2, 0)])
def test_nothing_is_left_to_the_reference(b: int, t: int, caplog: pytest.LogCaptureFixture) -> None:
    q, k = torch.randn(b, 4, 1, 32), torch.randn(b, 2, t, 32)
    with caplog.at_level("DEBUG", "clsa_compile"):
        index = run("index_topk", kernels(), q, k, *[None] * 4, [], 8, SCALE, DOT_PRODUCT.text, "", False)
    assert index.shape == (b, 1, 1, 8)
    assert (index == -1).all()
    assert "decode: no sequence or no key" in caplog.text


def test_numbers_of_two_kinds_are_left_to_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = operands()
    with caplog.at_level("DEBUG", "clsa_compile"):
        run("index_topk", kernels(), q, k.half(), *[None] * 4, [], 8, SCALE, DOT_PRODUCT.text, "", False)
        with pytest.raises(RuntimeError, match="dtype"):
            run("attention", kernels(), q, k.half(), v.half(), None, None, [], None, SCALE, 0.0, "")
    assert caplog.text.count("decode: queries, keys and values are not of one dtype") == 2


def test_without_triton_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "triton", None)
        with pytest.raises(MissingTritonError, match="pip install triton"):
            kernels()


@pytest.mark.gpu
def test_ops_on_cuda_run_kernels() -> None:
    q, k, v = operands("cuda", torch.float16)
    index = torch.ops.clsa.index_topk(q, k, None, None, None, None, [], 8, SCALE, DOT_PRODUCT.text, "", False)
    out = torch.ops.clsa.sparse_attention(q, k, v, index, None, None, [], None, SCALE, 0.0, "")
    q, k, v = (x.cpu().float() for x in (q, k, v))
    want = torch.ops.clsa.index_topk(q, k, None, None, None, None, [], 8, SCALE, DOT_PRODUCT.text, "", False)
    assert torch.equal(index.cpu(), want)
    exact = torch.ops.clsa.sparse_attention(q, k, v, want, None, None, [], None, SCALE, 0.0, "")
    torch.testing.assert_close(out.cpu().float(), exact, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
def test_ops_on_cuda_read_paged_caches() -> None:
    q, k, v = operands("cuda", torch.float16)
    # An engine's pool [N, P, Hkv, D] of pages of 10 tokens; sequence b holds every second page.
    pools = [x.view(2, 2, 5, 10, 32).permute(2, 0, 3, 1, 4).reshape(10, 10, 2, 32) for x in (k, v)]
    kp, vp = (pool.transpose(1, 2) for pool in pools)
    pages = torch.arange(10, device="cuda", dtype=torch.int32).view(5, 2).T
    head = (None, None, None, None, [], 8, SCALE, DOT_PRODUCT.text, "", False)
    tail = (None, None, [], None, SCALE, 0.0, "")
    index = torch.ops.clsa.index_topk(q, k, *head)
    assert torch.equal(torch.ops.clsa.index_topk(q, kp, *head, pages), index)
    for paged, plain in (
        (
            torch.ops.clsa.sparse_attention(q, kp, vp, index, *tail, pages=pages),
            torch.ops.clsa.sparse_attention(q, k, v, index, *tail),
        ),
        (torch.ops.clsa.attention(q, kp, vp, *tail, pages)[0], torch.ops.clsa.attention(q, k, v, *tail)[0]),
    ):
        torch.testing.assert_close(paged, plain, atol=2e-3, rtol=2e-3)
    prompt = q.repeat(1, 1, 20, 1)
    paged, plain = (
        torch.ops.clsa.attention(prompt, kp, vp, *tail, pages),
        torch.ops.clsa.attention(prompt, k, v, *tail),
    )
    torch.testing.assert_close(paged[0], plain[0], atol=2e-3, rtol=2e-3)


def test_a_block_table_must_fit_the_cache() -> None:
    q, k, v = operands()
    args = (q, k, v, None, None, [], None, SCALE, 0.0, "")
    with pytest.raises(ValueError, match="int32"):
        run("attention", (recorded([]),), *args, torch.zeros(2, 3))
    table = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="pages of K hold 50 tokens, those of V 40"):
        run("attention", (recorded([]),), q, k, v[:, :, :40], *args[3:], table)


def test_facts_of_a_paged_cache() -> None:
    q, k, v = operands()
    seen: list[Any] = []
    args = (q, k, v, None, None, [], None, SCALE, 0.0, "", torch.zeros(2, 3, dtype=torch.int32))
    assert run("attention", (recorded(seen),), *args) == "launched"
    assert seen[0].paged
    assert (seen[0].B, seen[0].T) == (2, 150)
