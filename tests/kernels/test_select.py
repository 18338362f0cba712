"""kernels/index_topk/select.py against a stable sort, on scores chosen to break it."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clsa_compile.kernels.index_topk.select import padded, segments, select

FORBIDDEN = -math.inf


def expected_selection(scores: Tensor, topk: int) -> Tensor:
    """Returns what the contract asks for, by a stable sort of the whole row."""
    missing = max(0, topk - scores.shape[-1])
    filled = torch.nn.functional.pad(scores, (0, missing), value=FORBIDDEN)
    values, order = torch.sort(filled, dim=-1, descending=True, stable=True)
    last = torch.iinfo(torch.int32).max
    order = torch.where(values[..., :topk] == FORBIDDEN, last, order[..., :topk]).sort(-1).values
    return torch.where(order == last, -1, order).to(torch.int32)


def selection(scores: Tensor, topk: int, bounds: Tensor | None = None, nt: int = 0) -> Tensor:
    """Runs the kernels on scores [B, heads, S, T]; what pads the rows must not matter."""
    t = scores.shape[-1]
    rows = torch.full((*scores.shape[:-1], padded(t)), math.nan, device=scores.device)
    rows[..., :t] = scores
    out = torch.full((*scores.shape[:-1], topk), -7, dtype=torch.int32, device=scores.device)
    lines = scores.shape[:-1].numel()
    select(rows, bounds, out, 0, t, nt or segments(lines, t), lambda kernel: kernel)
    return out


def check(scores: Tensor, topk: int) -> None:
    # On the CPU: CUDA's sort ranks a NaN whose sign bit is set below everything.
    expected = expected_selection(scores.cpu(), topk).to(scores.device)
    assert torch.equal(selection(scores, topk), expected)


def adversarial(name: str, t: int, device: str) -> Tensor:
    """Returns one row of t scores."""
    steps = torch.arange(t, device=device)
    rows: dict[str, Callable[[], Tensor]] = {
        "all equal": lambda: torch.full((t,), 1.5, device=device),
        "all zero of both signs": lambda: torch.where(steps % 3 == 0, -0.0, 0.0),
        "all forbidden": lambda: torch.full((t,), FORBIDDEN, device=device),
        "all NaN": lambda: torch.full((t,), math.nan, device=device),
        "ascending": lambda: steps.float(),
        "descending": lambda: -steps.float(),
        "negative": lambda: -1.0 - torch.rand(t, device=device),
        # Equal in the upper 16 bits: the last two bytes decide.
        "one prefix": lambda: (0x3F800000 + (steps * 7919) % 65536).to(torch.int32).view(torch.float32),
        "one byte": lambda: (0x3F800000 + steps % 4).to(torch.int32).view(torch.float32),
        "two values": lambda: torch.where(steps % 5 == 0, 2.0, 1.0),
        "few valid": lambda: torch.where(steps % 97 == 3, steps.float(), FORBIDDEN),
        "infinities": lambda: torch.where(steps % 11 == 0, math.inf, -steps.float()),
        "lowest": lambda: torch.where(steps % 2 == 0, torch.finfo(torch.float32).min, FORBIDDEN),
        "tiny": lambda: (steps % 9 - 4) * 1e-45,
        "random": lambda: torch.randn(t, device=device),
        "NaN of both signs": lambda: torch.where(
            steps % 50 == 1, math.nan, torch.where(steps % 50 == 2, -math.nan, torch.randn(t, device=device))
        ),
    }
    return rows[name]().float()


NAMES = [
    "all equal", "all zero of both signs", "all forbidden", "all NaN", "ascending", "descending",
    "negative", "one prefix", "one byte", "two values", "few valid", "infinities", "lowest", "tiny",
    "random", "NaN of both signs",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("topk", [1, 60, 6000])
def test_adversarial_rows(device: str, name: str, topk: int) -> None:
    # More than two chunks, and not a whole number of them.
    check(adversarial(name, 5000, device).view(1, 1, 1, -1), topk)


@pytest.mark.parametrize("t", [1, 2, 2047, 2048, 2049])
def test_as_many_as_there_are(device: str, t: int) -> None:
    scores = torch.randint(-3, 3, (2, 1, 2, t), device=device).float()
    for topk in (1, t, t + 5):
        check(scores, topk)


def test_rows_are_independent(device: str) -> None:
    rows = [adversarial(name, 3000, device) for name in NAMES[:8]]
    check(torch.stack(rows).view(2, 2, 2, 3000), 100)


@pytest.mark.parametrize("nt", [1, 2, 8, 64])
def test_the_number_of_segments_does_not_matter(device: str, nt: int) -> None:
    scores = torch.randn(1, 1, 1, 9000, device=device).half().float()
    assert torch.equal(selection(scores, 700, nt=nt), expected_selection(scores, 700))


def test_bounds_cut_rows(device: str) -> None:
    scores = torch.randn(2, 2, 2, 6000, device=device)
    bounds = torch.tensor(
        [[[0, 0], [2048, 4096]], [[2047, 2050], [5999, 6000]]], dtype=torch.int32, device=device
    )
    at = torch.arange(6000, device=device)
    inside = (at >= bounds[..., :1]) & (at < bounds[..., 1:])
    seen = torch.where(inside[:, None], scores, FORBIDDEN)
    assert torch.equal(selection(scores, 40, bounds), expected_selection(seen, 40))


values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1.0000001, 1e-45, 3e38]),
    st.floats(width=32),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.lists(values, min_size=1, max_size=40),
    repeat=st.integers(1, 70),
    topk=st.sampled_from([1, 2, 16, 50]),
)
def test_any_row(device: str, row: list[float], repeat: int, topk: int) -> None:
    # One length for all examples: on a chip another one would be compiled anew.
    scores = torch.full((3000,), FORBIDDEN, device=device)
    scores[: len(row) * repeat] = torch.tensor(row, device=device).repeat(repeat)
    check(scores.view(1, 1, 1, -1), topk)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_long_rows_on_the_chip(name: str) -> None:
    torch.manual_seed(0)
    check(adversarial(name, 131072, "cuda").view(1, 1, 1, -1), 2048)


@pytest.mark.gpu
@pytest.mark.parametrize(("b", "t", "topk"), [(1, 1 << 24, 4096), (64, 70001, 2048), (700, 5000, 300)])
def test_sizes_on_the_chip(b: int, t: int, topk: int) -> None:
    torch.manual_seed(0)
    scores = torch.randn(b, 1, 1, t, device="cuda")
    # Half precision makes ties.
    check(scores.half().float(), topk)


@pytest.mark.gpu
def test_every_launch_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 1, 1, 131072, device="cuda").half().float()
    expected = expected_selection(scores, 2048)
    for _ in range(20):
        assert torch.equal(selection(scores, 2048), expected)
