"""kernels/launch.py: sizes of blocks and splits, and how masks are handed over."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clsa_compile.kernels.launch import (
    ceil_div,
    floor_power_of_two,
    keys_per_step,
    mask_arguments,
    mask_context,
    padded_width,
    parts,
    power_of_two,
)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (16, ((0, 16, False),)),
        (64, ((0, 64, False),)),
        (80, ((0, 64, False), (64, 16, False))),
        (96, ((0, 64, False), (64, 32, False))),
        (192, ((0, 128, False), (128, 64, False))),
        (576, ((0, 512, False), (512, 64, False))),
        (72, ((0, 64, False), (64, 16, True))),
        (112, ((0, 128, True),)),
        (8, ((0, 16, True),)),
    ],
)
def test_parts_of_known_widths(width: int, expected: object) -> None:
    assert parts(width) == expected


@given(st.integers(1, 1024))
def test_parts_cover_a_width_once(width: int) -> None:
    end = 0
    for start, block, padded in parts(width):
        assert start == end
        assert block >= 16
        assert block & (block - 1) == 0
        assert padded == (start + block > width)
        end = start + block
    assert end >= width
    assert padded_width(width) == end <= max(16, power_of_two(width))


@given(st.integers(1, 10**6), st.integers(1, 4096))
def test_rounding(n: int, block: int) -> None:
    assert floor_power_of_two(n) <= n <= power_of_two(n)
    assert ceil_div(n, block) == math.ceil(n / block)


@given(st.integers(16, 8192), st.integers(1, 5))
def test_steps_fit(row_bytes: int, stages: int) -> None:
    keys = keys_per_step(row_bytes, stages, 128)
    assert 16 <= keys <= 128
    assert keys == 16 or keys * row_bytes * max(stages - 1, 1) <= 131072


def test_broadcast_dimensions_get_stride_zero() -> None:
    mask = torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    args = mask_arguments(mask, [torch.zeros(4, 6)])
    assert args["mask_ptr"] is mask
    assert [args[f"mask_s{n}"] for n in "bhqt"] == [15, 0, 5, 1]
    assert (args["in0_s0"], args["in0_s1"]) == (6, 1)
    assert "MASK_MIN" not in args
    flat = mask_arguments(torch.zeros(3, 5), [])
    assert [flat[f"mask_s{n}"] for n in "bhqt"] == [0, 0, 5, 1]
    assert flat["MASK_MIN"] == torch.finfo(torch.float32).min


def test_a_mask_is_read_once_for_rows_that_share_it() -> None:
    shared = torch.zeros(2, 1, 1, 5)
    per_row = torch.zeros(2, 1, 3, 5)
    assert not mask_context(shared, [], "", (1, 2))["mask_rows"]
    assert mask_context(per_row, [], "", (1, 2))["mask_rows"]
    assert not mask_context(per_row, [], "", (1,))["mask_rows"]
    assert mask_context(None, [], "kv <= q", (1, 2))["mask"] == ""
