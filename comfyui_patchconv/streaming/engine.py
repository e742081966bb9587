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
from .graph import Node, Normalise
from .rows import Rows, Statistics


def store(node: Node, groups: int = 0) -> None:
    """Make `node` a stored map, with statistics of `groups` groups of channels if that is not 0."""
    statistics = Statistics(groups) if groups and groups not in node.statistics else None
    if node.rows is None:
        rows = Rows()

        def keep(strip: Tensor) -> None:
            if statistics is not None:
                statistics.add(strip)
            rows.append(strip)

        evaluate(node, keep)
        node.store(rows)
    elif statistics is not None:
        for first, last in strips(node.height, _rows_that_suit(node, node.row_bytes)):
            statistics.add(node.rows.read(first, last))
    if statistics is not None:
        node.statistics[groups] = statistics


def whole(node: Node) -> Tensor:
    """The map of `node` as one tensor."""
    if node.rows is None:
        result: Optional[Tensor] = None
        first = 0

        def write(strip: Tensor) -> None:
            nonlocal result, first
            if result is None:
                result = torch.empty(node.shape, dtype=strip.dtype, device=strip.device)
            result.narrow(-2, first, strip.shape[-2]).copy_(strip)
            first += strip.shape[-2]

        evaluate(node, write)
        assert result is not None
        node.store(Rows.of(result))
    assert node.rows is not None
    return node.rows.whole()


def evaluate(root: Node, sink: Callable[[Tensor], None]) -> None:
    """Give the rows of `root`, a node that is not stored, to `sink` in strips from top to bottom.

    Stored maps that nothing but this evaluation refers to are freed as it passes them.
    """
    if root.device.type == "cpu":
        keep_freed_blocks()
    order = _with_statistics(root)
    dying = _dying(root, order)
    state = _State(dict.fromkeys(order, 0), {})
    strip_rows, first = _strip_rows(root, order), 0
    while first < root.height:
        last = min(first + strip_rows, root.height)
        ahead = _State(dict(state.done), dict(state.lines))
        if not _fits(root, order, ahead, first, last, sink):
            release(root.device)
            strip_rows = (last - first + 1) // 2
            continue
        state, first = ahead, last
        for node in dying:
            assert node.rows is not None
            node.rows.give_up(_next_row(node, order, state))


@dataclass
class _State:
    """How far an evaluation has come: rows done of each step, and the last rows of those that are read again."""

    done: dict[Node, int]
    lines: dict[Node, tuple[int, Tensor]]


def _fits(root: Node, order: list[Node], state: _State, first: int, last: int, sink: Callable[[Tensor], None]) -> bool:
    """Evaluate one strip; False where memory ran out, which is raised for a single row."""
    try:
        sink(_strip(root, order, state, first, last))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or last - first == 1:
            raise
        return False
    return True


def _strip(root: Node, order: list[Node], state: _State, first: int, last: int) -> Tensor:
    done, lines = state.done, state.lines
    wanted = {root: (first, last)}
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
            if source in pieces and _last_reader(source, order, wanted) is node:
                _keep_line(source, order, state, *pieces.pop(source))
    return pieces.pop(root)[1]


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


def _with_statistics(root: Node) -> list[Node]:
    """`_producers_first`, once every normalisation among the steps has the statistics of its stored input."""
    while True:
        # No list of the steps may outlive this line: what it holds would count as in use.
        node = next(
            (one for one in _producers_first(root) if isinstance(one.step, Normalise) and not one.step.prepared), None
        )
        if node is None:
            return _producers_first(root)
        assert isinstance(node.step, Normalise)
        store(node.inputs[0], node.step.groups)
        node.step.prepare(node.inputs[0])


def _producers_first(root: Node) -> list[Node]:
    """The steps that lead to `root`, inputs before what reads them; stored maps are not steps."""
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node.rows is None and id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((source, False) for source in node.inputs)
    return order


def _dying(root: Node, order: list[Node]) -> list[Node]:
    """Stored maps that go with this evaluation: each of their users is a step that nothing else refers to."""
    references: dict[Node, int] = {}
    stored = []
    for node in reversed(order):
        if node is root or references.get(node, 0) == node.users:
            for source in node.inputs:
                references[source] = references.get(source, 0) + 1
                if source.rows is not None and source not in stored:
                    stored.append(source)
    return [node for node in stored if references[node] == node.users]


def _strip_rows(root: Node, order: list[Node]) -> int:
    """Rows of `root` in a strip: what its steps make of one, a few of them at a time, together suits the device."""
    return _rows_that_suit(root, max(node.row_bytes * node.height for node in order) // max(root.height, 1))


def _rows_that_suit(node: Node, row_bytes: int) -> int:
    target = planner.STRIP_BYTES.get(node.device.type, planner.STRIP_BYTES_ELSEWHERE) // 4
    return min(max(target // max(row_bytes, 1), 1), max(node.height, 1))
