"""One pass over feature maps from top to bottom, strip by strip; every row of every step on the way is computed once.

Between two strips each step keeps the last rows that the next strip will read again (a line buffer), so halos cost
neither repeated work nor, through residual branches, work that doubles with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from .. import planner
from ..memory import is_out_of_memory, keep_freed_blocks, release, trim
from .buffers import AT_ONCE, lasting
from .graph import Node, RowLocal

Sink = Callable[[Tensor], None]

_STRIPS_AT_ONCE = 6
"""Strips of the widest step alive at once: with their halo rows, its result, and what a backend copies of them."""

_COPIES = 3
"""What the widest step takes beside the strips that wait: padded rows, and what a backend copies of them."""

_WEIGHTS = 8
"""What it costs a backend to have weights in its own order for each strip, against computing a map of their size."""

_STEP_BYTES_ELSEWHERE = 4 << 20
"""Bytes of a strip of an average step, on devices other than the CPU, below which telling the device what to do takes
longer than doing it. Not measured yet."""

_SHARE_FOR_COSTS = 8
"""Strips that are larger than suits a device, for the sake of such costs, take this part of a budget at most."""


def producers_first(roots: list[Node], stored: Sequence[Node] = ()) -> list[Node]:
    """The steps that lead to `roots`, in the order in which the program has them; stored maps are not steps, nor are
    those of `stored`.

    That order suits memory as the program's own does: a video's chunks are computed one after the other.
    """
    steps: list[Node] = []
    seen = set(stored)
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node.rows is None and node not in seen:
            seen.add(node)
            steps.append(node)
            stack.extend(node.inputs)
    return sorted(steps, key=lambda node: node.serial)


def rows_that_suit(height: int, row_bytes: int, device: torch.device) -> int:
    """Rows in a strip of a map of `height` rows, where one of them stands for `row_bytes` bytes.

    All strips that are alive at once take what suits a convolution's input and output.
    """
    target = planner.STRIP_BYTES.get(device.type, planner.STRIP_BYTES_ELSEWHERE) // _STRIPS_AT_ONCE
    return min(max(target // max(row_bytes, 1), 1), max(height, 1))


@dataclass
class _State:
    """How far a pass has come: rows done of each step, and the last rows of those that are read again."""

    done: dict[Node, int]
    lines: dict[Node, tuple[int, Tensor]]


class Sweep:
    """Computes `roots`, whose steps are all prepared, in strips of equal share.

    Stored maps that nothing else refers to are given up as it passes them, unless `keep`. device: where it computes;
    what it reads, and what comes of it, may lie elsewhere. workspace: bytes that it takes beside stored maps. stored:
    maps to be reckoned with as if they were.
    """

    def __init__(self, roots: list[Node], keep: bool = False, stored: Sequence[Node] = ()) -> None:
        self._run = roots[0].run
        order = producers_first(roots, stored)
        read = {source for node in order for source in node.inputs}
        # A root that others read too goes to its sink through a step of its own, which tells how far that has come.
        self._roots = [
            Node(root.run, root.shape, root.dtype, root.device, RowLocal(lambda pieces: pieces[0]), [root])
            if root in read
            else root
            for root in roots
        ]
        self._order = producers_first(self._roots, stored)
        self._readers: dict[Node, list[Node]] = {}
        for node in self._order:
            for source in dict.fromkeys(node.inputs):
                self._readers.setdefault(source, []).append(node)
        self._dying = [] if keep else self._that_die()
        self._main = max(self._roots, key=lambda root: root.height)
        share = max(node.row_bytes * node.height for node in self._order) // max(self._main.height, 1)
        self.device = max(self._order, key=lambda node: node.bytes).device
        suitable = rows_that_suit(self._main.height, share, self.device)
        self._strip_rows = max(suitable, self._rows_worth_their_costs(share))
        self._line_bytes = self._bytes_of_lines()
        self.workspace = self._bytes_beside_maps()
        self._growth = self._elsewhere = 0
        self._lines: dict[Node, list[Optional[Tensor]]] = {}

    def frontiers(self) -> list[list[Node]]:
        """Where this pass could be two: for each height on the way, the maps of no more or of no fewer rows, as are all
        before them, that later steps read."""
        found: list[list[Node]] = []
        for height in dict.fromkeys(node.height for node in self._order):
            for sign in (1, -1):
                before: set[Node] = set()
                for node in self._order:
                    ready = all(source.rows is not None or source in before for source in node.inputs)
                    if ready and sign * node.height <= sign * height:
                        before.add(node)
                after = [node for node in self._order if node not in before]
                frontier = dict.fromkeys(source for node in after for source in node.inputs if source in before)
                if frontier and not before.intersection(self._roots) and list(frontier) not in found:
                    found.append(list(frontier))
        return found

    def places(self, sizes: list[int], movable: bool = True, in_strips: bool = True) -> list[bool]:
        """For each new map, of `sizes` bytes: whether it has to lie elsewhere than on the device, if it may.

        in_strips: they grow as others go. What is one tensor takes its memory at once, but on the CPU, where the
        system gives it when it is written to.
        """
        run = self._run
        going = [node.rows.bytes_that_go for node in self._dying if node.rows]
        held, freed = run.held + self.workspace, sum(here for here, _ in going)
        if not in_strips and self.device.type != "cpu":
            freed = 0
        places = []
        for size in sizes:
            places.append(movable and size > 0 and not planner.fits(run.plan.budget, held, freed, size))
            if places[-1]:
                run.moved += size
                self._elsewhere += size
            else:
                held += size
                self._growth += size
        self._growth -= freed
        self._elsewhere -= sum(elsewhere for _, elsewhere in going)
        return places

    def rows_in_strip(self, node: Node) -> int:
        """Rows of `node` that come at once, at most."""
        return -(-node.height * self._strip_rows // max(self._main.height, 1))

    def run(self, sinks: list[Sink]) -> None:
        """Give the rows of each root to its sink, from top to bottom."""
        run, height = self._run, self._main.height
        run.note(self._growth, self._elsewhere, self.workspace)
        work = sum(node.bytes for node in self._order)
        if run.dry:
            for node in self._dying:
                assert node.rows is not None
                node.rows.give_up(node.height)
            run.progress(work)
            return
        if self.device.type == "cpu":
            keep_freed_blocks()
            run.excess()  # the first time: from here on
            self._hand_back(planner.ALLOCATOR_BYTES["cpu"])
        strip_rows, first = self._strip_rows, 0
        state = self._filled(min(strip_rows, height))
        while first < height:
            last = min(first + strip_rows, height)
            ahead = _State(dict(state.done), dict(state.lines))
            strips = self._strips(ahead, self._wanted(state, first, last), last - first)
            if strips is None:
                release(self.device)
                strip_rows = (last - first + 1) // 2
                continue
            for sink in sinks:
                strip = strips.pop(0)
                if strip is not None:
                    sink(strip)
                del strip
            state = ahead
            self._hand_back(planner.ALLOCATOR_BYTES["cpu"] + self._line_bytes)
            for node in self._dying:
                assert node.rows is not None
                node.rows.give_up(self._next_row(node, state.done))
            run.progress(work * last // height - work * first // height)
            first = last

    def _hand_back(self, usual: int) -> None:
        """Hand memory that was freed back to the system where it and what is in use are more than `usual` bytes, beside
        what is held and what that was at the worst moment: glibc often takes new memory for an aligned block of a size
        that it has just freed."""
        if self.device.type == "cpu" and self._run.excess() > usual + self._run.spare():
            trim()

    def _filled(self, rows: int) -> _State:
        """The state from which the first `rows` rows are no more work than later ones.

        Where a small map is computed from a large one through many steps, its first row needs many rows of that. All
        steps on the way come that far in strips of the usual size, so that none is wider than what a plan counts.
        """
        state = _State(dict.fromkeys(self._order, 0), {})
        aims = {
            node: high
            for node, (_, high) in self._wanted(state, 0, rows).items()
            if node in self._readers and node.step is not None and not node.step.moves
        }
        shares = {node: -(-node.height * rows // max(self._main.height, 1)) + 2 for node in aims}
        usual = max((node.row_bytes * shares[node] for node in aims), default=1)
        parts = max((round(node.row_bytes * high / max(usual, 1)) for node, high in aims.items()), default=1)
        most = max((high / node.height for node, high in aims.items()), default=0.0)
        most_rows = max(aims.values(), default=1)
        part = 1
        while part < parts:
            ahead = _State(dict(state.done), dict(state.lines))
            left = most * (1 - part / parts)  # of each map's height, so that no step needs rows beyond another's aim
            wanted = {
                node: (state.done[node], int(high - left * node.height))
                for node, high in aims.items()
                if state.done[node] < int(high - left * node.height)
            }
            if self._strips(ahead, self._with_needs(state, wanted), -(-most_rows // parts)) is None:
                release(self.device)
                part, parts = 2 * part - 1, 2 * parts
                continue
            state, part = ahead, part + 1
            self._hand_back(planner.ALLOCATOR_BYTES["cpu"] + self._line_bytes)
        return state

    def _strips(
        self, state: _State, wanted: dict[Node, tuple[int, int]], rows: int
    ) -> Optional[list[Optional[Tensor]]]:
        """The next rows of each root; None where memory ran out, which is raised for a single row."""
        try:
            return self._advance(state, wanted)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
            return None

    def _wanted(self, state: _State, first: int, last: int) -> dict[Node, tuple[int, int]]:
        """The rows of each step for rows `[first, last)` of the main root, and for as much of the others."""
        wanted = {}
        for root in self._roots:
            rows = state.done[root], root.height * last // self._main.height
            if rows[0] < rows[1]:
                wanted[root] = rows
        return self._with_needs(state, wanted)

    def _with_needs(self, state: _State, wanted: dict[Node, tuple[int, int]]) -> dict[Node, tuple[int, int]]:
        """`wanted`, with what it is computed from."""
        done = state.done
        for node in reversed(self._order):  # consumers before producers
            low, high = wanted.get(node, (done[node], done[node]))
            assert node.step is not None
            start = low if node.step.moves else max(low, done[node])
            if start < high:
                for source, (a, b) in zip(node.inputs, node.step.needs(start, high, node.sizes)):
                    c, d = wanted.get(source, (a, b))
                    wanted[source] = (min(a, c), max(b, d))
        return wanted

    def _advance(self, state: _State, wanted: dict[Node, tuple[int, int]]) -> list[Optional[Tensor]]:
        """Compute what is wanted; the rows of each root among it."""
        done = state.done
        after = {node: max(wanted[node][1], before) if node in wanted else before for node, before in done.items()}
        pieces: dict[Node, tuple[int, Tensor]] = {}
        for node in self._order:
            if node not in wanted:
                continue
            assert node.step is not None
            low, high = wanted[node]
            start = low if node.step.moves else max(low, done[node])
            parts = []
            if node in state.lines:
                low, line = state.lines[node]
                parts.append(line)
            if start < high:
                parts.append(_compute(node, start, high, pieces))
                self._hand_back(self.workspace - self._copies)
                done[node] = after[node]
            pieces[node] = (low, parts[0] if len(parts) == 1 else torch.cat(parts, -2))
            del parts
            for source in dict.fromkeys(node.inputs):  # what no later step of this strip reads goes now
                if source in pieces and self._last_reader(source, wanted) is node:
                    self._keep_line(source, state, after, *pieces.pop(source))
            if node in self._readers and self._last_reader(node, wanted) is None:
                self._keep_line(node, state, after, *pieces.pop(node))
        return [pieces.pop(root)[1] if root in wanted else None for root in self._roots]

    def _last_reader(self, source: Node, wanted: dict[Node, tuple[int, int]]) -> Optional[Node]:
        return next((node for node in reversed(self._readers[source]) if node in wanted), None)

    def _keep_line(self, node: Node, state: _State, after: dict[Node, int], begin: int, rows: Tensor) -> None:
        """Keep of `node`, of which `rows` from row `begin` on are there, what the next strip reads again.

        after: the rows done of each step at the end of this strip.
        """
        assert node.step is not None
        if node.step.moves:
            return
        low, done = max(self._next_row(node, after), begin), after[node]
        _, before = state.lines.pop(node, (0, None))
        if low < done:
            again = rows.narrow(-2, low - begin, done - low)
            state.lines[node] = (low, self._other_line(node, before, again).copy_(again))

    def _other_line(self, node: Node, line: Optional[Tensor], rows: Tensor) -> Tensor:
        """Room for `rows` of `node`: of the two parts that take turns, the one that does not hold `line`."""
        pair = self._lines.setdefault(node, [None, None])
        index = int(line is not None and pair[0] is not None and line.data_ptr() == pair[0].data_ptr())
        room = pair[index]
        if room is None or room.shape[-2] < rows.shape[-2]:
            room = pair[index] = lasting(rows)
        return room.narrow(-2, 0, rows.shape[-2])

    def _next_row(self, source: Node, done: dict[Node, int]) -> int:
        """The first row of `source` that is still to be read, when so many rows of each step are done."""
        low = source.height
        for node in self._readers[source]:
            assert node.step is not None
            again = node.step.moves and node in self._readers
            row = self._next_row(node, done) if again else done[node]
            if row < node.height:
                for one, (a, _) in zip(node.inputs, node.step.needs(row, row + 1, node.sizes)):
                    if one is source:
                        low = min(low, a)
        return low

    def _that_die(self) -> list[Node]:
        """Stored maps that go with this pass: each of their users is a step that nothing else refers to."""
        references: dict[Node, int] = {}
        stored = []
        for node in reversed(self._order):
            if node in self._roots or references.get(node, 0) == node.users:
                for source in node.inputs:
                    references[source] = references.get(source, 0) + 1
                    if source.rows is not None and source not in stored:
                        stored.append(source)
        return [node for node in stored if references[node] == node.users]

    def _rows_worth_their_costs(self, row_bytes: int) -> int:
        """Rows in a strip whose maps outweigh what each strip costs whatever its size: many for a video's frames.

        row_bytes: of the widest step, for a row. A budget is not spent on it.
        """
        height, budget = self._main.height, self._run.plan.budget
        maps = max(sum(node.bytes for node in self._order), 1)
        weights = sum(node.step.weight_bytes for node in self._order if node.step is not None)
        rows = _WEIGHTS * weights * height // maps
        if self.device.type != "cpu":
            rows = max(rows, _STEP_BYTES_ELSEWHERE * len(self._order) * height // maps)
        for node in self._order:
            if node.step is not None and node.step.least_rows > 1:
                rows = max(rows, -(-node.step.least_rows * height // max(node.height, 1)))
        if budget is not None:
            alive = self._bytes_alive([node.bytes / max(height, 1) for node in self._order])
            row_bytes = max(_STRIPS_AT_ONCE * row_bytes, int(alive) + _COPIES * row_bytes)
            rows = min(rows, budget // _SHARE_FOR_COSTS // max(row_bytes, 1))
        return min(rows, max(height, 1))

    def _bytes_of_lines(self) -> int:
        """Bytes of the rows that are kept between strips, in two parts that take turns."""
        kept = [
            node.row_bytes * self._rows_again(node)
            for node in self._order
            if node in self._readers and node.step is not None and not node.step.moves
        ]
        return 2 * sum(kept)

    def _rows_again(self, source: Node) -> int:
        """How many rows of `source` two rows in succession of what is computed from it share."""
        again = 0
        for reader in self._readers.get(source, ()):
            assert reader.step is not None
            again = max(again, self._rows_again(reader) if reader.step.moves else _rows_shared(source, reader))
        return again

    def _bytes_beside_maps(self) -> int:
        """Bytes taken beside stored maps: a strip's rows, what the widest step adds to them, the rows kept between
        strips."""
        share = self._strip_rows / max(self._main.height, 1)
        strips = [node.row_bytes * (share * node.height + 2) for node in self._order]
        self._copies = int(_COPIES * max(strips))  # which come and go within a step
        widest = max(_STRIPS_AT_ONCE * max(strips), self._bytes_alive(strips) + self._copies)
        of_steps = max(node.step.workspace for node in self._order if node.step is not None)
        kept = self._line_bytes + planner.ALLOCATOR_BYTES.get(self.device.type, 0)
        return int(widest) + of_steps + kept + self._bytes_on_the_way()

    def _bytes_on_the_way(self) -> int:
        """Bytes of strips that come from elsewhere, and of those that leave where the roots may have to lie there.

        Those that a strip of this pass reads come whole and are put together then; the next one comes meanwhile.
        """
        share = self._strip_rows / max(self._main.height, 1)
        sources = {source.rows for node in self._order for source in node.inputs if source.rows is not None}
        coming = 0.0
        for rows in sources:
            if rows.strip_bytes:
                coming += 2 * share * rows.row_bytes * rows.shape[-2] + 3 * rows.strip_bytes
        if self.device.type == "cpu" or self._run.plan.budget is None:
            return int(coming)
        return int(coming) + AT_ONCE * sum(root.row_bytes * self.rows_in_strip(root) for root in self._roots)

    def _bytes_alive(self, strips: list[float]) -> float:
        """The most bytes of strips, of so many bytes each step's, that later steps still read."""
        size = dict(zip(self._order, strips))
        last: dict[Node, int] = {}
        for place in range(len(self._order) - 1, -1, -1):
            node = self._order[place]
            last.setdefault(node, place)
            looks = _looks_at(node)
            for source in node.inputs:
                last[source] = max(last.get(source, 0), last[node] if source is looks else place)
        going: dict[int, float] = {}
        alive = most = 0.0
        for place, node in enumerate(self._order):
            if _looks_at(node) is None:
                alive += size[node]
                going[last[node]] = going.get(last[node], 0.0) + size[node]
            most = max(most, alive)
            alive -= going.pop(place, 0.0)
        return most


def _looks_at(node: Node) -> Optional[Node]:
    """The map that a step gives back a part of as it is, in the same memory, such as some frames of it."""
    return node.inputs[0] if node.step is not None and node.step.moves and len(node.inputs) == 1 else None


def _rows_shared(source: Node, reader: Node) -> int:
    """How many rows of `source` two rows of `reader` in succession share."""
    assert reader.step is not None
    middle = reader.height // 2
    places = [place for place, node in enumerate(reader.inputs) if node is source]
    one, next_one = (reader.step.needs(row, row + 1, reader.sizes) for row in (middle, middle + 1))
    return max(max(one[place][1] - next_one[place][0], 0) for place in places)


def _compute(node: Node, start: int, high: int, pieces: dict[Node, tuple[int, Tensor]]) -> Tensor:
    assert node.step is not None
    inputs = []
    for source, (a, b) in zip(node.inputs, node.step.needs(start, high, node.sizes)):
        if source.rows is not None:
            inputs.append(source.rows.read(a, b))
        else:
            begin, piece = pieces[source]
            inputs.append(piece.narrow(-2, a - begin, b - a))
    return node.step.compute(start, high, inputs, node.sizes)
