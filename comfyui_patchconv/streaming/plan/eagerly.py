"""The schedule that does what eager does: each step at once, in the program's order, freed when it is read last."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Optional

from ..graph.node import Node
from .copies import bytes_copied
from .cost import seconds_of
from .schedule import Apply, Schedule


def eager_schedule(roots: Sequence[Node], keep: Sequence[Node], held: int = 0) -> Schedule:
    """Each node of the way to `roots`, whole."""
    sources: dict[Node, list[Node]] = {}
    stack = [node for node in roots if node.tensor is None]
    while stack:
        node = stack.pop()
        if node not in sources:
            sources[node] = sources_of(node)
            stack.extend(source for source in sources[node] if source.tensor is None)
    way = sorted(sources, key=lambda node: node.serial)
    outer = {*roots, *keep}
    views = {node for node in way if node.shows is not None and node.eager is None}  # else the operator copies
    freed_at = _last_reads(way, sources, views, outer)
    schedule = Schedule()
    shared = {source for node in views for source in (node, *sources[node])}
    for node in way:
        freed = [source for source in freed_at.get(node, ()) if source.tensor is None]
        written = _written(node)
        in_place = written in freed and written not in shared
        held += 0 if node in views or in_place else node.bytes
        schedule.peak = max(schedule.peak, held + bytes_copied(node, sources[node]))
        schedule.stored = max(schedule.stored, held)
        held -= sum(0 if one in views or (in_place and one is written) else one.bytes for one in freed)
        schedule.steps.append(Apply(node, freed, node.bytes, node.eager is not None, in_place))
        schedule.work += node.bytes
    schedule.seconds = seconds_of(way)
    return schedule


def _last_reads(
    way: Sequence[Node], sources: dict[Node, list[Node]], views: Collection[Node], outer: Collection[Node]
) -> dict[Node, list[Node]]:
    """By the steps that read them last, the maps that are freed then: what a view shows when nothing reads that."""
    last: dict[Node, Node] = {}
    kept = set(outer)
    for node in reversed(way):
        for source in sources[node]:
            last.setdefault(source, node)
            if node in views:
                read = last.get(node, node)
                last[source] = max(last[source], read, key=lambda one: one.serial)
                if node in kept:
                    kept.add(source)
    freed_at: dict[Node, list[Node]] = {}
    for source, node in last.items():
        if source not in kept:
            freed_at.setdefault(node, []).append(source)
    return freed_at


def sources_of(node: Node) -> list[Node]:
    """What eager makes a node of."""
    return list(dict.fromkeys(node.inputs if node.eager is None else node.eager.inputs()))


def _written(node: Node) -> Optional[Node]:
    """The map whose memory an operator was called to write its result to, and could: it looks the same."""
    written = None if node.eager is None else node.eager.written
    if written is None or (written.step is not None and written.step.moves):  # that may show memory of others
        return None
    looks = written.shape, written.strides, written.dtype, written.device
    return written if looks == (node.shape, node.strides, node.dtype, node.device) else None
