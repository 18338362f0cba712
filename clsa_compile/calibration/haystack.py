"""Haystacks: prompts of an exact number of tokens in which something is to be found, with the answer.

Five tasks after RULER (Hsieh et al., 2024), in wording of our own: a number in a text, one of several
numbers, several numbers of one thing, names that stand for one another, and the words of a list that occur
most often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random
from string import ascii_uppercase
from typing import Any

from clsa_compile.calibration.wording import ADJECTIVES, OBJECTS, WORDS, repeated, sentences, split
from clsa_compile.errors import OptionError

__all__ = ["TASKS", "WITH_DEPTH", "Haystack", "Sample"]

# Filler comes in pieces of at most so many tokens: a needle lies within half a piece of its depth.
PIECE = 48
# With less filler than this there is nothing to search in.
LEAST_FILLER = 96
# Needles that are not asked for, values of one thing, names of one chain, chains, words that are common.
OTHERS, VALUES, NAMES, CHAINS, COMMON = 5, 3, 4, 2, 3
# Each common word is one word in so many.
BLOCK = 10
# A text that every tokenizer makes tokens of.
PROBE = "Notes"


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and its answer: the token ids, of which the answer is what stands from `start` on.

    needles: [start, end) in tokens of each line that the answer depends on, in the order of the text.
    """

    ids: tuple[int, ...]
    start: int
    needles: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Needle:
    """A line, how deep it lies (0 is the beginning of the filler), and whether the answer depends on it."""

    line: str
    depth: float
    asked: bool = True


@dataclass(frozen=True, slots=True)
class _Layout:
    """A prompt in pieces: intro, filler with needles in it, question; then the answer."""

    intro: str
    needles: tuple[_Needle, ...]
    filler: Iterator[str]
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class _Source:
    """What a layout is made with; `text` is the caller's filler in lines, none for our own."""

    rng: Random
    text: tuple[str, ...]
    depth: float

    def filler(self) -> Iterator[str]:
        return repeated(self.text, self.rng) if self.text else sentences(self.rng)

    def distinct(self, draw: Callable[[], str], count: int) -> list[str]:
        """Returns so many different draws that the caller's filler does not hold."""
        found: list[str] = []
        while len(found) < count:
            drawn = draw()
            if drawn not in found and not any(drawn in line for line in self.text):
                found.append(drawn)
        return found

    def key(self) -> str:
        return f"{self.rng.choice(ADJECTIVES)} {self.rng.choice(OBJECTS)}"

    def value(self) -> str:
        return str(self.rng.randrange(100_000, 1_000_000))

    def name(self) -> str:
        return "".join(self.rng.choices(ascii_uppercase, k=4))

    def spread(self, count: int) -> list[float]:
        """Returns ascending depths, one in each of so many equal parts."""
        return [(i + self.rng.random()) / count for i in range(count)]


def _numbers(source: _Source, others: int) -> _Layout:
    keys = source.distinct(source.key, others + 1)
    values = source.distinct(source.value, others + 1)
    lines = [f"The access number of the {k} is {v}.\n" for k, v in zip(keys, values, strict=True)]
    asked = [_Needle(lines[0], source.depth)]
    rest = [_Needle(line, at, False) for line, at in zip(lines[1:], source.spread(others), strict=True)]
    return _Layout(
        "Access numbers are hidden in the notes below. Remember them.\n",
        # Where several lie in one place, a depth of 0 is before all of them, and 1 after.
        tuple(asked + rest if source.depth < 0.5 else rest + asked),
        source.filler(),
        f"\nQuestion: What is the access number of the {keys[0]}?\n"
        f"Answer: The access number of the {keys[0]} is",
        f" {values[0]}",
    )


def _single_needle(source: _Source) -> _Layout:
    return _numbers(source, 0)


def _multi_key_needle(source: _Source) -> _Layout:
    return _numbers(source, OTHERS)


def _multi_value_needle(source: _Source) -> _Layout:
    key, values = source.key(), source.distinct(source.value, VALUES)
    lines = [f"One access number of the {key} is {value}.\n" for value in values]
    return _Layout(
        f"{VALUES} access numbers of the {key} are hidden in the notes below. Remember them.\n",
        tuple(_Needle(line, at) for line, at in zip(lines, source.spread(VALUES), strict=True)),
        source.filler(),
        f"\nQuestion: What are the {VALUES} access numbers of the {key}, in the order of the notes?\n"
        f"Answer: The access numbers of the {key} are",
        f" {', '.join(values)}",
    )


def _variable_tracking(source: _Source) -> _Layout:
    values = source.distinct(source.value, CHAINS)
    names = source.distinct(source.name, CHAINS * NAMES)
    needles = []
    for chain, value in enumerate(values):
        own = names[chain * NAMES :][:NAMES]
        lines = [
            f"Let {own[0]} be {value}.\n",
            *(f"Let {b} be {a}.\n" for a, b in pairwise(own)),
        ]
        needles += [
            _Needle(line, at, chain == 0) for line, at in zip(lines, source.spread(NAMES), strict=True)
        ]
    return _Layout(
        "Some lines of the notes below give a name a value, or the value of another name. Remember them.\n",
        tuple(needles),
        source.filler(),
        f"\nQuestion: Which {NAMES} names have the value {values[0]}, in the order of the notes?\n"
        f"Answer: The names with the value {values[0]} are",
        f" {', '.join(names[:NAMES])}",
    )


def _common_words(source: _Source) -> _Layout:
    words = source.rng.sample(WORDS, len(WORDS))
    common, rare = sorted(words[:COMMON]), words[COMMON:]
    return _Layout(
        f"{COMMON} words of the list below occur much more often than all others. Remember them.\n",
        (),
        _word_list(common, rare, source.rng),
        f"\nQuestion: Which {COMMON} words occur most often in the list, in alphabetical order?\n"
        f"Answer: The {COMMON} most common words are",
        f" {', '.join(common)}",
    )


def _word_list(common: Sequence[str], rare: Sequence[str], rng: Random) -> Iterator[str]:
    """Yields lines without end: in each block all common words, and the next rare ones."""
    at = 0
    while True:
        others = [rare[(at + i) % len(rare)] for i in range(BLOCK - len(common))]
        at += len(others)
        block = [*common, *others]
        rng.shuffle(block)
        yield from (f"{word}\n" for word in block)


TASKS: Mapping[str, Callable[[_Source], _Layout]] = {
    "single_needle": _single_needle,
    "multi_key_needle": _multi_key_needle,
    "multi_value_needle": _multi_value_needle,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
}
# What the others ask for lies everywhere in the text.
WITH_DEPTH = ("single_needle", "multi_key_needle")


class Haystack:
    """Makes samples with one tokenizer. Raises OptionError for what is none, and for filler without text."""

    def __init__(self, tokenizer: Any, filler: str | None = None) -> None:
        if not callable(tokenizer):
            raise OptionError(
                f"the tokenizer is {tokenizer!r}; give one that turns text into ids when it is called, "
                "such as AutoTokenizer.from_pretrained(...)"
            )
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        if not self._encode(PROBE):
            raise OptionError(f"the tokenizer, a {type(tokenizer).__name__}, makes no tokens of {PROBE!r}")
        self._text = () if filler is None else tuple(line for line in split(filler) if self._encode(line))
        if filler is not None and not self._text:
            raise OptionError("the filler holds no text; leave it out for sentences of our own")
        self._before = self._special()
        self._newline = self._encode("\n")[-1:]

    def sample(self, task: str, length: int, depth: float, number: int, seed: int) -> Sample:
        """Returns sample `number` of a task, exactly `length` tokens with its answer.

        The same arguments make the same sample; another depth moves the needle and changes nothing else.
        Raises OptionError where so few tokens do not hold the task.
        """
        layout = TASKS[task](_Source(Random(f"{seed}/{task}/{length}/{number}"), self._text, depth))
        intro = [*self._before, *self._encode(layout.intro)]
        tail, answer = self._tail(layout.question, layout.answer)
        needles = [self._encode(needle.line) for needle in layout.needles]
        room = length - len(intro) - len(tail) - sum(map(len, needles))
        if room < LEAST_FILLER:
            raise OptionError(
                f"{length} tokens are too few for the task {task!r}: with its question and its answer it "
                f"takes {length - room + LEAST_FILLER} at least"
            )
        middle, spans = _placed(self._pieces(layout.filler, room), layout.needles, needles)
        found = [(len(intro) + a, len(intro) + b) for a, b in spans]
        return Sample((*intro, *middle, *tail), length - answer, tuple(found))

    def _pieces(self, filler: Iterator[str], room: int) -> list[list[int]]:
        """Returns filler of exactly `room` tokens; its last line is cut, and ends as a line."""
        found: list[list[int]] = []
        while room:
            ids = self._encode(next(filler))
            if len(ids) > room:
                ids = ids[: room - len(self._newline)] + self._newline
            room -= len(ids)
            found += [ids[i : i + PIECE] for i in range(0, len(ids), PIECE)]
        return found

    def _tail(self, question: str, answer: str) -> tuple[list[int], int]:
        """Returns the tokens of question and answer as one text, and how many of them are the answer's."""
        both, alone = self._encode(question + answer), self._encode(question)
        same = next((i for i, (a, b) in enumerate(zip(both, alone, strict=False)) if a != b), len(alone))
        return both, len(both) - same

    def _special(self) -> list[int]:
        """Returns the tokens that the tokenizer puts before a text."""
        whole, plain = self._ids(PROBE, True), self._encode(PROBE)
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[: next(starts, 0)]

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._ids(text, False)
        return self._known[text]

    def _ids(self, text: str, special: bool) -> list[int]:
        try:
            return list(map(int, self._tokenizer(text, add_special_tokens=special)["input_ids"]))
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise OptionError(
                f"the tokenizer, a {type(self._tokenizer).__name__}, does not turn text into ids: "
                f"tokenizer(text, add_special_tokens=False)['input_ids'] fails with {error!r}"
            ) from error


def _placed(
    pieces: Sequence[list[int]], needles: Sequence[_Needle], lines: Sequence[list[int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the filler with needles between its pieces, and where those lie that are asked for."""
    ends = [0, *accumulate(map(len, pieces))]
    at = [min(range(len(ends)), key=lambda i: abs(ends[i] - n.depth * ends[-1])) for n in needles]
    found: list[int] = []
    spans = []
    for boundary in range(len(ends)):
        for number in (i for i, place in enumerate(at) if place == boundary):
            if needles[number].asked:
                spans.append((len(found), len(found) + len(lines[number])))
            found += lines[number]
        if boundary < len(pieces):
            found += pieces[boundary]
    return found, spans
