"""Anchors: which layers are to choose tokens, from what it costs to follow them; pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

__all__ = ["best", "flipped", "followers", "grown", "improved", "moves", "pair_cost", "uniform"]

Anchors = tuple[int, ...]


def uniform(layers: int, count: int) -> Anchors:
    """Returns `count` of so many layers, evenly spread, the first among them."""
    return tuple(i * layers // count for i in range(count))


def followers(anchors: Sequence[int], layers: int) -> dict[int, tuple[int, ...]]:
    """Returns the layers that follow each anchor, up to the next one; anchors without any are left out."""
    ends = (*anchors[1:], layers)
    found = {a: tuple(range(a + 1, end)) for a, end in zip(anchors, ends, strict=True)}
    return {a: members for a, members in found.items() if members}


def best(cost: Sequence[Sequence[float]]) -> list[tuple[int, ...]]:
    """Returns for every count from 1 to L the anchors of least total cost, exactly, by dynamic programming.

    cost[a][l] is what layer l > a costs when it follows anchor a, [L, L]. The first layer is always one.
    """
    layers = len(cost)
    infinite = float("inf")
    # after[a][e]: what layers a + 1 to e - 1 cost when they follow a.
    after = [[0.0] * (layers + 1) for _ in range(layers)]
    for a in range(layers):
        for end in range(a + 2, layers + 1):
            after[a][end] = after[a][end - 1] + cost[a][end - 1]
    # least[e]: the least cost of layers below e with so many anchors, and the last of them.
    least = [infinite] + [after[0][end] for end in range(1, layers + 1)]
    lasts = [[0] * (layers + 1)]
    found = [_traced(lasts, layers)]
    for count in range(2, layers + 1):
        fewer, least, last = least, [infinite] * (layers + 1), [0] * (layers + 1)
        for end in range(count, layers + 1):
            for a in range(count - 1, end):
                total = fewer[a] + after[a][end]
                if total < least[end]:
                    least[end], last[end] = total, a
        lasts.append(last)
        found.append(_traced(lasts, layers))
    return found


def _traced(lasts: Sequence[Sequence[int]], layers: int) -> tuple[int, ...]:
    anchors = []
    end = layers
    for last in reversed(lasts):
        anchors.append(last[end])
        end = last[end]
    return tuple(reversed(anchors))


def pair_cost(cost: Sequence[Sequence[float]], anchors: Sequence[int]) -> float:
    """Returns what all followers of anchors cost, each by its pair, as in `best`."""
    groups = followers(anchors, len(cost)).items()
    return sum(cost[anchor][member] for anchor, members in groups for member in members)


def grown(anchors: Sequence[int], layers: int, cost: Callable[[Anchors], float]) -> Anchors:
    """Returns anchors with one more: the layer with which all of it costs least."""
    free = [layer for layer in range(layers) if layer not in anchors]
    return min((tuple(sorted((*anchors, layer))) for layer in free), key=cost)


def moves(anchors: Sequence[int], layers: int) -> list[Anchors]:
    """Returns anchors with a single one moved elsewhere, in all ways. The first layer stays one."""
    return [
        tuple(sorted((*(a for a in anchors if a != anchor), to)))
        for anchor in anchors
        if anchor != 0
        for to in range(1, layers)
        if to not in anchors
    ]


def improved(
    cost: Callable[[tuple[int, ...], float], float],
    anchors: Sequence[int],
    layers: int,
    *,
    passes: int = 3,
    least: float = 1e-3,
) -> tuple[int, ...]:
    """Returns anchors that no move of a single one makes better by `least` of their cost, or after `passes`.

    For costs that are not a sum over pairs, where `best` is only a start. cost(anchors, most) may give up
    with infinity where it is above `most`. The first layer stays one.
    """
    current = tuple(sorted(anchors))
    lowest = cost(current, float("inf"))
    for _ in range(passes):
        before = lowest
        for anchor in current:
            able = [move for move in moves(current, layers) if anchor not in move]
            costs = [cost(move, lowest) for move in able]
            if costs and min(costs) < lowest * (1 - least):
                lowest = min(costs)
                current = able[costs.index(lowest)]
        if lowest >= before:
            break
    return current


def flipped(
    losses: Callable[[Anchors], Sequence[float]],
    anchors: Anchors,
    proposals: Callable[[Anchors], Iterable[Anchors]],
    tries: int,
) -> Anchors:
    """Returns anchors after greedy flips: each goes over to a proposal under which a model loses less.

    losses(anchors) is what is lost on each of several texts. A proposal is taken where the mean gain exceeds
    its standard error, so that what only fits these texts is not. Ends after so many `tries`, or when there
    is nothing more to try.
    """
    seen = {anchors}
    current: Sequence[float] = ()
    for _ in range(tries):
        proposed = next((p for p in proposals(anchors) if p not in seen), None)
        if proposed is None:
            break
        seen.add(proposed)
        current = current or losses(anchors)
        found = losses(proposed)
        if _is_less(found, current):
            anchors, current = proposed, found
    return anchors


def _is_less(losses: Sequence[float], than: Sequence[float]) -> bool:
    gains = [b - a for a, b in zip(losses, than, strict=True)]
    error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return statistics.fmean(gains) > error
