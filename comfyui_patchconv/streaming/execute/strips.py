"""Which rows of which step each strip of a pass computes: integers, worked out before the strip is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..graph.node import Node, Span
from ..plan.bands import reach
from ..plan.schedule import Pass


class StepRows(NamedTuple):
    """What a strip does for one step.

    rows: those that it computes, none if they are equal. begin: the first row that is there, computed or kept before.
    needs: the rows of each input that is read by rows. keep: the first row that the next strip reads again; past the
    last for none.
    """

    node: Node
    begin: int
    rows: Span
    needs: Sequence[Span]
    keep: int


class Rows:
    """How far a pass has come: rows done of each step, and where the rows begin that are kept of it.

    bands: the rows of each target that are wanted. height: of the highest of these.
    """

    def __init__(self, one_pass: Pass, bands: Mapping[Node, Span]) -> None:
        self.order, self.recomputed, self.bands = one_pass.order, one_pass.recomputed, bands
        self.height = max((last - first for first, last in bands.values()), default=0)
        self.roots = {target.node: target.rows for target in one_pass.targets}
        inside = set(self.order)
        reached = reach(one_pass.order, bands)
        self.done = {node: reached.get(node, (0, 0))[0] for node in self.order}
        self._ends = {node: reached.get(node, (0, 0))[1] for node in self.order}
        # Of stored maps that are read for themselves.
        self.given = {node: bands[node][0] for node in self.roots if node not in inside}
        self.kept: dict[Node, int] = {}
        self._next: dict[Node, int] = {}
        self._rows_of = {
            node: [(source, source in inside) for source, dim in zip(node.inputs, node.dims) if dim is not None]
            for node in self.order
        }
        self._readers: dict[Node, list[tuple[Node, int]]] = {}
        for node in self.order:
            for place, (source, _) in enumerate(self._rows_of[node]):
                self._readers.setdefault(source, []).append((node, place))
        self._look_ahead()

    def copy(self) -> Rows:
        """The same state, for a strip that may fail."""
        other = object.__new__(Rows)
        other.__dict__.update(self.__dict__)
        other.done, other.given, other.kept = dict(self.done), dict(self.given), dict(self.kept)
        other._next = dict(self._next)
        return other

    def wanted(self, last: int) -> dict[Node, Span]:
        """The rows of each root up to row `last` of the tallest band, and as much of the others."""
        found = {}
        for root, (first, stop) in self.bands.items():
            end = first + (stop - first) * last // max(self.height, 1)
            begin = self.given[root] if root in self.given else self.done[root]
            if first < stop and begin < end:
                found[root] = (begin, end)
        return found

    def advance(self, wanted: dict[Node, Span]) -> list[StepRows]:
        """What has to be done for `wanted` rows; it counts as done."""
        spans: dict[Node, Span] = dict(wanted)
        needs: dict[Node, Sequence[Span]] = {}
        todo: dict[Node, Span] = {}
        for node in reversed(self.order):  # readers before what they read
            span = spans.get(node)
            if span is None:
                continue
            low, high = span
            done = self.done[node]
            if node not in self.recomputed and low > done:  # rows between may be wanted later, or read by another
                low = done if node in self.roots else min(low, self.next_read(node))
            start = low if node in self.recomputed else max(low, done)
            if start >= high:
                todo[node] = (high, high)
                continue
            assert node.step is not None
            todo[node] = (start, high)
            needs[node] = spans_of = node.step.needs(start, high)
            for (source, inside), (a, b) in zip(self._rows_of[node], spans_of):
                if inside and a < b:
                    before = spans.get(source)
                    spans[source] = (a, b) if before is None else (min(a, before[0]), max(b, before[1]))
        for node, (_, high) in todo.items():
            self.done[node] = max(self.done[node], high)
        for node, (_, high) in wanted.items():
            if node in self.given:
                self.given[node] = max(self.given[node], high)
        self._look_ahead()
        return [self._work(node, todo[node], needs.get(node, ())) for node in self.order if node in todo]

    def _work(self, node: Node, rows: Span, needs: Sequence[Span]) -> StepRows:
        """What is done for a step of which `rows` are computed; what the next strip will read counts as kept."""
        begin = self.kept.pop(node, rows[0])
        keep = rows[1] if node in self.recomputed else max(self.next_read(node), begin)
        if (
            begin < rows[0] == rows[1] and keep < self.done[node]
        ):  # no new ones come: they stay where this strip reads them
            keep = begin
        if node not in self.recomputed and node in self._readers and keep < self.done[node]:
            self.kept[node] = keep
        else:
            keep = self.done[node]
        return StepRows(node, begin, rows, needs, keep)

    def read_of_stored(self, work: StepRows) -> list[tuple[int, int, int]]:
        """Of each stored map that a strip reads for a step: bytes of a row, rows in all, and rows that are read."""
        along = [(source, dim) for source, dim in zip(work.node.inputs, work.node.dims) if dim is not None]
        return [
            (source.bytes // max(source.shape[dim], 1), source.shape[dim], high - low)
            for (source, dim), (_, inside), (low, high) in zip(along, self._rows_of[work.node], work.needs)
            if not inside
        ]

    def _look_ahead(self) -> None:
        """For each step, the first of its rows that is still to be computed, for itself or for what reads it."""
        for node in reversed(self.order):
            self._next[node] = self.next_read(node) if node in self.recomputed else self.done[node]

    def next_read(self, source: Node) -> int:
        """The first row of `source` that a step of this pass still reads."""
        low = self.roots.get(source, source.rows)
        for node, place in self._readers.get(source, ()):
            row = self._next[node]
            if row < self._ends[node] and node.step is not None:
                low = min(low, node.step.needs(row, row + 1)[place][0])
        return low

    def first_needed(self, source: Node) -> int:
        """The first row of a stored map that is still to be read."""
        return min(self.next_read(source), self.given.get(source, source.rows if source.dim is not None else 1 << 62))


class Parts:
    """A strip in several parts: rows of the steps on the way to row `last` of the tallest target.

    Where a small map is computed from a large one through many steps, its first row needs many rows of that: they come
    in parts no larger than a usual strip's, of `strip_rows` of the tallest target, or `finer` times as many. part: the
    next one of `parts`, from 1 on; the last is the strip itself.
    """

    def __init__(self, rows: Rows, one_pass: Pass, last: int, strip_rows: int, finer: int) -> None:
        height = max(one_pass.height, 1)
        strip = min(strip_rows, height)
        trial = rows.copy()
        works = trial.advance(trial.wanted(last))
        aims = {
            work.node: work.rows for work in works if work.node not in rows.recomputed and work.rows[0] < work.rows[1]
        }
        at_once = [(node.row_bytes, node.rows, high - low) for node, (low, high) in aims.items()]
        at_once += [read for work in works for read in rows.read_of_stored(work)]
        usual = max((row_bytes * (-(-side * strip // height) + 2) for row_bytes, side, _ in at_once), default=1)
        widest = max((row_bytes * count for row_bytes, _, count in at_once), default=0)
        self.part, self.parts = 1, max(round(widest / max(usual, 1)), 1) * finer
        self._ends = {node: high for node, (_, high) in aims.items()}
        self._share = max(((high - low) / node.rows for node, (low, high) in aims.items()), default=0.0)
        self._most = max((high - low for low, high in aims.values()), default=1)

    @property
    def is_last(self) -> bool:
        return self.part == self.parts

    @property
    def rows(self) -> int:
        """Rows that come at once, at most."""
        return -(-self._most // self.parts)

    def wanted(self, rows: Rows) -> dict[Node, Span]:
        """The rows of the next part that are not done."""
        left = self._share * (1 - self.part / self.parts)  # of each map, so that no step needs rows beyond another's
        ends = {node: int(high - left * node.rows) for node, high in self._ends.items()}
        return {node: (rows.done[node], end) for node, end in ends.items() if rows.done[node] < end}
