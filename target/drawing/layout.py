# SPDX-License-Identifier: Apache-2.0
"""Places boxes in layers, each below all that use it, with few crossings and mostly straight lines.

The usual three steps (Sugiyama): layers by the longest path; the order in a layer by the middle of the
neighbours, some sweeps up and down; places by what the neighbours want, as near as the order permits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

SWEEPS = 12
BOX_GAP = 36.0
BEND_WIDTH = 12.0  # of a line that passes a layer
SHELF_WIDTH = 2400.0
PART_GAP = 52.0  # between what is not connected
LAYER_GAP = 88.0
STRAIGHTNESS = 8.0  # how much more a line that passes counts than a box

Point = tuple[float, float]


@dataclass
class Placed:
    """A box, or the place where a long line passes a layer. x is its middle, y its upper edge."""

    key: str
    width: float
    height: float
    rank: int = 0
    x: float = 0
    y: float = 0
    bend: bool = False
    up: list[Placed] = field(default_factory=list, repr=False)
    down: list[Placed] = field(default_factory=list, repr=False)


@dataclass
class Layout:
    """``routes``: for each line the points to go through, from its upper end to its lower one."""

    boxes: dict[str, Placed]
    routes: list[list[Point]]
    width: float
    height: float


def place(sizes: Mapping[str, tuple[float, float]], lines: Sequence[tuple[str, str]]) -> Layout:
    """Sizes are (width, height) by key; lines are pairs of keys, the upper one first. What is not connected
    stands side by side."""
    boxes = {key: Placed(key, *measure) for key, measure in sizes.items()}
    chains: dict[int, list[Placed]] = {}
    shelves = _Shelves()
    for part in _parts(boxes, lines):
        own = {key: boxes[key] for key in part}
        inside = [(i, line) for i, line in enumerate(lines) if line[0] in own]
        _rank(own, [line for _, line in inside])
        chains |= {i: _chain(own[above], own[below]) for i, (above, below) in inside}
        layers = _layers(own.values())
        _order(layers)
        _put(layers)
        shelves.add([placed for layer in layers for placed in layer])
    routes = _routes([chains[i] for i in range(len(lines))])
    return Layout(boxes, routes, shelves.width, shelves.height)


class _Shelves:
    """Parts that are not connected, from left to right, and on a new shelf where one would be too long."""

    def __init__(self) -> None:
        self.width = 0.0
        self.height = 0.0
        self._right = 0.0
        self._top = 0.0

    def add(self, part: list[Placed]) -> None:
        left = min(placed.x - placed.width / 2 for placed in part)
        width = max(placed.x + placed.width / 2 for placed in part) - left
        if self._right and self._right + width > SHELF_WIDTH:
            self._right, self._top = 0.0, self.height + LAYER_GAP
        for placed in part:
            placed.x += self._right - left
            placed.y += self._top
            self.height = max(self.height, placed.y + placed.height)
        self.width = max(self.width, self._right + width)
        self._right += width + PART_GAP


def _parts(boxes: Iterable[str], lines: Sequence[tuple[str, str]]) -> list[list[str]]:
    """The keys of boxes that are connected, in the order of the first of them; single ones at the end."""
    near: dict[str, list[str]] = {key: [] for key in boxes}
    for above, below in lines:
        near[above].append(below)
        near[below].append(above)
    seen: set[str] = set()
    parts = []
    for key in near:
        part, todo = [], [key]
        while todo:
            found = todo.pop()
            if found not in seen:
                seen.add(found)
                part.append(found)
                todo += near[found]
        if part:
            parts.append([key for key in near if key in set(part)])
    return sorted(parts, key=lambda part: len(part) == 1)


# ---- layers ----


def _rank(boxes: Mapping[str, Placed], lines: Sequence[tuple[str, str]]) -> None:
    """Each box below its users, and these no higher than they have to be."""
    for _ in boxes:  # a line can move a box down as often as there are boxes
        moved = False
        for above, below in lines:
            if boxes[below].rank <= boxes[above].rank:
                boxes[below].rank = boxes[above].rank + 1
                moved = True
        if not moved:
            break
    for box in sorted(boxes.values(), key=lambda box: -box.rank):
        used = [boxes[below].rank for above, below in lines if above == box.key]
        if used and sum(below == box.key for _, below in lines) <= len(used):  # then lines get no longer
            box.rank = min(used) - 1


def _chain(above: Placed, below: Placed) -> list[Placed]:
    """A line's ends, and a bend in each layer between them."""
    bends = [Placed("", BEND_WIDTH, 0, rank, bend=True) for rank in range(above.rank + 1, below.rank)]
    chain = [above, *bends, below]
    for upper, lower in itertools.pairwise(chain):
        upper.down.append(lower)
        lower.up.append(upper)
    return chain


def _layers(boxes: Iterable[Placed]) -> list[list[Placed]]:
    """All that is in each layer, in the order of a walk from the top."""
    seen: dict[int, Placed] = {}

    def visit(start: Placed) -> None:
        todo = [start]
        while todo:
            placed = todo.pop()
            if id(placed) not in seen:
                seen[id(placed)] = placed
                todo += reversed(placed.down)

    for box in boxes:
        if not box.up:
            visit(box)
    layers: list[list[Placed]] = [[] for _ in range(max((p.rank for p in seen.values()), default=-1) + 1)]
    for placed in seen.values():
        layers[placed.rank].append(placed)
    return layers


# ---- order ----


def _order(layers: list[list[Placed]]) -> None:
    best, fewest = [list(layer) for layer in layers], _crossings(layers)
    for sweep in range(SWEEPS):
        if not fewest:
            break
        _sweep(layers, down=sweep % 2 == 0)
        _exchange(layers)
        crossings = _crossings(layers)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best


def _sweep(layers: list[list[Placed]], down: bool) -> None:
    for layer in layers if down else reversed(layers):
        places = {id(p): i for other in layers for i, p in enumerate(other)}

        def middle(placed: Placed, places: dict[int, int] = places) -> float:
            near = placed.up if down else placed.down
            if not near:
                return places[id(placed)]
            return sum(places[id(other)] for other in near) / len(near)

        layer.sort(key=middle)


def _exchange(layers: list[list[Placed]]) -> None:
    """Neighbours change places where that makes for fewer crossings."""
    for layer in layers:
        places = {id(placed): i for other in layers for i, placed in enumerate(other)}
        for i in range(len(layer) - 1):
            left, right = layer[i], layer[i + 1]
            if _crossing(left, right, places) > _crossing(right, left, places):
                layer[i], layer[i + 1] = right, left


def _crossing(left: Placed, right: Placed, places: Mapping[int, int]) -> int:
    """How often lines of the two cross when they stand so."""
    pairs = ((left.up, right.up), (left.down, right.down))
    return sum(places[id(a)] > places[id(b)] for ours, theirs in pairs for a in ours for b in theirs)


def _crossings(layers: list[list[Placed]]) -> int:
    total = 0
    for upper, lower in itertools.pairwise(layers):
        places = {id(placed): i for i, placed in enumerate(lower)}
        ends = [sorted(places[id(below)] for below in placed.down) for placed in upper]
        flat = [end for group in ends for end in group]
        total += sum(1 for i, a in enumerate(flat) for b in flat[i + 1 :] if b < a)
    return total


# ---- places ----


def _put(layers: list[list[Placed]]) -> None:
    y = 0.0
    for layer in layers:
        tallest = max((placed.height for placed in layer), default=0.0)
        for placed in layer:
            placed.y = y
            if placed.bend:
                placed.height = tallest
        y += tallest + LAYER_GAP
        _settle(layer, [0.0] * len(layer))
    for sweep in range(2 * SWEEPS):
        ends = (True, False) if sweep >= 2 * SWEEPS - 3 else (sweep % 2 == 0, sweep % 2 == 1)
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            _settle(layer, [_wanted(placed, *ends) for placed in layer])


def _wanted(placed: Placed, from_above: bool, from_below: bool) -> float:
    near = (placed.up if from_above else []) + (placed.down if from_below else [])
    return sum(other.x for other in near) / len(near) if near else placed.x


def _settle(layer: list[Placed], wanted: list[float]) -> None:
    """As near to where they want to be as keeps them apart (least squares: neighbours in conflict share)."""
    offsets = [0.0]
    for left, right in itertools.pairwise(layer):
        gap = BEND_WIDTH if left.bend and right.bend else BOX_GAP
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + gap)
    groups: list[tuple[float, float, int]] = []  # sum of weighted wishes, weight, how many
    for placed, wish, offset in zip(layer, wanted, offsets, strict=False):
        weight = STRAIGHTNESS if placed.bend else 1.0
        group = ((wish - offset) * weight, weight, 1)
        while groups and groups[-1][0] / groups[-1][1] > group[0] / group[1]:
            last = groups.pop()
            group = (last[0] + group[0], last[1] + group[1], last[2] + group[2])
        groups.append(group)
    starts = [total / weight for total, weight, number in groups for _ in range(number)]
    for placed, start, offset in zip(layer, starts, offsets, strict=False):
        placed.x = start + offset


# ---- lines ----


def _routes(chains: list[list[Placed]]) -> list[list[Point]]:
    """Lines leave and enter a box side by side, in the order of where they come from."""
    routes = []
    for chain in chains:
        above, below = chain[0], chain[-1]
        start = (_port(above, chain[1], above.down), above.y + above.height)
        bends = [
            point for bend in chain[1:-1] for point in ((bend.x, bend.y), (bend.x, bend.y + bend.height))
        ]
        routes.append([start, *bends, (_port(below, chain[-2], below.up), below.y)])
    return routes


def _port(box: Placed, other: Placed, others: list[Placed]) -> float:
    order = sorted(others, key=lambda placed: placed.x)
    at = next(i for i, placed in enumerate(order) if placed is other)
    return box.x + box.width * ((at + 0.5) / len(order) - 0.5)
