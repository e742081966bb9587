"""Maps that a pass stores for later ones, beside those that it is made for: they would cost much to recompute."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Optional

from ..graph.node import Node
from .lifetimes import Lifetimes

_FEW = 12
"""Steps that are few enough to take them twice."""


def stored_for_later(targets: Sequence[Node], maps: Lifetimes) -> list[Node]:
    """Maps on the way to `targets` that steps outside this pass read, too, and that are not cheap to recompute."""
    order = maps.steps_to(targets)
    inside, here = set(order), dict.fromkeys(targets)
    freeable: Optional[int] = None
    found: list[Node] = []
    for node in order:
        outside = [] if node in here else _readers_outside(node, inside, maps)
        if not outside:
            continue
        if node in maps.recomputed_everywhere:
            wanted = [one for one in _made_of(node, outside, inside, maps) if one not in here]
        else:
            parts = [reader for reader in outside if is_part(reader)]
            smaller = parts == outside and sum(part.bytes for part in parts) <= node.bytes
            wanted = parts if smaller and node not in maps.kept else [node]
            size = sum(one.bytes for one in wanted)
            # What is cheap to recompute is stored only where that frees twice its bytes of what it is made of, here
            # and where it would be recomputed.
            if _is_cheap(node, here, maps):
                freeable = maps.bytes_freed_after(order, inside) if freeable is None else freeable
                if freeable < 2 * size or maps.bytes_freed_after(maps.steps_to([node]), inside) < 2 * size:
                    continue
        for one in wanted:
            if one not in here:
                here[one] = None
                found.append(one)
    return found


def is_part(node: Node) -> bool:
    """Whether a step shows a part of each row of its input, such as some frames of a video."""
    source = node.shows
    return source is not None and node.dims == (source.dim,)


def parts_of(roots: Sequence[Node]) -> set[Node]:
    """What roots are put together of, as of a video's chunks."""
    found: set[Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        while node.step is not None and node.step.cheap and len(node.inputs) == 1:
            node = node.inputs[0]
        if node.step is not None and node.step.moves and len(node.inputs) > 1:
            new = [part for part in node.inputs if part.tensor is None and part not in found]
            found.update(new)
            stack += new
    return found


def half_or_less(node: Node, maps: Lifetimes) -> Optional[Node]:
    """The nearest map of at most half the bytes from which steps with one input make `node` row by row, whatever they
    cost; None where there is none."""
    source = node
    while 2 * source.bytes > node.bytes:
        rows = source.by_rows
        if len(rows) != 1 or len(source.inputs) != 1 or source.step is None or source.step.takes_all:
            return None
        source = rows[0][0]
        if maps.is_there(source):
            break
    return None if 2 * source.bytes > node.bytes else source


def _readers_outside(node: Node, inside: Collection[Node], maps: Lifetimes) -> list[Node]:
    """The steps outside a pass that are still to read one of its maps; itself where only the program may ask for it."""
    readers = maps.readers.get(node, ())
    if len(readers) == 1 and readers[0] in inside and node not in maps.kept:
        return []
    outside = [reader for reader in readers if reader not in inside and reader not in maps.stored]
    if not outside and node in maps.kept and node.tensor is None:
        return [node]
    return outside


def _made_of(node: Node, outside: Sequence[Node], inside: Collection[Node], maps: Lifetimes) -> list[Node]:
    """What later steps make of a map that is not stored, where it takes less room: stored while that is there."""
    found = []
    for reader in outside:
        step = reader.step
        if step is None or step.takes_all or step.reduces or reader.bytes >= node.bytes:
            continue
        if all(
            maps.is_there(source) or (source in inside and dim == source.dim)
            for source, dim in zip(reader.inputs, reader.dims)
        ):
            found.append(reader)
    return found


def _is_cheap(node: Node, here: Collection[Node], maps: Lifetimes) -> bool:
    """Whether few and cheap steps make `node` of what is stored."""
    stack, seen = [node], 0
    while stack:
        one = stack.pop()
        if maps.is_there(one) or one in here or one in maps.recomputed_everywhere:
            continue
        seen += 1
        if one.step is None or not (one.step.cheap or one.step.work <= 1) or one.step.takes_all or seen > _FEW:
            return False
        stack.extend(one.inputs)
    return True
