"""Schema: reads plain JSON data into typed values, and says by name what does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from clsa_compile.errors import PlanError

__all__ = ["Kind", "count", "each", "integer_keys", "named", "number", "record", "refuse", "text"]

T = TypeVar("T")
# Turns a value that stands at a place, such as "pools[2].anchor", into a typed one, or raises PlanError.
Kind = Callable[[Any, str], T]


def refuse(value: Any, where: str, expected: str) -> PlanError:
    """Returns the error for a value that is not what it should be."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return PlanError(f"{where or 'the plan'} is {shown}; expected {expected}")


def text(value: Any, where: str) -> str:
    """Reads a text."""
    if not isinstance(value, str):
        raise refuse(value, where, "a text")
    return value


def number(value: Any, where: str) -> float:
    """Reads a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(value, where, "a finite number")
    try:
        read = float(value)
    except OverflowError:  # a whole number beyond all of them
        read = math.inf
    if not math.isfinite(read):
        raise refuse(value, where, "a finite number")
    return read


def count(value: Any, where: str) -> int:
    """Reads a whole number from 0, of 63 bits as sizes have."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise refuse(value, where, "a whole number from 0")
    return value


def each(kind: Kind[T]) -> Kind[tuple[T, ...]]:
    """Returns the kind of a list of one kind."""

    def read(value: Any, where: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise refuse(value, where, "a list")
        return tuple(kind(entry, f"{where}[{i}]") for i, entry in enumerate(value))

    return read


def integer_keys(kind: Kind[T]) -> Kind[dict[int, T]]:
    """Returns the kind of an object whose names are whole numbers."""

    def read(value: Any, where: str) -> dict[int, T]:
        if not isinstance(value, dict) or not all(re.fullmatch("[0-9]{1,18}", key) for key in value):
            raise refuse(value, where, "an object whose names are layers' numbers")
        return {int(key): kind(entry, f"{where}[{key}]") for key, entry in value.items()}

    return read


def named(kind: Kind[T]) -> Kind[dict[str, T]]:
    """Returns the kind of an object with names of any kind."""

    def read(value: Any, where: str) -> dict[str, T]:
        if not isinstance(value, dict):
            raise refuse(value, where, "an object")
        return {key: kind(entry, f"{where}.{key}") for key, entry in value.items()}

    return read


def record(fields: Mapping[str, Kind[Any]]) -> Kind[dict[str, Any]]:
    """Returns the kind of an object with exactly these fields."""

    def read(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(value, where, "an object")
        inside = f" in {where}" if where else ""
        for problem, names in (
            ("unknown fields", sorted(set(value) - set(fields))),
            ("missing fields", sorted(set(fields) - set(value))),
        ):
            if names:
                raise PlanError(f"{problem}{inside}: {', '.join(names)}; expected: {', '.join(fields)}")
        prefix = f"{where}." if where else ""
        return {name: kind(value[name], f"{prefix}{name}") for name, kind in fields.items()}

    return read
