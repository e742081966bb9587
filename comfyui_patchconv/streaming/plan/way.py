"""The steps of one pass: in which order, what each strip shares with the one before it, and where it could be cut.

None of it depends on a budget: one `Ways` serves all plans that are tried.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from math import inf
from typing import Any, Optional

from ..graph.node import Node, ancestors
from .copies import times_copied, times_made

_ABOUT = 0.2
"""How far from half of its line buffers a pass may be parted, of that half, for the sake of small maps between."""

_MIDDLE = 0.5
_PLACES = tuple(place / 16 for place in range(1, 16) if place != 8)
"""Where else strips may end between which more rows are kept than in the middle, of the rows of the roots."""


def cheap_to_recompute(order: Sequence[Node], roots: Collection[Node]) -> set[Node]:
    """The steps that are as cheap to recompute from stored maps as their rows are to keep."""
    cheap: set[Node] = set()
    inside = set(order)
    for node in order:
        assert node.step is not None
        near = all(source not in inside or source in cheap for source in node.inputs)
        if node not in roots and (node.step.moves or node.step.repeats or (node.step.cheap and near)):
            cheap.add(node)
    return cheap


class Way:
    """The steps that lead from stored maps to `roots`. dims: along which roots are read that are stored themselves.

    order: these steps. height: rows of the tallest root. recomputed: the steps that are recomputed rather than kept in
    line buffers. readers: of each map, the steps that read it row by row, and as which of their inputs by rows. shared:
    of each step, how many rows a strip and the one before it both read, in the middle; kept: at most.
    buffered: the steps that have a line buffer.
    last_reads: see `_last_reads`. outer: of each step, the stored maps that it reads row by row, along which dimension,
    and as which of its inputs by rows. widest: bytes of the largest map, or of what a step copies of one that it reads
    or makes, if that is more. copied: bytes of all stored maps of which steps copy rows.
    """

    def __init__(self, roots: Sequence[Node], order: list[Node], dims: Mapping[Node, int]) -> None:
        self.roots, self.order = list(roots), order
        nodes = self.order or self.roots
        self.height = max(root.shape[dims[root]] if root in dims else root.rows for root in self.roots)
        self.device = max(nodes, key=lambda node: node.bytes).device
        self.recomputed = cheap_to_recompute(self.order, set(self.roots))
        self.readers: dict[Node, list[tuple[Node, int]]] = {}
        self.outer: dict[Node, list[tuple[Node, int, int]]] = {}
        inside = set(self.order)
        for node in self.order:
            place = 0
            for source, dim in zip(node.inputs, node.dims):
                if dim is not None:
                    self.readers.setdefault(source, []).append((node, place))
                    if source not in inside:
                        self.outer.setdefault(node, []).append((source, dim, place))
                    place += 1
        copied = {source for node, read in self.outer.items() for source, *_ in read if times_copied(node, source)}
        self.copied = sum(source.bytes for source in copied)
        made = (node.bytes * times_made(node) for node in nodes)
        self.widest = int(max(*made, *(source.bytes for source in copied), 0))
        self.work = sum(node.bytes for node in self.order)
        self.shared = self._rows_of_two_strips_at(_MIDDLE)
        self.kept = self._most_rows_kept()
        self.buffered = [node for node in self.order if node in self.readers and node not in self.recomputed]
        self.last_reads = self._last_reads()

    @cached_property
    def frontiers(self) -> list[list[Node]]:
        """Where this pass could be two: for each height on the way, the maps that later steps read of the part with at
        most, or at least, so many rows."""
        found: list[list[Node]] = []
        inside = set(self.order)
        for height in dict.fromkeys(node.rows for node in self.order):
            for sign in (1, -1):
                before: set[Node] = set()
                for node in self.order:
                    if sign * node.rows > sign * height:
                        continue
                    if all([source not in inside or source in before for source in node.inputs]):
                        before.add(node)
                frontier = self._read_behind(before)
                if frontier and frontier not in found:
                    found.append(frontier)
        return found

    @cached_property
    def halfway(self) -> list[Node]:
        """What to store between two passes, each of which has about half of the line buffers: the fewest bytes."""
        lines = {node: node.row_bytes * self.shared[node] for node in self.buffered}
        half, so_far, to_read, least, parted = sum(lines.values()) / 2, 0, 0, inf, 0
        read_last_at = [0] * len(self.order)
        for place, (node, last) in enumerate(zip(self.order, self.last_reads)):
            so_far += lines.get(node, 0)
            if last is not None:
                to_read += node.bytes
                read_last_at[last] += node.bytes
            to_read -= read_last_at[place]
            if abs(so_far - half) <= _ABOUT * half and to_read < least:
                least, parted = to_read, place + 1
        return self._read_behind(set(self.order[:parted]))

    def _read_behind(self, before: Collection[Node]) -> list[Node]:
        """The maps of the steps `before` that the others read; empty where this is no way to part the roots."""
        if not before or len(before) == len(self.order) or any(root in before for root in self.roots):
            return []
        behind = (source for node in self.order if node not in before for source in node.inputs if source in before)
        return list(dict.fromkeys(behind))

    def _last_reads(self) -> list[Optional[int]]:
        """Of each step, the place in the order where its rows are read last; None where they are another step's."""
        last: dict[Node, int] = {}
        for place in range(len(self.order) - 1, -1, -1):
            node = self.order[place]
            read = last.setdefault(node, place)
            shows = node.shows
            for source in node.inputs:
                last[source] = max(last.get(source, 0), read if source is shows else place)
        return [None if node.shows is not None else last[node] for node in self.order]

    def _most_rows_kept(self) -> dict[Node, int]:
        """The most of these rows, wherever a strip ends: they differ where maps lie one below the other."""
        found = dict(self.shared)
        if any(map(_reads_in_turn, self.order)):
            for place in _PLACES:
                for node, rows in self._rows_of_two_strips_at(place).items():
                    found[node] = max(found[node], rows)
        return found

    def _rows_of_two_strips_at(self, place: float) -> dict[Node, int]:
        """Of each step, how many rows two strips both read of which the first ends at this part of the roots."""
        done: dict[Node, int] = {}
        kept: dict[Node, int] = {}
        ahead: dict[Node, int] = {}  # the first row that is still to be read, or computed
        ends = {root: max(int(root.rows * place), 1) for root in self.roots}
        for node in reversed(self.order):  # readers before what they read
            high, low = ends.get(node, 0), node.rows
            for reader, number in self.readers.get(node, ()):
                assert reader.step is not None
                if done[reader]:
                    high = max(high, reader.step.needs(done[reader] - 1, done[reader])[number][1])
                if ahead[reader] < reader.rows:
                    low = min(low, reader.step.needs(ahead[reader], ahead[reader] + 1)[number][0])
            done[node] = max(min(high, node.rows), 0 if place != _MIDDLE else 1)
            ahead[node] = min(low, done[node]) if node in self.recomputed else done[node]
            kept[node] = max(done[node] - low, 0)
        return kept


def _reads_in_turn(node: Node) -> bool:
    """Whether a step reads several maps, and not all of them for its first row: they lie one below the other."""
    if node.step is None or not node.step.moves or len(node.inputs) < 2 or len(node.by_rows) < 2:
        return False
    return any(first == last for first, last in node.step.needs(0, 1))


class Ways:
    """Ways and their steps, found once for each state of what is stored, whatever the budget."""

    def __init__(self) -> None:
        self._states: dict[tuple[int, Node], int] = {}
        self._steps: dict[Any, list[Node]] = {}
        self._ways: dict[Any, Way] = {}

    def after(self, state: int, stored: Iterable[Node]) -> int:
        """The state when these are stored too, in this order."""
        for node in stored:
            state = self._states.setdefault((state, node), len(self._states) + 1)
        return state

    def steps_to(self, nodes: Sequence[Node], stored: Collection[Node], state: int) -> list[Node]:
        """The steps that lead to `nodes`: see `ancestors`. state: that of `stored`; 0 while nothing is."""
        key = state, tuple(nodes)
        if key not in self._steps:
            self._steps[key] = ancestors(nodes, stored)
        return self._steps[key]

    def way(
        self, roots: Sequence[Node], stored: Collection[Node], state: int, dims: Optional[Mapping[Node, int]] = None
    ) -> Way:
        """The way to `roots`. dims: of roots that are stored already."""
        key = state, tuple(roots), tuple((dims or {}).items())
        if key not in self._ways:
            self._ways[key] = Way(roots, self.steps_to(roots, stored, state), dims or {})
        return self._ways[key]
