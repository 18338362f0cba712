"""kernels/index_topk/select.py against a stable sort, on scores chosen to break it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clsa_compile.kernels.index_topk import select as select_module
from clsa_compile.kernels.index_topk.select import listed_keys, padded, row_bytes, sampled, segments, select
from clsa_compile.kernels.launch import Wrap

FORBIDDEN = -math.inf
# Sizes at which short rows take every way that long rows take at the sizes of the kernels.
CHUNK, CAP, SAMPLE = 256, 512, 128
# Multiprocessors of an H100.
SMS = 132
# Candidates are listed in groups of this many.
GROUP = 8


@dataclass
class Spy:
    """Stands in for `wrap`: launches, and keeps the arguments of each kernel by its name."""

    seen: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, kernel: Any) -> Any:
        class Grid:
            def __getitem__(_, grid: Any) -> Callable[..., None]:
                def launch(**arguments: Any) -> None:
                    self.seen[kernel.__name__] = arguments
                    kernel[grid](**arguments)

                return launch

        return Grid()

    def way(self) -> str:
        """Says how the only row was selected, from what `select_pick` left."""
        if "select_pick" not in self.seen:
            return "held whole"
        info = self.seen["select_pick"]["info_ptr"].view(-1, 3).long()
        topk, capacity, cap = (self.seen["select_pick"][name] for name in ("TOPK", "CAPACITY", "CAP"))
        counts, above, tau = info[:, 0], int(info[:, 1].sum()), int(info[0, 2])
        n, held = int(counts.sum()), int(((counts + GROUP - 1) // GROUP * GROUP).sum())
        if n < topk and tau != 1:
            return "missed"
        if held <= cap:
            place = "half tile" if held <= cap // 2 else "tile"
        else:
            place = "list" if counts.max() <= capacity else "row"
        search = "all" if n <= topk else "ties" if above < topk else "search"
        return f"{place}, {search}"


@pytest.fixture
def listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes short rows long ones."""
    monkeypatch.setattr(select_module, "CHUNK", CHUNK)
    monkeypatch.setattr(select_module, "CAP", CAP)
    monkeypatch.setattr(select_module, "SAMPLE", SAMPLE)
    monkeypatch.setattr(select_module, "KEYS_PER_SAMPLE", 1 << 20)
    monkeypatch.setattr(select_module, "MAX_SEGMENTS", 4)


@pytest.fixture(params=["one launch", "two launches"])
def launches(request: pytest.FixtureRequest) -> None:
    if request.param == "two launches":
        request.getfixturevalue("listing")


def expected_selection(scores: Tensor, topk: int) -> Tensor:
    """Returns what the contract asks for, by a stable sort of the whole row."""
    missing = max(0, topk - scores.shape[-1])
    filled = torch.nn.functional.pad(scores, (0, missing), value=FORBIDDEN)
    values, order = torch.sort(filled, dim=-1, descending=True, stable=True)
    last = torch.iinfo(torch.int32).max
    order = torch.where(values[..., :topk] == FORBIDDEN, last, order[..., :topk]).sort(-1).values
    return torch.where(order == last, -1, order).to(torch.int32)


def launch(kernel: Any) -> Any:
    return kernel


def selection(
    scores: Tensor, topk: int, bounds: Tensor | None = None, nt: int = 0, wrap: Wrap = launch
) -> Tensor:
    """Runs the kernels on scores [B, heads, S, T]; what pads the rows must not matter."""
    t = scores.shape[-1]
    rows = torch.full((*scores.shape[:-1], padded(t)), math.nan, device=scores.device)
    rows[..., :t] = scores
    out = torch.full((*scores.shape[:-1], topk), -7, dtype=torch.int32, device=scores.device)
    lines = scores.shape[:-1].numel()
    select(rows, bounds, out, 0, t, nt or segments(lines, t, SMS), wrap)
    return out


def check(scores: Tensor, topk: int, nt: int = 0, wrap: Wrap = launch) -> None:
    # On the CPU: CUDA's sort ranks a NaN whose sign bit is set below everything.
    expected = expected_selection(scores.cpu(), topk).to(scores.device)
    assert torch.equal(selection(scores, topk, nt=nt, wrap=wrap), expected)


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
@pytest.mark.usefixtures("launches")
def test_adversarial_rows(device: str, name: str, topk: int) -> None:
    # More than two chunks, and not a whole number of them.
    check(adversarial(name, 5000, device).view(1, 1, 1, -1), topk)


@pytest.mark.parametrize("t", [1, 2, 2047, 2048, 2049])
@pytest.mark.usefixtures("launches")
def test_as_many_as_there_are(device: str, t: int) -> None:
    scores = torch.randint(-3, 3, (2, 1, 2, t), device=device).float()
    for topk in (1, t, t + 5):
        check(scores, topk)


@pytest.mark.usefixtures("launches")
def test_rows_are_independent(device: str) -> None:
    rows = [adversarial(name, 3000, device) for name in NAMES[:8]]
    check(torch.stack(rows).view(2, 2, 2, 3000), 100)


@pytest.mark.parametrize("nt", [1, 2, 8, 64])
def test_the_number_of_segments_does_not_matter(device: str, nt: int) -> None:
    scores = torch.randn(1, 1, 1, 9000, device=device).half().float()
    assert torch.equal(selection(scores, 700, nt=nt), expected_selection(scores, 700))


@pytest.mark.usefixtures("launches")
def test_bounds_cut_rows(device: str) -> None:
    scores = torch.randn(2, 2, 2, 6000, device=device)
    bounds = torch.tensor(
        [[[0, 0], [2048, 4096]], [[2047, 2050], [5999, 6000]]], dtype=torch.int32, device=device
    )
    at = torch.arange(6000, device=device)
    inside = ((at >= bounds[..., :1]) & (at < bounds[..., 1:]))[:, None]
    expected = expected_selection(torch.where(inside, scores, FORBIDDEN), 40)
    # What lies outside may never have been written: it ranks above everything, and must not count.
    assert torch.equal(selection(torch.where(inside, scores, math.nan), 40, bounds), expected)


@pytest.mark.parametrize("nt", [1, 4])
@pytest.mark.parametrize("t", [1, 300, 5000])
def test_a_length_that_is_not_known_is_selected_like_any(
    device: str, monkeypatch: pytest.MonkeyPatch, t: int, nt: int
) -> None:
    monkeypatch.setattr(select_module, "static", lambda size: False)
    spy = Spy()
    check(torch.randn(1, 1, 1, t, device=device), 40, nt, spy)
    assert spy.way() == f"{'tile' if t == 5000 else 'half tile'}, {'all' if t == 1 else 'search'}"


def sample(t: int) -> Tensor:
    """Returns the positions of a row of t keys that the guess is made from."""
    j = torch.arange(SAMPLE)
    low = 0xFFFFFFFF
    mixed = j * 0x9E3779B1 & low
    mixed = (mixed ^ mixed >> 15) * 0x85EBCA77 & low
    mixed = mixed ^ mixed >> 13
    part = 2**32 // SAMPLE
    return (j * part + mixed % part) * t >> 32


def order_of(device: str, t: int, seed: int = 0) -> Tensor:
    """Returns 0 to t - 1 in any order, as scores: all differ."""
    return torch.randperm(t, generator=torch.Generator().manual_seed(seed)).float().to(device)


def inflated(device: str, t: int) -> Tensor:
    """Returns a row whose sample lies above all the rest."""
    scores = order_of(device, t)
    scores[sample(t)] += t
    return scores


def deflated(device: str, t: int) -> Tensor:
    """Returns a row whose sample lies below all the rest."""
    scores = order_of(device, t)
    scores[sample(t)] -= t
    return scores


def chosen_exactly(device: str, t: int, topk: int) -> Tensor:
    """Returns a row with topk high scores, 25 of them in the sample, and nothing near them."""
    scores = order_of(device, t) / t
    scores[sample(t)[:25]] = 2.0
    hidden = torch.ones(t, dtype=torch.bool)
    hidden[sample(t)] = False
    scores[hidden.nonzero()[: topk - 25, 0]] = 2.0
    return scores


def repeated(device: str, t: int, ties: int, above: int) -> Tensor:
    """Returns a row of `above` different scores, `ties` equal ones below them, and lower ones."""
    scores = -1.0 - order_of(device, t)
    at = torch.randperm(t, generator=torch.Generator().manual_seed(1))
    scores[at[:above]] = 3.0 + order_of(device, above)
    scores[at[above : above + ties]] = 2.0
    return scores


def sparse(device: str, t: int, valid: int) -> Tensor:
    """Returns a row with `valid` scores that are not forbidden."""
    scores = order_of(device, t)
    return torch.where(scores < valid, scores, FORBIDDEN)


# What decides: rows, segments, k, and the way that must be taken.
WAYS: dict[str, tuple[Callable[[str], Tensor], int, int, str]] = {
    "short": (lambda d: order_of(d, 500), 2, 40, "held whole"),
    "few candidates": (lambda d: order_of(d, 1200), 4, 20, "half tile, search"),
    "more candidates": (lambda d: order_of(d, 4000), 8, 30, "tile, search"),
    "candidates over many tiles": (lambda d: order_of(d, 9000), 16, 200, "list, search"),
    "all candidates in one segment": (lambda d: torch.arange(4000.0, device=d), 2, 200, "row, search"),
    "more than a tile in one segment": (lambda d: order_of(d, 9000), 1, 300, "list, search"),
    "too many in one segment": (lambda d: order_of(d, 9000), 1, 700, "row, search"),
    "a sample too high": (lambda d: inflated(d, 4000), 8, 200, "missed"),
    "a sample too high, one segment": (lambda d: inflated(d, 4000), 1, 200, "missed"),
    "a sample too low": (lambda d: deflated(d, 4000), 8, 200, "list, search"),
    "a sample too low, one segment": (lambda d: deflated(d, 4000), 1, 200, "row, search"),
    "as many candidates as wanted": (lambda d: chosen_exactly(d, 4000, 200), 8, 200, "half tile, all"),
    "ties in a tile": (lambda d: repeated(d, 2000, 400, 5), 8, 30, "tile, ties"),
    "ties in half a tile": (lambda d: repeated(d, 1000, 230, 5), 4, 10, "half tile, ties"),
    "ties over many tiles": (lambda d: repeated(d, 4000, 3000, 5), 8, 1500, "list, ties"),
    "ties beyond the list": (lambda d: repeated(d, 4000, 3000, 5), 2, 1500, "row, ties"),
    "ties below enough": (lambda d: repeated(d, 4000, 3000, 40), 8, 30, "list, search"),
    "all equal": (lambda d: torch.ones(4000, device=d), 8, 30, "list, ties"),
    "all equal, one segment": (lambda d: torch.ones(4000, device=d), 1, 1500, "row, ties"),
    "few that are allowed": (lambda d: sparse(d, 4000, 20), 8, 30, "half tile, all"),
    "none that is allowed": (lambda d: sparse(d, 4000, 0), 8, 30, "half tile, all"),
    "as many allowed as wanted": (lambda d: sparse(d, 4000, 30), 8, 30, "half tile, all"),
    "fewer allowed than wanted, listed": (lambda d: sparse(d, 4000, 2500), 8, 3000, "list, all"),
    "fewer allowed than wanted, not listed": (lambda d: sparse(d, 4000, 2500), 1, 3000, "row, all"),
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.usefixtures("listing")
def test_every_way_of_selecting_is_taken_and_exact(device: str, name: str) -> None:
    row, nt, topk, way = WAYS[name]
    spy = Spy()
    check(row(device).view(1, 1, 1, -1), topk, nt, spy)
    assert spy.way() == way


@pytest.mark.parametrize("offset", [0, 1, 17, 31])
@pytest.mark.usefixtures("listing")
def test_periodic_scores_do_not_mislead_the_sample(device: str, offset: int) -> None:
    # The period is the distance between samples: without the jitter all or none of them would be high.
    steps = torch.arange(4096, device=device)
    scores = torch.where(steps % 32 == offset, 5000.0, 0.0) + order_of(device, 4096)
    spy = Spy()
    check(scores.view(1, 1, 1, -1), 30, 8, spy)
    assert spy.way() == "tile, search"


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


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.lists(values, min_size=1, max_size=40),
    seed=st.integers(0, 1000),
    nt=st.sampled_from([1, 4]),
    topk=st.sampled_from([1, 50, 300]),
)
@pytest.mark.usefixtures("listing")
def test_any_long_row(device: str, row: list[float], seed: int, nt: int, topk: int) -> None:
    drawn = torch.randint(len(row), (1500,), generator=torch.Generator().manual_seed(seed))
    check(torch.tensor(row)[drawn].to(device).view(1, 1, 1, -1), topk, nt)


def test_two_programs_a_multiprocessor() -> None:
    assert segments(1, 131072, SMS) == 64
    assert segments(4, 131072, SMS) == 64
    assert segments(8, 131072, SMS) == 32
    assert segments(512, 131072, SMS) == 1
    assert segments(1, 3000, SMS) == 2


def test_lists_are_as_long_as_a_segment_and_twice_a_tile_in_all() -> None:
    assert listed_keys(8192, 1) == 0
    assert listed_keys(131072, 64) == 2048
    assert listed_keys(131073, 64) == 4096
    assert listed_keys(131072, 2) == 8192
    assert listed_keys(131072, 1) == 16384
    assert row_bytes(8192) == 8192 * 4
    assert row_bytes(131072) == 131072 * 4 + 16384 * 8


def test_long_rows_have_large_samples() -> None:
    assert [sampled(t) for t in (9000, 131072, 1 << 20, 1 << 24)] == [2048, 2048, 8192, 16384]


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
def test_every_launch_gives_the_same_bits(repeats: range) -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 1, 1, 131072, device="cuda").half().float()
    expected = expected_selection(scores, 2048)
    for _ in repeats:
        assert torch.equal(selection(scores, 2048), expected)
