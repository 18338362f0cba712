"""The layer graph: layers from top to bottom, with edges for keys and for chosen tokens, before and after.

All numbers are pixels. A side is one picture; rows of both stand at the same heights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from clsa_compile.html.reading import Reading, after, before, colours, folded
from clsa_compile.ir.plan import Plan, SitePlan
from clsa_compile.layers import Layer
from clsa_compile.report_text import ranges

__all__ = ["COLOURS", "Arrows", "Graph", "Node", "Side", "graph_of"]

# Of the style sheet: --g0 and so on.
COLOURS = 6
ROW, HEIGHT, MARGIN = 40, 28, 8
NODE, CHIP, KEYS, GAP = 124, 72, 38, 19
# Edges that go by rows run in tracks: so far from each other, and no wider than this together.
TRACK, TRACKS = 8, 56
CORNER = 5
# Fewer layers than this are drawn one by one.
FEW = 12


@dataclass(frozen=True, slots=True)
class Node:
    """A box of the layers first to last: an attention, what chooses tokens, or a pair of keys and values.

    kind: "dense", "sparse" or "left"; "index", "distilled" or "mass"; "keys". (x, y): its left end, at half
    its height. word stands behind the label, says is its description. colour is None where no group has it.
    """

    x: float
    y: float
    width: int
    kind: str
    label: str
    word: str
    colour: int | None
    first: int
    last: int
    says: str


@dataclass(frozen=True, slots=True)
class Arrows:
    """The edges of one group: lines, and the heads at their ends. kind: "index" or "keys"."""

    kind: str
    colour: int | None
    lines: str
    heads: str


@dataclass(frozen=True, slots=True)
class Side:
    """The model "before" or "after", as a picture."""

    name: str
    width: int
    height: int
    spine: float
    nodes: tuple[Node, ...]
    chips: tuple[Node, ...]
    arrows: tuple[Arrows, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """Both sides, layer by layer, and with layers that are alike drawn as one where there are many."""

    whole: tuple[Side, Side]
    folded: tuple[Side, Side] | None


def graph_of(plan: Plan, layers: Sequence[Layer]) -> Graph:
    """Returns the picture of a plan; `layers` are all its attentions, in order."""
    sides = (before(plan, layers), after(plan))
    by_ordinal = {layer.ordinal: layer for layer in layers}
    rows = tuple((site.ordinal,) for site in plan.sites)
    runs = folded(plan, by_ordinal, sides)
    whole = _sides(plan, by_ordinal, sides, rows)
    is_shorter = len(rows) > FEW and len(runs) < len(rows)
    return Graph(whole, _sides(plan, by_ordinal, sides, runs) if is_shorter else None)


def _sides(
    plan: Plan,
    layers: Mapping[int, Layer],
    sides: tuple[dict[int, Reading], dict[int, Reading]],
    rows: Sequence[Sequence[int]],
) -> tuple[Side, Side]:
    painted = colours(plan, COLOURS)
    return (
        _Drawing("before", plan, layers, sides[0], rows, painted).side(),
        _Drawing("after", plan, layers, sides[1], rows, painted).side(),
    )


class _Drawing:
    """One side, while it is drawn."""

    def __init__(
        self,
        name: str,
        plan: Plan,
        layers: Mapping[int, Layer],
        readings: Mapping[int, Reading],
        rows: Sequence[Sequence[int]],
        painted: Mapping[int, int],
    ) -> None:
        self._name = name
        self._sites = {site.ordinal: site for site in plan.sites}
        self._layers = layers
        self._readings = readings
        self._rows = rows
        self._painted = painted
        self._row_of = {ordinal: place for place, row in enumerate(rows) for ordinal in row}
        self._choosing = self._followers(lambda r: (r.chooser, r.among))
        self._holding = self._followers(lambda r: (r.keys,))
        has_chips = any(reading.chooses for reading in readings.values())
        self._left = _tracks(self._spans(self._choosing))
        self._right = _tracks(self._spans(self._holding))
        lane = _lane(self._left)
        self._chip = MARGIN + lane
        self._node = self._chip + (CHIP + GAP if has_chips else 0)
        self._keys = self._node + NODE + GAP
        self._width = self._keys + KEYS + MARGIN + _lane(self._right)

    def side(self) -> Side:
        height = 2 * MARGIN + ROW * len(self._rows)
        nodes = tuple(self._attention(row) for row in self._rows)
        chips = tuple(self._chips())
        arrows = tuple(a for a in (*self._index_arrows(), *self._key_arrows()) if a.lines)
        return Side(self._name, self._width, height, self._node + 16, nodes, chips, arrows)

    def _followers(self, sources: Callable[[Reading], tuple[int | None, ...]]) -> dict[int, list[int]]:
        """Returns by row the later rows that something of it goes to."""
        found: dict[int, list[int]] = {}
        for ordinal, reading in self._readings.items():
            for source in sources(reading):
                if source is None or source == ordinal:
                    continue
                rows = found.setdefault(self._row_of[source], [])
                if self._row_of[ordinal] not in rows:
                    rows.append(self._row_of[ordinal])
        return found

    def _spans(self, followers: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, int]]:
        return {row: (row, max(others)) for row, others in followers.items()}

    def _y(self, row: int) -> int:
        return MARGIN + ROW * row + ROW // 2

    def _attention(self, row: Sequence[int]) -> Node:
        site, layer = self._sites[row[0]], self._layers[row[0]]
        kind = _kind(site, self._readings[row[0]], self._name)
        label = self._label(row)
        return Node(
            x=self._node,
            y=self._y(self._row_of[row[0]]),
            width=NODE,
            kind=kind,
            label=label,
            word=kind,
            colour=self._painted.get(row[0]),
            first=row[0],
            last=row[-1],
            says=f"{_layers(row)} {label}, {self._name}: {_says(kind, layer, self._name)}",
        )

    def _label(self, row: Sequence[int]) -> str:
        return ranges((self._layers[ordinal].layer for ordinal in row), 2)

    def _chips(self) -> Iterator[Node]:
        """Yields indexers, and keys and values."""
        for place, row in enumerate(self._rows):
            reading, whose = self._readings[row[0]], f"of {_layers(row)} {self._label(row)}"
            if reading.chooses:
                is_index = reading.chooses != "mass"
                yield Node(
                    x=self._chip,
                    y=self._y(place),
                    width=CHIP,
                    kind=reading.chooses,
                    label=_counted(len(row)) if is_index else "chooses",
                    word="",
                    colour=self._choice_colour(place),
                    first=row[0],
                    last=row[-1],
                    says=f"the {'indexer' if is_index else 'attention'} {whose} chooses tokens",
                )
            if reading.keys in row:
                yield Node(
                    x=self._keys,
                    y=self._y(place),
                    width=KEYS,
                    kind="keys",
                    label="K V",
                    word="",
                    colour=None,
                    first=row[0],
                    last=row[-1],
                    says=f"keys and values {whose}",
                )

    def _index_arrows(self) -> Iterator[Arrows]:
        choosing = [place for place, row in enumerate(self._rows) if self._readings[row[0]].chooses]
        own = [place for place in choosing if self._reads_own(self._rows[place])]
        # What a layer's attention chooses for others only leads away from it.
        away = [place for place in choosing if place not in own and self._is_mass(place)]
        edge = self._chip + CHIP
        for places, start, end, head in ((own, edge, self._node, _right), (away, self._node, edge, _left)):
            stop = end - 6 if head is _right else end + 6
            for colour in dict.fromkeys(map(self._colour, places)):
                heights = [self._y(place) for place in places if self._colour(place) == colour]
                lines = "".join(f"M{start} {y}H{stop}" for y in heights)
                yield Arrows("index", colour, lines, "".join(head(end, y) for y in heights))
        for place, others in self._choosing.items():
            yield self._trunk(place, others)

    def _trunk(self, place: int, others: Sequence[int]) -> Arrows:
        """Returns the edges from what is chosen in one row to all that read it."""
        x, y, last = MARGIN + _spread(self._left[place], self._left), self._y(place), self._y(max(others))
        lines = [f"M{self._chip} {y}H{x + CORNER}q{-CORNER} 0 {-CORNER} {CORNER}V{last - CORNER}"]
        heads = []
        for other in others:
            # Of a layer that was chosen for and chooses, the arrow ends at its own choice.
            end = self._chip if self._readings[self._rows[other][0]].chooses else self._node
            lines.append(f"M{x} {self._y(other) - CORNER}q0 {CORNER} {CORNER} {CORNER}H{end - 6}")
            heads.append(_right(end, self._y(other)))
        return Arrows("index", self._choice_colour(place), "".join(lines), "".join(heads))

    def _is_mass(self, place: int) -> bool:
        return self._readings[self._rows[place][0]].chooses == "mass"

    def _reads_own(self, row: Sequence[int]) -> bool:
        reading = self._readings[row[0]]
        # A layer that chooses again attends to what it chose.
        return bool(reading.chooses) and reading.chooser is not None

    def _colour(self, place: int) -> int | None:
        return self._painted.get(self._rows[place][0]) if self._name == "after" else None

    def _choice_colour(self, place: int) -> int | None:
        """Returns the colour of those that read what is chosen in a row."""
        rows = [self._rows[other][0] for other in self._choosing.get(place, ())]
        readers = [first for first in rows if self._readings[first].chooser in self._rows[place]]
        return self._colour(self._row_of[readers[0]] if readers else place)

    def _key_arrows(self) -> Iterator[Arrows]:
        edge = self._node + NODE
        own = [place for place, row in enumerate(self._rows) if self._readings[row[0]].keys in row]
        yield Arrows(
            "keys",
            None,
            "".join(f"M{self._keys} {self._y(place)}H{edge + 6}" for place in own),
            "".join(_left(edge, self._y(place)) for place in own),
        )
        for place, others in self._holding.items():
            x = self._keys + KEYS + MARGIN + _spread(self._right[place], self._right)
            y = self._y(place)
            trunk = f"H{x - CORNER}q{CORNER} 0 {CORNER} {CORNER}V{self._y(max(others)) - CORNER}"
            ends = [
                f"M{x} {self._y(other) - CORNER}q0 {CORNER} {-CORNER} {CORNER}H{edge + 6}" for other in others
            ]
            heads = [_left(edge, self._y(other)) for other in others]
            yield Arrows("keys", None, "".join([f"M{self._keys + KEYS} {y}{trunk}", *ends]), "".join(heads))


def _counted(number: int) -> str:
    """Returns the label of indexers that are drawn as one."""
    if number == 1:
        return "index"
    return f"index \u00d7{number}" if number < 10 else f"\u00d7{number}"


def _kind(site: SitePlan, reading: Reading, side: str) -> str:
    if site.action == "left":
        return "left"
    if side == "before":
        return "dense" if reading.chooser is None else "sparse"
    return "sparse" if site.action == "sparse" else "dense"


def _says(kind: str, layer: Layer, side: str) -> str:
    if kind == "left":
        return f"left as it was: {layer.reason}"
    if side == "after":
        return layer.runs
    return "attends to the tokens that an index selects" if kind == "sparse" else "attends to all tokens"


def _layers(row: Sequence[int]) -> str:
    return "layer" if len(row) == 1 else "layers"


def _tracks(spans: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """Returns a track for each span of rows, so that no two in one track meet."""
    found: dict[int, int] = {}
    ends: list[int] = []
    for place, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        track = next((i for i, end in enumerate(ends) if end < first), len(ends))
        ends[track:] = [last, *ends[track + 1 :]]
        found[place] = track
    return found


def _lane(tracks: Mapping[int, int]) -> int:
    """Returns how wide tracks are together."""
    return min(TRACKS, TRACK * (1 + max(tracks.values()))) + MARGIN if tracks else 0


def _spread(track: int, tracks: Mapping[int, int]) -> float:
    """Returns where a track is in its lane."""
    return round(track * min(TRACK, TRACKS / (1 + max(tracks.values()))), 2)


def _right(x: float, y: float) -> str:
    return f"M{x - 7} {y - 4}L{x - 1} {y}L{x - 7} {y + 4}Z"


def _left(x: float, y: float) -> str:
    return f"M{x + 7} {y - 4}L{x + 1} {y}L{x + 7} {y + 4}Z"
