"""Which reductions a pass gathers on its way: the statistics of norms, sums, what attention needs of all keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from ..graph.node import Node
from .for_later import is_part
from .lifetimes import Lifetimes
from .schedule import Target


def reductions_of(node: Node, dim: Optional[int], maps: Lifetimes) -> list[Node]:
    """The reductions that are still wanted of a map, and that take its rows along `dim`."""
    return [
        reader
        for reader in maps.readers.get(node, ())
        if reader.step is not None
        and reader.step.reduces
        and reader not in maps.stored
        and any(source is node and along == dim for source, along in reader.by_rows)
    ]


def with_reductions(targets: Sequence[Target], order: Sequence[Node], maps: Lifetimes) -> list[Target]:
    """Targets, and the other maps that their pass computes and a reduction is still to read. order: its steps."""
    known = {target.node for target in targets}
    for target in targets:
        more = [] if maps.is_there(target.node) else reductions_of(target.node, target.node.dim, maps)
        target.reductions = list(dict.fromkeys([*target.reductions, *more]))
    found = list(targets)
    for node in order:
        wanted = reductions_of(node, node.dim, maps) if node not in known else []
        if wanted and node not in maps.recomputed_everywhere:
            found.append(Target(node, stored=False, reductions=wanted))
    return found + _parts(found, order, maps)


def _parts(targets: Sequence[Target], order: Sequence[Node], maps: Lifetimes) -> list[Target]:
    """Parts of a pass's maps, such as some frames each, of which reductions are wanted: gathered in it too."""
    known = {target.node for target in targets}
    inside = {*order, *known}
    found: dict[Node, Target] = {}
    stack = list(inside)
    while stack:
        node = stack.pop()
        for reader in maps.readers.get(node, ()):
            if is_part(reader) and reader not in found and reader not in known and not maps.is_there(reader):
                wanted = reductions_of(reader, reader.dim, maps)
                if wanted:
                    found[reader] = Target(reader, stored=False, reductions=wanted)
                if reader not in inside:
                    inside.add(reader)
                    stack.append(reader)
    return sorted(found.values(), key=lambda target: target.node.serial)
