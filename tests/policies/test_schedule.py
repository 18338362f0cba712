"""Schedules: who runs an indexer and who reads the last one's index."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clsa_compile import hugging_face_schedule
from clsa_compile.errors import OptionError
from clsa_compile.ir.routing import Shares
from clsa_compile.policies.schedule import roles, shares

OWN = (0, 1, 2, 3, 4, 5)
# A model in which layers 1 and 2 read layer 0's index, and 4 that of 3.
SHARED = (0, 0, 0, 3, 3, 5)


@pytest.mark.parametrize(
    ("share", "owners", "expected"),
    [
        ("off", OWN, "FFFFFF"),
        ("off", SHARED, "FSSFSF"),
        (1, OWN, "FFFFFF"),
        (4, OWN, "FSSSFS"),
        (9, OWN, "FSSSSS"),
        (3, SHARED, "FSSFSS"),
        (2, SHARED, "FSSSSS"),
        ("FFSSFS", OWN, "FFSSFS"),
        ("FSSSSF", SHARED, "FSSSSF"),
        (4, (), ""),
        ("FSS", (), ""),
    ],
)
def test_roles(share: int | str, owners: tuple[int, ...], expected: str) -> None:
    assert roles(share, owners) == expected


@pytest.mark.parametrize(
    ("share", "owners", "expected"),
    [
        ("off", SHARED, (0, 0, 0, 3, 3, 5)),
        (4, OWN, (0, 0, 0, 0, 4, 4)),
        ("FFSSFS", OWN, (0, 1, 1, 1, 4, 4)),
        # Layer 4 follows layer 3, wherever that one reads.
        ("FSSSSF", SHARED, (0, 0, 0, 0, 0, 5)),
        # Layer 2 has no indexer and reads layer 0 in the model, although layer 1 has chosen since.
        ("FFSF", (0, 1, 0, 3), (0, 1, 0, 3)),
    ],
)
def test_anchors(share: int | str, owners: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert shares(share, None, owners).anchors == expected


@pytest.mark.parametrize(
    ("share", "owners", "expected", "among"),
    [
        ("FSRSFR", OWN, (0, 0, 2, 2, 4, 5), {2: 0, 5: 4}),
        ("FRRSSF", OWN, (0, 1, 2, 2, 2, 5), {1: 0, 2: 0}),
        ("FSSRSF", SHARED, (0, 0, 0, 3, 3, 5), {3: 0}),
    ],
)
def test_layers_that_select_again_are_read_by_those_after(
    share: str, owners: tuple[int, ...], expected: tuple[int, ...], among: dict[int, int]
) -> None:
    assert shares(share, 64, owners) == Shares(expected, among, 64)


@pytest.mark.parametrize(
    ("share", "owners", "message"),
    [
        ("FSS", OWN, "is for 3 layers; this graph has 6"),
        ("F" * 200, OWN, "F{100}\\.\\.\\.' is for 200 layers"),
        ("FFSFFF", SHARED, "has F or R at 1, 4 \\(counted from 0\\), where the model has no indexer"),
    ],
)
def test_a_schedule_that_does_not_fit(share: str, owners: tuple[int, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        shares(share, None, owners)


def test_the_rule_of_hugging_face() -> None:
    schedule = hugging_face_schedule(78, freq=4, offset=3)
    full = [i for i, role in enumerate(schedule) if role == "F"]
    assert full == [0, 1, *range(2, 75, 4)]
    assert len(full) == 21
    assert hugging_face_schedule(5, freq=1, offset=2) == "FFFFF"


@pytest.mark.parametrize("numbers", [(0, 4, 3), (8, 0, 3), (8, 4, 0)])
def test_no_such_rule(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(OptionError, match="accepted: numbers from 1"):
        hugging_face_schedule(*numbers)


@pytest.mark.parametrize(("freq", "offset"), [(1, 2), (4, 3), (4, 1), (3, 2), (5, 7)])
def test_the_rule_is_that_of_transformers(freq: int, offset: int) -> None:
    from transformers import GlmMoeDsaConfig

    config = GlmMoeDsaConfig(num_hidden_layers=20, index_topk_freq=freq, index_skip_topk_offset=offset)
    letters = "".join({"full": "F", "shared": "S"}[kind] for kind in config.indexer_types)
    assert hugging_face_schedule(20, freq, offset) == letters
    assert letters.startswith("F")


@given(st.integers(1, 9), st.lists(st.booleans(), max_size=40))
def test_everyone_reads_an_indexer_that_runs(share: int, own: list[bool]) -> None:
    owners: list[int] = []
    for i, mine in enumerate(own):
        owners.append(i if mine or i == 0 else owners[-1])
    schedule, read = roles(share, owners), shares(share, None, owners).anchors
    assert len(schedule) == len(read) == len(own)
    for i, anchor in enumerate(read):
        assert anchor <= i
        assert schedule[anchor] == "F"
        assert (anchor == i) == (schedule[i] == "F")
