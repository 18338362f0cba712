"""Wording: what the synthetic tasks are written in; no sentence holds a digit, so values are told apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random

__all__ = ["ADJECTIVES", "OBJECTS", "WORDS", "repeated", "sentences", "split"]

_OPENINGS = (
    "In the early morning",
    "Late in the afternoon",
    "After a long rain",
    "On most market days",
    "Before the ferry left",
    "While the kettle warmed",
    "Behind the old mill",
    "Near the quiet square",
    "Towards the end of summer",
    "When the fog had lifted",
    "Along the coastal road",
    "At the edge of the orchard",
    "During the first frost",
    "Under the wide bridge",
    "Soon after the bells",
    "On the way home",
)
_PEOPLE = (
    "the baker",
    "a tired postman",
    "the schoolchildren",
    "some fishermen",
    "the gardener",
    "an elderly couple",
    "the station master",
    "a young painter",
    "the neighbours",
    "the night watchman",
    "a travelling musician",
    "the carpenter",
    "the librarian",
    "a group of walkers",
    "the shepherd",
    "the innkeeper",
)
_DEEDS = (
    "talked about the weather",
    "carried baskets of apples",
    "repaired a wooden fence",
    "watched the boats return",
    "shared bread and cheese",
    "looked for a lost umbrella",
    "swept leaves from the path",
    "listened to a distant song",
    "planned a small celebration",
    "waited for news from town",
    "polished the brass handles",
    "told a story about the sea",
    "sorted letters by street",
    "fed the ducks on the pond",
    "painted the shutters green",
    "drank tea without hurry",
)
_ENDINGS = (
    "and nobody minded the delay",
    "until the lamps were lit",
    "as they had done for years",
    "though the wind was cold",
    "and the dog slept through it",
    "while clouds moved over the hills",
    "with great patience",
    "which made everyone smile",
    "because there was little else to do",
    "and the day passed gently",
    "as if time had stopped",
    "and the radio played softly",
    "before anyone else arrived",
    "and then it was quiet again",
    "even though it was a holiday",
    "and the windows stood open",
)

# An adjective and an object name what has a number.
_ADJECTIVES = """
amber copper crimson golden hidden hollow ivory marble narrow northern purple rusty scarlet silver
southern velvet
"""
_OBJECTS = """
anchor archive beacon cabinet compass engine fountain gallery harbour lantern locker observatory
pavilion tower vault workshop
"""

# No word begins with another one, so that a word that was cut short is none of them.
_WORDS = """
acorn actor album angle ankle apron arrow attic autumn badge bamboo banner barrel basket beaver bench
berry blanket bottle branch breeze brick bronze bubble bucket button cactus camera candle canoe carpet
castle cattle cellar cement cherry chimney circus clover coffee collar comet cookie corner cotton cradle
crystal curtain daisy dancer desert dinner doctor dolphin dragon drawer eagle elbow emerald falcon
farmer feather fiddle finger flute forest fossil garlic ginger glacier goblet grain guitar hammer
helmet honey hotel island jacket jewel jungle kettle kitten ladder lemon lizard magnet mantle maple
meadow melon mirror monkey mountain muscle napkin needle nephew noodle ocean olive onion orange oyster
paddle palace parrot pebble pencil pepper piano pigeon pillow planet pocket poem potato prairie puddle
pumpkin rabbit ribbon river rocket saddle salmon sandal school scissors shadow shelter shovel spider
spoon squirrel stable statue storm sugar summit sunset tailor teapot temple thunder ticket tiger tomato
trumpet tunnel turtle umpire uncle valley violin wagon walnut whistle willow window winter wizard
yogurt zebra
"""

ADJECTIVES, OBJECTS, WORDS = (tuple(text.split()) for text in (_ADJECTIVES, _OBJECTS, _WORDS))

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


def sentences(rng: Random) -> Iterator[str]:
    """Yields sentences without end, a line each."""
    parts = (_OPENINGS, _PEOPLE, _DEEDS, _ENDINGS)
    while True:
        opening, person, deed, ending = (rng.choice(part) for part in parts)
        yield f"{opening} {person} {deed} {ending}.\n"


def split(text: str) -> tuple[str, ...]:
    """Returns the sentences of a text, a line each."""
    return tuple(f"{piece}\n" for piece in _SENTENCE.split(text.strip()) if piece)


def repeated(lines: Sequence[str], rng: Random) -> Iterator[str]:
    """Yields lines without end in their order, from any of them on."""
    start = rng.randrange(len(lines))
    while True:
        yield from lines[start:]
        start = 0
