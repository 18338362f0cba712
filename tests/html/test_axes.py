"""Axes and figures: where values stand, and how numbers are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsa_compile.html.axes import decades, scaled, tokens_axis, tokens_words


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0 B"),
        (1, "B", "1.00 B"),
        (999.4, "B", "999 B"),
        (999.6, "B", "1.00 kB"),
        (131072, "B", "131 kB"),
        (5.31e-3, "s", "5.31 ms"),
        (68.8e-6, "s", "68.8 µs"),
        (2e-12, "s", "0.002 ns"),
        (9.89e14, "flop/s", "989 Tflop/s"),
        (1e21, "", "1000 E"),
        (12, "", "12.0"),
    ],
)
def test_numbers_have_prefixes(value: float, unit: str, text: str) -> None:
    assert scaled(value, unit) == text


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (1, "1"),
        (512, "512"),
        (1024, "1K"),
        (4096, "4K"),
        (131072, "128K"),
        (2**20, "1M"),
        (131073, "131,073"),
    ],
)
def test_numbers_of_tokens(tokens: int, text: str) -> None:
    assert tokens_words(tokens) == text


def test_an_axis_is_logarithmic_and_ends_where_it_should() -> None:
    axis = decades(1.0, 100.0, 50, 250)
    assert [axis.at(value) for value in (1, 10, 100)] == [50, 150, 250]
    assert (axis.at(0.001), axis.at(1e9)) == (50, 250), "what is outside stands at the end"
    assert [(tick.value, tick.at, tick.label) for tick in axis.ticks] == [
        (1, 50, "1"),
        (10, 150, "10"),
        (100, 250, "100"),
    ]


@given(low=st.floats(1e-9, 1e15), factor=st.floats(1, 1e12))
def test_decades_hold_the_values_and_have_few_labels(low: float, factor: float) -> None:
    axis = decades(low, low * factor, 0, 100)
    assert axis.low <= low * 1.001
    assert axis.high >= low * factor * 0.999
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 6


@given(low=st.integers(1, 2**17), factor=st.integers(2, 2**12))
def test_tokens_have_few_labels_in_order(low: int, factor: int) -> None:
    axis = tokens_axis(low, low * factor, 0, 100)
    assert 2 <= len(axis.ticks) <= 6
    places = [tick.at for tick in axis.ticks]
    assert places == sorted(places)
    assert all(low <= tick.value <= low * factor for tick in axis.ticks)
