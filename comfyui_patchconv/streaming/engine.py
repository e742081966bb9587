"""Evaluates a node strip by strip; every row of every step on the way is computed once.

Between two strips each step keeps the last rows that the next strip will read again (a line buffer), so halos cost
neither repeated work nor, through residual branches, work that doubles with depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from .. import planner
from ..geometry import strips
from ..memory import is_out_of_memory, keep_freed_blocks, release
from .buffers import FileBuffer
from .graph import Attend, Node, Normalise
from .rows import Rows, Statistics

Sink = Callable[[Tensor], None]


def store(node: Node, groups: int = 0, above: Optional[Node] = None) -> None:
    """Make `node` a stored map, with statistics of `groups` groups of channels if that is not 0.

    A map that is cheap to have again may be left unstored, as the run's plan says: it then has its statistics only.
    above: a node whose evaluation this is a part of. What else in it reads the same unstored maps, and is smaller, is
    stored too.
    """
    statistics = Statistics(groups) if groups and groups not in node.statistics else None
    if node.rows is None:
        if statistics is not None and _leave_unstored(node):
            Sweep([node], keep=True).run([statistics.add])
        else:
            _store_together([node, *_beside(node, above)], statistics)
    elif statistics is not None and not node.run.dry:
        for first, last in strips(node.height, _rows_that_suit(node, node.row_bytes)):
            statistics.add(node.rows.read(first, last))
    if statistics is not None:
        node.statistics[groups] = statistics


def whole(node: Node, result: bool = False) -> Tensor:
    """The map of `node` as one tensor. result: of the whole computation, which is never put elsewhere."""
    if node.rows is None:
        node.store(_as_one(node, node.shape, lambda tensor, first, last: tensor.narrow(-2, first, last - first), result))
    assert node.rows is not None
    return node.rows.whole()


def _store_together(nodes: list[Node], statistics: Optional[Statistics]) -> None:
    sweep = Sweep(nodes)
    stored = [
        Rows(node.run, node.shape, node.dtype, node.device, elsewhere)
        for node, elsewhere in zip(nodes, sweep.places([node.bytes for node in nodes]))
    ]

    def keep(strip: Tensor) -> None:
        if statistics is not None:
            statistics.add(strip)
        stored[0].append(strip)

    sweep.run([keep, *(rows.append for rows in stored[1:])])
    for node, rows in zip(nodes, stored):
        if node.run.dry:
            rows.pretend()
        node.store(rows)


def _as_one(
    node: Node, shape: tuple[int, ...], part: Callable[[Tensor, int, int], Tensor], result: bool = False
) -> Rows:
    """`node` evaluated into one new tensor of `shape`; `part(tensor, first, last)` is where rows go."""
    sweep = Sweep([node])
    (elsewhere,) = [False] if result else sweep.places([node.bytes])
    elsewhere = elsewhere and node.device.type == "cpu"
    if elsewhere and not node.run.dry:
        tensor = FileBuffer(node.bytes).empty(shape, node.dtype)
    else:
        tensor = torch.empty(shape, dtype=node.dtype, device=node.device)
    rows = Rows.of(tensor, node.run, counted=not elsewhere)
    first = 0

    def write(strip: Tensor) -> None:
        nonlocal first
        part(tensor, first, first + strip.shape[-2]).copy_(strip)
        first += strip.shape[-2]

    sweep.run([write])
    return rows


def _all_tokens(node: Node) -> Rows:
    """A map `[B, C, H, W]` as `[B, pixels, C]`."""
    batch, channels, height, width = node.shape

    def part(tensor: Tensor, first: int, last: int) -> Tensor:
        rows = tensor.narrow(1, first * width, (last - first) * width)
        return rows.transpose(1, 2).unflatten(2, (last - first, width))

    return _as_one(node, (batch, height * width, channels), part)


class Sweep:
    """One evaluation of maps of equal height, from top to bottom.

    Stored maps that nothing else refers to are given up as it passes them, unless `keep`.
    """

    def __init__(self, roots: list[Node], keep: bool = False) -> None:
        self.roots, self.run_of = roots, roots[0].run
        for root in roots:
            _prepare(root)
        self.order = _producers_first(roots)
        self.dying = [] if keep else _dying(roots, self.order)
        self.strip_rows = _strip_rows(roots[0], self.order)
        self.workspace = _workspace(roots[0], self.order, self.strip_rows)

    def places(self, sizes: list[int]) -> list[bool]:
        """For each new map, of `sizes` bytes: whether it has to lie elsewhere than on the device."""
        run = self.run_of
        held, freed = run.held + self.workspace, sum(node.rows.bytes_held for node in self.dying if node.rows)
        places = []
        for size in sizes:
            places.append(not planner.fits(run.plan.budget, held, freed, size))
            if places[-1]:
                run.moved += size
            else:
                held += size
        self._new = sum(size for size, elsewhere in zip(sizes, places) if not elsewhere) - freed
        return places

    _new = 0

    def run(self, sinks: list[Sink]) -> None:
        """Give the rows of each root to its sink, in strips from top to bottom."""
        run, root = self.run_of, self.roots[0]
        run.note(self.workspace + max(self._new, 0))
        total = sum(node.bytes for node in self.order)
        if run.dry:
            run.progress(total)
            for node in self.dying:
                assert node.rows is not None
                node.rows.give_up(node.height)
            return
        if root.device.type == "cpu":
            keep_freed_blocks()
        state = _State(dict.fromkeys(self.order, 0), {})
        strip_rows, first = self.strip_rows, 0
        while first < root.height:
            last = min(first + strip_rows, root.height)
            ahead = _State(dict(state.done), dict(state.lines))
            strips_made = self._strips(ahead, first, last)
            if strips_made is None:
                release(root.device)
                strip_rows = (last - first + 1) // 2
                continue
            for sink in sinks:
                sink(strips_made.pop(0))
            state = ahead
            for node in self.dying:
                assert node.rows is not None
                node.rows.give_up(_next_row(node, self.order, state))
            run.progress(total * last // root.height - total * first // root.height)
            first = last

    def _strips(self, state: _State, first: int, last: int) -> Optional[list[Tensor]]:
        """Rows of the roots; None where memory ran out, which is raised for a single row."""
        try:
            return _strip(self.roots, self.order, state, first, last)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or last - first == 1:
                raise
            return None


@dataclass
class _State:
    """How far an evaluation has come: rows done of each step, and the last rows of those that are read again."""

    done: dict[Node, int]
    lines: dict[Node, tuple[int, Tensor]]


def _strip(roots: list[Node], order: list[Node], state: _State, first: int, last: int) -> list[Tensor]:
    done, lines = state.done, state.lines
    wanted = dict.fromkeys(roots, (first, last))
    for node in reversed(order):  # consumers before producers
        low, high = wanted.get(node, (done[node], done[node]))
        start = max(low, done[node])
        if start < high:
            assert node.step is not None
            for source, (a, b) in zip(node.inputs, node.step.needs(start, high, node.sizes)):
                c, d = wanted.get(source, (a, b))
                wanted[source] = (min(a, c), max(b, d))
    pieces: dict[Node, tuple[int, Tensor]] = {}
    for node in order:
        if node not in wanted:
            continue
        low, high = wanted[node]
        start = max(low, done[node])
        parts = []
        if node in lines:
            low, line = lines[node]
            parts.append(line)
        if start < high:
            parts.append(_compute(node, start, high, pieces))
            done[node] = high
        pieces[node] = (low, parts[0] if len(parts) == 1 else torch.cat(parts, -2))
        del parts
        for source in set(node.inputs):  # what no later step of this strip reads goes now
            if source in pieces and source not in roots and _last_reader(source, order, wanted) is node:
                _keep_line(source, order, state, *pieces.pop(source))
    return [pieces.pop(root)[1] for root in roots]


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


def _last_reader(source: Node, order: list[Node], wanted: dict[Node, tuple[int, int]]) -> Optional[Node]:
    readers = [node for node in order if node in wanted and source in node.inputs]
    return readers[-1] if readers else None


def _keep_line(node: Node, order: list[Node], state: _State, begin: int, rows: Tensor) -> None:
    """Keep of `node`, of which `rows` from row `begin` on are there, what the next strip reads again."""
    low, done = max(_next_row(node, order, state), begin), state.done[node]
    state.lines.pop(node, None)
    if low < done:
        state.lines[node] = (low, rows.narrow(-2, low - begin, done - low).clone())


def _next_row(source: Node, order: list[Node], state: _State) -> int:
    """The first row of `source` that is still to be read."""
    low = source.height
    for node in order:
        done = state.done[node]
        if done < node.height:
            assert node.step is not None
            for one, (a, _) in zip(node.inputs, node.step.needs(done, done + 1, node.sizes)):
                if one is source:
                    low = min(low, a)
    return low


def _prepare(root: Node) -> None:
    """Give every normalisation among the steps to `root` its statistics, and attention its keys and values."""
    while True:
        # No list of the steps may outlive this line: what it holds would count as in use.
        node = next((one for one in _producers_first([root]) if not getattr(one.step, "prepared", True)), None)
        if node is None:
            return
        if isinstance(node.step, Normalise):
            store(node.inputs[0], node.step.groups, root)
            node.step.prepare(node.inputs[0])
        elif isinstance(node.step, Attend):
            node.step.prepare(*(_all_tokens(source) for source in node.inputs[1:]))
            node.let_go(1)


def _leave_unstored(node: Node) -> bool:
    """Whether `node` is cheap to have again and the plan has it computed wherever it is read.

    Cheap is what a few steps make of a map of half its size or less. That one is stored then.
    """
    source = node
    while 2 * source.bytes > node.bytes:
        if len(source.inputs) != 1 or isinstance(source.step, (Normalise, Attend)):
            return False
        source = source.inputs[0]
    if not node.run.leaves_unstored(node.bytes):
        return False
    if source.rows is None:
        _store_together([source], None)
    return True


def _beside(node: Node, above: Optional[Node]) -> list[Node]:
    """What on the way to `above` reads an unstored map that `node` is computed from, and takes less room than that."""
    if above is None or node.run.plan.unstored_from is None:
        return []
    own = _producers_first([node])
    unstored = [one for one in own if one.statistics]
    return [
        one
        for one in _producers_first([above])
        if one is not above
        and one not in own
        and one.height == node.height
        and any(source in unstored and one.bytes < source.bytes for source in one.inputs)
        and all(getattr(step.step, "prepared", True) for step in _producers_first([one]))
    ]


def _producers_first(roots: list[Node]) -> list[Node]:
    """The steps that lead to `roots`, inputs before what reads them; stored maps are not steps."""
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node.rows is None and id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((source, False) for source in node.inputs)
    return order


def _dying(roots: list[Node], order: list[Node]) -> list[Node]:
    """Stored maps that go with this evaluation: each of their users is a step that nothing else refers to."""
    references: dict[Node, int] = {}
    stored = []
    for node in reversed(order):
        if node in roots or references.get(node, 0) == node.users:
            for source in node.inputs:
                references[source] = references.get(source, 0) + 1
                if source.rows is not None and source not in stored:
                    stored.append(source)
    return [node for node in stored if references[node] == node.users]


def _strip_rows(root: Node, order: list[Node]) -> int:
    """Rows of `root` in a strip: what its steps make of one, a few of them at a time, together suits the device."""
    return _rows_that_suit(root, max(_row_bytes(node) * node.height for node in order) // max(root.height, 1))


def _row_bytes(node: Node) -> int:
    return node.row_bytes + (node.step.row_bytes if node.step is not None else 0)


def _rows_that_suit(node: Node, row_bytes: int) -> int:
    target = planner.STRIP_BYTES.get(node.device.type, planner.STRIP_BYTES_ELSEWHERE) // 4
    return min(max(target // max(row_bytes, 1), 1), max(node.height, 1))


def _workspace(root: Node, order: list[Node], strip_rows: int) -> int:
    """Bytes that an evaluation takes beside stored maps: the widest step's strips, and the rows kept between strips."""
    share = strip_rows / max(root.height, 1)
    strips_of = [_row_bytes(node) * (share * node.height + 2) for node in order]
    lines = sum(2 * node.row_bytes for node in order)
    return int(_STRIPS_AT_ONCE * max(strips_of) + lines)


_STRIPS_AT_ONCE = 5
"""Strips of the widest step alive at once: with their halo rows, its result, and what a backend copies of them."""
