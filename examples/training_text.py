"""Bytes to train on that every machine has: Python's standard library, and pairs to be recalled.

A pair is two bytes that no text has, a key and its value, side by side somewhere in a text. Where the key
comes again, only a model that finds the first pair knows what follows. Pairs teach a small model to look far
back, and test it.
"""

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

VOCABULARY = 256
KEYS, VALUES = 128, 192  # the first of 64 bytes each, which ASCII leaves free
SYMBOLS = 64
# Tables, and what some distributions leave out.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "encodings", "idlelib", "lib2to3", "ensurepip"}


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out, uint8 below 128; `checksum` tells texts apart."""

    train: Tensor
    held_out: Tensor
    checksum: int


def standard_library() -> list[Path]:
    """Lists the sources of the standard library, whose pydoc_data is prose."""
    root = Path(os.__file__).parent
    return sorted(p for p in root.rglob("*.py") if LEFT_OUT.isdisjoint(p.relative_to(root).parts))


def read(paths: Iterable[Path], length: int) -> Text:
    """Reads files; one in ten, by its name, is held out, and of a single one the last tenth.

    Raises ValueError where that is too little text, OSError where a file cannot be read.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in paths:
        data = path.read_bytes().decode(errors="ignore").encode("ascii", errors="ignore")
        parts[zlib.crc32(path.name.encode()) % 10 == 0].append(data)
    if not all(parts):
        whole = b"\n".join(parts[0] + parts[1])
        cut = len(whole) * 9 // 10
        parts = [whole[:cut]], [whole[cut:]]
    train, held_out = (b"\n".join(part) for part in parts)
    for purpose, data in (("train on", train), ("hold out", held_out)):
        if len(data) < 8 * length:
            raise ValueError(
                f"{len(data)} bytes to {purpose} are too few for sequences of {length}: give at least "
                f"{8 * length}, that is longer or more files, or a smaller --length"
            )
    tensors = (torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (train, held_out))
    return Text(*tensors, checksum=zlib.crc32(held_out, zlib.crc32(train)))


def passages(data: Tensor, count: int, length: int, generator: Generator) -> Tensor:
    """Cuts passages [count, length], int64, from random places."""
    starts = torch.randint(len(data) - length + 1, (count, 1), generator=generator)
    return data[starts + torch.arange(length)].long()


def lesson(filler: Tensor, pairs: int, symbols: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Puts pairs of `symbols` keys into a passage [S]; returns it, and where a value can be known."""
    values = torch.randint(symbols, (symbols,), generator=generator)
    keys = torch.randint(symbols, (pairs,), generator=generator)
    places = torch.randint(len(filler) - 2 * pairs + 1, (pairs,), generator=generator).sort().values
    ids = insert(filler, places, keys, values[keys])
    again = (keys.unsqueeze(1) == keys).tril(-1).any(1)
    known = torch.zeros(len(filler), dtype=torch.bool)
    known[(places + 2 * torch.arange(pairs) + 1)[again]] = True
    return ids, known


def needle(filler: Tensor, depth: float, others: int, symbols: int, generator: Generator) -> Tensor:
    """Hides a pair at `depth` (0 to 1) of a passage [S], others anywhere; at the end it comes again."""
    keys = torch.randperm(symbols, generator=generator)[: others + 1]
    values = torch.randint(symbols, (others + 1,), generator=generator)
    room = len(filler) - 2 * (others + 2)
    places = torch.randint(room + 1, (others + 1,), generator=generator)
    places[0] = round(depth * room)
    order = places.argsort(stable=True)
    places = torch.cat((places[order], torch.tensor([room])))
    order = torch.cat((order, torch.tensor([0])))
    return insert(filler, places, keys[order], values[order])


def insert(filler: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Inserts pairs before the filler's bytes at ascending `places`, and cuts what no longer fits."""
    ids = torch.empty_like(filler)
    at = places + 2 * torch.arange(len(places))
    free = torch.ones(len(filler), dtype=torch.bool)
    free[at], free[at + 1] = False, False
    ids[at], ids[at + 1] = KEYS + keys, VALUES + values
    ids[free] = filler[: int(free.sum())]
    return ids
