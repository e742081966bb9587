"""Bands of rows, one for each of several ranks: what they are made of, and where a pass of theirs should be two."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from typing import Optional

from ..graph.node import Node, Span

_TWICE = 0.25
"""The share of its work that a rank may do for rows beyond its band, which another one computes, too."""

_PLACES = 16
"""Places where a pass may be parted that are looked at: those between which the fewest bytes are stored."""


def band(rows: int, rank: int, ranks: int) -> Span:
    """The rows of a map of so many that are `rank`'s: as many as any other's, or one more. Some have none if there are
    more ranks than rows."""
    return rows * rank // ranks, rows * (rank + 1) // ranks


def reach(order: Sequence[Node], bands: Mapping[Node, Span]) -> dict[Node, Span]:
    """The rows of steps, and of the stored maps that these read by rows, that `bands` of targets are made of."""
    found = {node: rows for node, rows in bands.items() if rows[0] < rows[1]}
    for node in reversed(order):  # readers before what they read
        if node not in found or node.step is None:
            continue
        sources = [source for source, dim in zip(node.inputs, node.dims) if dim is not None]
        for source, (low, high) in zip(sources, node.step.needs(*found[node])):
            if low < high:
                before = found.get(source, (low, high))
                found[source] = min(before[0], low), max(before[1], high)
    return found


def cut_to_send_less(
    order: Sequence[Node], roots: Sequence[Node], ranks: int, worth: int, worth_a_byte: int,
    in_bands: Callable[[Node], bool],
) -> Optional[list[Node]]:  # fmt: skip
    """What to store before a pass to `roots`, so that its ranks send and compute fewer rows for each other; None where
    that is not worth another message.

    worth: see `cut_for`. worth_a_byte: multiplications that a rank does rather than have a byte sent. in_bands: whether
    a map that is stored, or would be, comes in bands.
    """
    sizes = _bytes_between(order)
    places = sorted(range(1, len(order)), key=sizes.__getitem__)[:_PLACES]
    best, found = _beyond(order, roots, ranks, worth_a_byte, in_bands) - worth, None
    for place in places:
        inside, later = set(order[:place]), set(order[place:])
        between = {source: None for node in order[place:] for source in node.inputs if source in inside}
        first = list(dict.fromkeys((*between, *(root for root in roots if root in inside))))
        rest = [root for root in roots if root in later]
        if not between or not rest or not all(map(in_bands, between)):
            continue
        both = ((order[:place], first), (order[place:], rest))
        cost = sum(_beyond(part, targets, ranks, worth_a_byte, in_bands) for part, targets in both)
        if cost < best:
            best, found = cost, first
    return found


def _beyond(
    order: Sequence[Node], targets: Sequence[Node], ranks: int, worth_a_byte: int, in_bands: Callable[[Node], bool]
) -> int:
    """What a pass costs a rank for the rows beyond its band, in multiplications: those that it computes, and the bytes
    of those that others send."""
    rank, inside, cost = ranks // 2, set(order), 0
    for node, (low, high) in reach(order, {node: band(node.rows, rank, ranks) for node in targets}).items():
        first, last = band(node.rows, rank, ranks)
        rows = max(first - low, 0) + max(high - last, 0)
        if node in inside:
            cost += rows * _work_of_row(node)
        elif in_bands(node):
            cost += rows * node.row_bytes * worth_a_byte
    return cost


def _work_of_row(node: Node) -> int:
    """Multiplications of a row of a step."""
    return node.row_bytes // max(node.itemsize, 1) * (node.step.work if node.step is not None else 1)


def cut_for(order: Sequence[Node], roots: Collection[Node], ranks: int, worth: int) -> Optional[list[Node]]:
    """What to store before a pass to `roots`, so that its ranks compute few rows twice; None where they do.

    order: its steps. worth: multiplications; fewer are done twice rather than rows exchanged once more. A pass of many
    convolutions, one behind the other, reads further beyond a band the more they are.
    """
    rank = ranks // 2
    read = reach(order, {root: band(root.rows, rank, ranks) for root in roots})
    once, twice = [], []
    for node in order:
        first, last = band(node.rows, rank, ranks)
        low, high = read.get(node, (first, first))
        work = _work_of_row(node)
        once.append((last - first) * work)
        twice.append(max(high - low - (last - first), 0) * work)
    if sum(twice) <= max(_TWICE * sum(once), worth):
        return None
    after = [list(accumulate(reversed(each)))[::-1] for each in (twice, once)]  # from each step on
    first = next(place for place in range(1, len(order)) if after[0][place] <= _TWICE * after[1][place])
    places = range(first, (first + len(order)) // 2 + 1)
    sizes = _bytes_between(order)
    place = min((place for place in places if place < len(order)), key=lambda place: (sizes[place], place))
    later = set(order[place:])
    between = {source: None for node in order[place:] for source in node.inputs if source not in later}
    inside = set(order[:place])
    return [node for node in (*between, *roots) if node in inside] or None


def _bytes_between(order: Sequence[Node]) -> list[int]:
    """Of each place in the order, the bytes of the maps before it that steps from there on read."""
    last = {source: place for place, node in enumerate(order) for source in node.inputs}
    change = [0] * (len(order) + 1)
    for place, node in enumerate(order):
        change[place + 1] += node.bytes
        change[last.get(node, place) + 1] -= node.bytes
    return list(accumulate(change))
