"""Merging splits by the last program to arrive, against the kernel `combine` and over many launches."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from clsa_compile.kernels import launch
from clsa_compile.kernels.dense_attention import decode
from clsa_compile.kernels.launch import Ending, counters, merges_inside, one_counter_buffer
from clsa_compile.kernels.offline import Recorder
from clsa_compile.kernels.sparse_attention import gather

Run = Callable[..., Any]
NAMES = {"attention": "decode", "sparse_attention": "gather"}


def operands(
    op: str,
    device: str,
    sizes: tuple[int, int, int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    sinks: bool = False,
    softcap: float = 0.0,
    latent: bool = False,
    predicate: str = "",
    inputs: tuple[Tensor, ...] = (),
) -> list[Any]:
    """Returns the arguments of a contract op; a sparse one selects every second token, none of the last."""
    b, h, hkv, s, t, d, dv = sizes
    q = torch.randn(b, h, s, d, device=device, dtype=dtype)
    k = torch.randn(b, hkv, t, d, device=device, dtype=dtype)
    v = k[..., :dv] if latent else torch.randn(b, hkv, t, dv, device=device, dtype=dtype)
    sink = torch.randn(h, device=device, dtype=dtype) * 3 if sinks else None
    tail = [None, None, list(inputs), sink, d**-0.5, softcap, predicate]
    if op == "attention":
        return [q, k, v, *tail]
    chosen = torch.arange(0, t, 2, device=device, dtype=torch.int32)
    chosen = torch.where(chosen < 3 * t // 4, chosen, -1)
    return [q, k, v, chosen.expand(b, 1, s, -1), *tail]


def paged(arguments: list[Any], page: int) -> list[Any]:
    """Returns the same call over pools of pages, the last page first."""

    def pool(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1).flip(0)

    q, k, v, *rest = arguments
    count = k.shape[0] * k.shape[2] // page
    pages = torch.arange(count - 1, -1, -1, device=k.device, dtype=torch.int32)
    return [q, pool(k), pool(v), *rest, pages.view(k.shape[0], -1)]


def results(op: str, run: Run, arguments: list[Any]) -> tuple[Tensor, ...]:
    result = run(op, NAMES[op], *arguments)
    return result if isinstance(result, tuple) else (result,)


def split(patch: pytest.MonkeyPatch, splits: int) -> None:
    """Has every launch split its keys over `splits` programs, and the last of them merge."""
    for module in (decode, gather):
        plan = module.plan
        patch.setattr(module, "plan", lambda *of, plan=plan: (splits, *plan(*of)[1:]))
    patch.setattr(launch, "MERGED_SUMS", 2**20)


def check(
    op: str, run: Run, judge: Any, arguments: list[Any], patch: pytest.MonkeyPatch, splits: int = 4
) -> None:
    """Asserts that the last program computes what `combine` does, twice with one buffer of counters."""
    split(patch, splits)
    with one_counter_buffer() as buffers:
        merged, again = results(op, run, arguments), results(op, run, arguments)
        (held,) = buffers.values()
        buffers.clear()
        patch.setattr(launch, "MERGED_SUMS", 0)
        combined = results(op, run, arguments)
        assert not buffers, "`combine` needs no counters"
    assert held.eq(0).all()
    # The interpreter has one order of fewer than 8 sums. On a chip it is the layout's, not that of `combine`.
    exact = splits < 8 and not merged[0].is_cuda
    for one, same, other in zip(merged, again, combined, strict=True):
        assert torch.equal(one, same)
        error = 0.0 if exact else 4 * torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=error, atol=error)
    judge(op)(merged if op == "attention" else merged[0], tuple(arguments))


SIZES = [
    (1, 4, 2, 1, 200, 32, 32),
    (2, 6, 2, 3, 160, 16, 32),
    (1, 3, 3, 1, 130, 80, 48),
    (1, 2, 1, 8, 100, 24, 16),
]


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("splits", [2, 4, 16])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_last_program_merges_as_combine_does(
    device: str, run: Run, judge: Any, op: str, sizes: Any, splits: int, monkeypatch: Any
) -> None:
    dtype = torch.float16 if splits == 2 else torch.float32
    check(op, run, judge, operands(op, device, sizes, dtype), monkeypatch, splits)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_sinks_and_softcap(
    device: str, run: Run, judge: Any, op: str, sinks: bool, softcap: float, monkeypatch: Any
) -> None:
    args = operands(op, device, (2, 4, 2, 2, 160, 32, 16), sinks=sinks, softcap=softcap)
    check(op, run, judge, args, monkeypatch)


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("valid", [0, 1, 50])
def test_splits_and_rows_that_see_nothing(
    device: str, run: Run, judge: Any, op: str, valid: int, monkeypatch: Any
) -> None:
    lengths = torch.tensor([valid, 160], device=device, dtype=torch.int32)
    sizes = (2, 4, 2, 2, 160, 32, 32)
    args = operands(op, device, sizes, predicate="kv < in0(b)", inputs=(lengths,), sinks=valid == 1)
    check(op, run, judge, args, monkeypatch)


@pytest.mark.parametrize("op", NAMES)
def test_what_scratch_held_before_is_not_used(device: str, run: Run, op: str, monkeypatch: Any) -> None:
    split(monkeypatch, 4)
    lengths = torch.tensor([3], device=device, dtype=torch.int32)
    args = operands(op, device, (1, 4, 2, 1, 200, 32, 32), predicate="kv < in0(b)", inputs=(lengths,))
    expected = results(op, run, args)
    original = launch.split_scratch

    def dirty(*of: Any) -> dict[str, Tensor]:
        return {name: x.fill_(math.nan) for name, x in original(*of).items()}

    monkeypatch.setattr(launch, "split_scratch", dirty)
    for one, other in zip(results(op, run, args), expected, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("heads", [3, 40])
def test_latent_rows(device: str, run: Run, judge: Any, op: str, heads: int, monkeypatch: Any) -> None:
    """Many heads go in blocks, each with a counter of its own."""
    args = operands(op, device, (2, heads, 1, 1, 140, 576, 512), torch.float16, latent=True)
    check(op, run, judge, args, monkeypatch)


@pytest.mark.parametrize("op", NAMES)
def test_paged_caches(device: str, run: Run, op: str, monkeypatch: Any) -> None:
    split(monkeypatch, 4)
    plain = operands(op, device, (2, 4, 2, 1, 160, 32, 16), sinks=True)
    with one_counter_buffer() as buffers:
        expected = results(op, run, plain)
        for one, other in zip(results(op, run, paged(plain, 16)), expected, strict=True):
            assert torch.equal(one, other)
    (held,) = buffers.values()
    assert held.eq(0).all()


def test_nan_reaches_its_row_only(device: str, run: Run, monkeypatch: Any) -> None:
    split(monkeypatch, 4)
    args = operands("attention", device, (1, 4, 2, 1, 100, 32, 32))
    args[0][0, 1] = math.nan
    out, _ = results("attention", run, args)
    assert out[0, 1].isnan().all()
    assert not out[0, [0, 2, 3]].isnan().any()


# --- on the chip only: programs that run at the same time ---


@pytest.mark.gpu
@pytest.mark.parametrize("op", NAMES)
@pytest.mark.parametrize("sizes", [(1, 24, 8, 1, 8192, 128, 128), (33, 24, 8, 1, 4096, 128, 128)])
def test_100_launches_give_one_result(run: Run, judge: Any, op: str, sizes: Any) -> None:
    torch.manual_seed(0)
    args = operands(op, "cuda", sizes, torch.bfloat16)
    with one_counter_buffer() as buffers:
        expected = results(op, run, args)
        for _ in range(100):
            for one, other in zip(results(op, run, args), expected, strict=True):
                assert torch.equal(one, other)
    (held,) = buffers.values()
    assert held.eq(0).all()
    judge(op)(expected if op == "attention" else expected[0], tuple(args))


@pytest.mark.gpu
@pytest.mark.parametrize("op", NAMES)
def test_launches_of_a_cuda_graph_share_their_counters(run: Run, op: str) -> None:
    """Different sizes one after another, as layers are, and the graph again and again."""
    torch.manual_seed(0)
    calls = [operands(op, "cuda", (b, 24, 8, 1, 8192, 128, 128), torch.bfloat16) for b in (1, 4, 2)]
    with one_counter_buffer() as buffers:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = [results(op, run, args) for args in calls]
        side.synchronize()
        (held,) = buffers.values()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = [results(op, run, args) for _ in range(10) for args in calls]
        assert all(x is held for x in buffers.values())
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    assert held.eq(0).all()
    for i, tensors in enumerate(got):
        for one, other in zip(tensors, expected[i % 3], strict=True):
            assert torch.equal(one, other)


# --- the launches, without running them ---


def test_few_sums_are_merged_inside() -> None:
    assert not merges_inside(1, 4, 128), "nothing to merge"
    assert merges_inside(32, 3, 128)
    assert not merges_inside(64, 3, 128)
    assert not merges_inside(16, 16, 512)


@pytest.mark.parametrize(("splits", "launches"), [(1, 0), (2, 0), (64, 1)])
def test_only_what_is_not_merged_inside_takes_a_second_launch(splits: int, launches: int) -> None:
    q, out = torch.empty(1, 24, 1, 128, device="meta"), torch.empty(1, 1, 24, 128, device="meta")
    ending, recorder = Ending(splits, 3, 8, q, out, None, None), Recorder()
    args = ending.arguments()
    ending.finish(args, recorder)
    assert len(recorder.launches) == launches
    assert ("counters_ptr" in args) == ending.merged == (splits == 2)
    assert ("out_ptr" in args) == (not launches)
    assert ending.context == {"direct": splits == 1, "merged": splits == 2, "sinks": False}


def test_counters_are_fresh_zeros_unless_they_are_shared() -> None:
    like = torch.ones(2)
    assert counters(3, like).tolist() == [0, 0, 0]
    assert counters(3, like).dtype == torch.int32
    with one_counter_buffer() as buffers:
        assert counters(3, like) is counters(2, like)
        assert len(counters(5, like)) == 5, "it grows"
        assert len(buffers) == 1
    assert counters(3, like) is not counters(3, like)


class H100:
    """Just enough of a driver for Triton to write its first intermediate code."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def test_inductor_gives_all_launches_the_same_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the buffer before each launch would cost what the merge saves."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(type(triton.runtime.driver), "active", H100())
    mode, seen = FakeTensorMode(), []
    with mode:
        args = operands("sparse_attention", "cpu", (1, 24, 8, 1, 8192, 128, 128), torch.bfloat16)

        def layers(q: Tensor, *rest: Tensor) -> tuple[Tensor]:
            with one_counter_buffer() as buffers:
                buffers[q.device] = torch.zeros(8, dtype=torch.int32, device=q.device)
                for _ in range(3):
                    q = gather.launch(q * 2, *rest, *args[4:], wrap=torch.library.wrap_triton)
            return (q,)

        module = make_fx(layers, pre_dispatch=True, tracing_mode="real")(*args[:4])

    def inner(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
        with V.set_fake_mode(mode):
            post_grad_passes(graph, True)
        seen.append(graph)
        return graph.forward

    with torch.no_grad():
        aot_module_simplified(
            module,
            args[:4],
            fw_compiler=inner,
            inference_compiler=inner,
            decompositions=select_decomp_table(),
        )
    (graph,) = seen
    launches = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
    assert [n.target.__name__ for n in launches] == ["triton_kernel_wrapper_mutation"] * 3
    (zeros,) = {n.kwargs["kwargs"]["counters_ptr"] for n in launches}
    assert re.match(r"aten\.(full|zeros)", str(zeros.target))
