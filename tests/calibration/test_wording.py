"""Wording: sentences and words that cannot be taken for what is hidden among them."""

from __future__ import annotations

from itertools import islice, permutations
from random import Random

from clsa_compile.calibration.wording import ADJECTIVES, OBJECTS, WORDS, repeated, sentences, split


def test_sentences_are_lines_without_digits_and_the_same_for_a_seed() -> None:
    found = list(islice(sentences(Random(3)), 500))
    assert found == list(islice(sentences(Random(3)), 500))
    assert found != list(islice(sentences(Random(4)), 500))
    assert len(set(found)) > 480
    for line in found:
        assert line.endswith(".\n")
        assert line.count("\n") == 1
        assert not any(letter.isdigit() for letter in line)
        assert not any(word in line for word in OBJECTS)


def test_no_word_is_or_begins_another_one() -> None:
    assert not [pair for pair in permutations(WORDS, 2) if pair[1].startswith(pair[0])]
    assert not set(WORDS) & set(ADJECTIVES + OBJECTS)


def test_a_text_is_split_into_sentences_and_goes_round() -> None:
    lines = split("One is here.  Two is\nthere! Three?\n\n  \nFour")
    assert lines == ("One is here.\n", "Two is\n", "there!\n", "Three?\n", "Four\n")
    assert split(" \n ") == ()
    found = list(islice(repeated(lines, Random(0)), 11))
    assert found[:5] == found[5:10]
    start = lines.index(found[0])
    assert found[:5] == [*lines[start:], *lines[:start]]
