"""checking/blame.py: bisection."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clsa_compile.checking.blame import least


@given(count=st.integers(1, 12), data=st.data())
def test_exactly_what_is_wrong_is_found(count: int, data: st.DataObject) -> None:
    names = [str(i) for i in range(count)]
    wrong = data.draw(st.sets(st.sampled_from(names), min_size=1))
    asked = []

    def departs(*skipped: str) -> bool:
        asked.append(skipped)
        return not wrong <= set(skipped)

    assert set(least(names, departs)) == wrong
    if len(wrong) == 1:
        assert len(asked) <= 2 * count.bit_length()
