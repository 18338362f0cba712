"""The garbage collector and the frame stack while passes run."""

import gc
from typing import Any

import pytest

from clsa_compile.pace import roomy, uncollected

resource: Any = pytest.importorskip("resource", reason="counts page faults, which only Unix tells")


def test_the_collector_rests_and_comes_back() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_the_collector_comes_back_after_an_error() -> None:
    with pytest.raises(KeyError), uncollected():
        raise KeyError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_roomy_function_is_the_function() -> None:
    @roomy
    def pair(a: int, *, b: int = 2) -> tuple[int, int]:
        """Gives both."""
        return a, b

    assert pair(1) == (1, 2)
    assert pair(1, b=3) == (1, 3)
    assert pair.__name__ == "pair"
    assert pair.__doc__ == "Gives both."
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        pair()  # type: ignore[call-arg]


def nothing() -> None:
    return


def calls(count: int) -> int:
    """Returns the page faults of calls."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        nothing()
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def deeper(frames: int, count: int) -> int:
    """Returns the page faults of calls made some frames further down."""
    return calls(count) if frames == 0 else deeper(frames - 1, count)


def faults_at_every_depth() -> int:
    return max(deeper(frames, 1000) for frames in range(400))


def test_no_call_crosses_the_end_of_a_chunk() -> None:
    assert roomy(faults_at_every_depth)() < 500  # 1000 or more without room, from CPython 3.11 on
