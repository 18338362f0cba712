"""Haystacks: as long as asked, the needle where it was asked for, the answer as often as it should be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clsa_compile.calibration.haystack import COMMON, NAMES, PIECE, TASKS, VALUES, WITH_DEPTH, Haystack
from clsa_compile.errors import OptionError

ANY = {
    "task": st.sampled_from(list(TASKS)),
    "length": st.integers(330, 3000),
    "depth": st.floats(0, 1),
    "number": st.integers(0, 50),
    "seed": st.integers(0, 2**32),
}
FILLER = (
    "The 3 mills stood still. 4 herons flew over them! Was it late?\nNobody could tell, and nobody tried."
)


@pytest.fixture(scope="module", name="haystack")
def _haystack(words: Any) -> Haystack:
    return Haystack(words)


@settings(deadline=None, max_examples=60)
@given(**ANY)
def test_a_sample_is_exactly_as_long_as_asked_and_ends_with_its_answer(
    haystack: Haystack, words: Any, task: str, length: int, depth: float, number: int, seed: int
) -> None:
    sample = haystack.sample(task, length, depth, number, seed)
    assert len(sample.ids) == length
    assert sample == haystack.sample(task, length, depth, number, seed)
    assert sample.ids[0] == 0
    assert 0 not in sample.ids[1:]
    prompt, answer = words.decode(sample.ids[: sample.start]), words.decode(sample.ids[sample.start :])
    assert prompt.endswith((" is", " are"))
    assert answer.startswith(" ")
    found = [words.decode(sample.ids[a:b]) for a, b in sample.needles]
    assert all(text.endswith(".\n") and prompt.count(text) == 1 for text in found)
    parts = answer.strip().split(", ")
    by_task = {
        "single_needle": lambda: (
            found[0].endswith(f" is {answer.strip()}.\n") and prompt.count(parts[0]) == 1
        ),
        "multi_key_needle": lambda: (
            found[0].endswith(f" is {answer.strip()}.\n")
            and prompt.count(parts[0]) == 1
            and prompt.count("The access number of the") == 7
            and prompt.count(found[0].split(" is ")[0]) == 2
        ),
        "multi_value_needle": lambda: (
            len(parts) == len(set(parts)) == VALUES
            and [text.split(" is ")[1] for text in found] == [f"{part}.\n" for part in parts]
            and all(prompt.count(part) == 1 for part in parts)
        ),
        "variable_tracking": lambda: (
            [text.split()[1] for text in found] == parts
            and len(set(parts)) == NAMES
            and [prompt.count(part) for part in parts] == [2] * (NAMES - 1) + [1]
            and [text.split(" be ")[1] for text in found[1:]] == [f"{part}.\n" for part in parts[:-1]]
            and prompt.count(found[0].split(" be ")[1].strip(".\n")) == 3
        ),
        "common_words": lambda: _is_most_common(parts, prompt),
    }
    assert by_task[task]()


def _is_most_common(parts: list[str], prompt: str) -> bool:
    listed = prompt.split("\n")[1:-3]
    counts = Counter(listed)
    others = max(count for word, count in counts.items() if word not in parts)
    own = [counts[part] for part in parts]
    return (
        parts == sorted(parts)
        and len(parts) == COMMON
        and max(own) - min(own) <= 1
        and min(own) >= 3 * others
    )


@settings(deadline=None, max_examples=60)
@given(**{**ANY, "task": st.sampled_from(WITH_DEPTH)})
def test_a_needle_lies_at_its_depth_and_nothing_else_moves(
    haystack: Haystack, words: Any, task: str, length: int, depth: float, number: int, seed: int
) -> None:
    first, sample, last = (haystack.sample(task, length, d, number, seed) for d in (0.0, depth, 1.0))
    ((start, end),) = sample.needles
    rest = sample.ids[:start] + sample.ids[end:]
    assert rest == last.ids[: last.needles[0][0]] + last.ids[last.needles[0][1] :]
    low, high = first.needles[0][0], last.needles[0][0]
    # Distractors between are part of the way, so only the single needle has an exact place.
    slack = PIECE / 2 + 1 if task == "single_needle" else PIECE / 2 + 6 * 20
    assert abs(start - (low + depth * (high - low))) <= slack
    assert low < 20
    assert words.decode(last.ids[last.needles[0][1] :]).startswith("\nQuestion: ")


@settings(deadline=None, max_examples=20)
@given(number=st.integers(0, 1000))
def test_a_text_of_the_callers_is_the_filler(words: Any, number: int) -> None:
    haystack = Haystack(words, FILLER)
    sample = haystack.sample("single_needle", 400, 0.5, number, 0)
    text = words.decode(sample.ids)
    assert len(sample.ids) == 400
    assert text.count("herons flew over them!\n") > 5
    assert "." not in words.decode(sample.ids[sample.start :])
    own = haystack.sample("common_words", 400, 0.0, number, 0)
    assert "herons" not in words.decode(own.ids)


def test_long_lines_are_cut_so_that_depths_are_kept(words: Any) -> None:
    sample = Haystack(words, "word " * 5000).sample("single_needle", 2000, 0.5, 0, 0)
    assert abs(sample.needles[0][0] - 1000) < PIECE


def test_seeds_tasks_and_numbers_make_other_samples(haystack: Haystack) -> None:
    made = {haystack.sample("single_needle", 400, 0.5, n, seed).ids for n in range(5) for seed in range(5)}
    assert len(made) == 25


def test_an_answer_that_melts_into_the_question_begins_where_tokens_differ() -> None:
    class Pairs:
        """Two letters a token: the end of the question and the answer's first letter may be one."""

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            pairs = (text[i : i + 2] for i in range(0, len(text), 2))
            return {"input_ids": [sum(ord(c) << 8 * i for i, c in enumerate(pair)) for pair in pairs]}

        def decode(self, ids: Any) -> str:
            return "".join(chr(i & 255) + (chr(i >> 8) if i >> 8 else "") for i in ids)

    tokenizer = Pairs()
    haystack = Haystack(tokenizer)
    for number in range(4):
        sample = haystack.sample("single_needle", 600, 0.5, number, 0)
        assert len(sample.ids) == 600
        answer = tokenizer.decode(sample.ids[sample.start :])
        assert answer.lstrip("s").strip().isdigit()
        assert len(answer) in (7, 8)


class Without:
    """Something that can be called, and gives what it was told to."""

    def __init__(self, given: Any) -> None:
        self._given = given

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return self._given


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "the tokenizer is None; give one that turns text into ids"),
        ("gpt2", "the tokenizer is 'gpt2'"),
        (Without({}), "a Without, does not turn text into ids: .* fails with KeyError"),
        (Without("ids"), "does not turn text into ids: .* fails with TypeError"),
        (Without({"input_ids": ["a"]}), "does not turn text into ids: .* fails with ValueError"),
        (Without({"input_ids": []}), "a Without, makes no tokens of 'Notes'"),
    ],
)
def test_what_is_no_tokenizer_is_an_error(tokenizer: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Haystack(tokenizer)


@pytest.mark.parametrize("task", TASKS)
def test_too_few_tokens_are_an_error_that_names_how_many_it_takes(haystack: Haystack, task: str) -> None:
    with pytest.raises(OptionError, match=rf"20 tokens are too few for the task '{task}'") as caught:
        haystack.sample(task, 20, 0.5, 0, 0)
    least = int(str(caught.value).split("takes ")[1].split()[0])
    # Another length is another sample, whose names may have other numbers of tokens.
    assert len(haystack.sample(task, least + 20, 0.5, 0, 0).ids) == least + 20


@pytest.mark.parametrize("filler", ["", " \n\t "])
def test_filler_without_text_is_an_error(words: Any, filler: str) -> None:
    with pytest.raises(OptionError, match="the filler holds no text"):
        Haystack(words, filler)
