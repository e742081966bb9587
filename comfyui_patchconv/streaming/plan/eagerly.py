"""The schedule that does what eager does: each step at once, in the program's order, freed when it is read last."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.node import Node, ancestors
from .cost import seconds_of
from .schedule import Apply, Schedule


def eager_schedule(roots: Sequence[Node], keep: Sequence[Node], held: int = 0) -> Schedule:
    """Each node of the way to `roots`, whole."""
    way = ancestors(roots)
    outer = {*roots, *keep}
    last: dict[Node, Node] = {}
    for node in way:
        for source in node.inputs:
            last[source] = node
    schedule = Schedule()
    for node in way:
        held += 0 if _shares(node) else node.bytes
        schedule.peak = max(schedule.peak, held)
        freed = [source for source in dict.fromkeys(node.inputs) if last[source] is node and source not in outer]
        freed = [source for source in freed if source.tensor is None]
        held -= sum(0 if _shares(source) else source.bytes for source in freed)
        schedule.steps.append(Apply(node, freed, node.bytes))
        schedule.work += node.bytes
    schedule.stored = schedule.peak
    schedule.seconds = seconds_of(way)
    return schedule


def _shares(node: Node) -> bool:
    """Whether a step gives back memory of its input."""
    return node.step is not None and node.step.moves and len(node.inputs) == 1
