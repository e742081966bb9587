"""The schedule that does what eager does: each step at once, in the program's order, freed when it is read last."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Optional

from ..graph.node import Node
from .cost import seconds_of
from .schedule import Apply, Schedule

_WITHOUT_GAPS = frozenset(
    """
    layer_norm native_layer_norm instance_norm rms_norm softmax _softmax log_softmax _log_softmax
    """.split()  # noqa: SIM905
)
"""Operators that copy what is not contiguous, as was measured on a CPU."""

_WITHOUT_GAPS_OR_LAST = frozenset(
    """
    group_norm native_group_norm avg_pool2d avg_pool3d max_pool2d max_pool2d_with_indices max_pool3d
    max_pool3d_with_indices adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d pixel_shuffle reflection_pad2d
    """.split()  # noqa: SIM905
)
"""Those that copy what is neither that nor channels last."""


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
        schedule.peak = max(schedule.peak, held + _copies(node, sources[node]))
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


def _copies(node: Node, sources: Sequence[Node]) -> int:
    """Bytes that an operator takes beside its result: on a CPU a convolution has copies in the order of its backend,
    and norms, softmax and pools copy what lies in another order than they read."""
    if node.step is None:
        return 0
    if not node.step.weight_bytes:
        copied = (source.bytes for source in sources if _is_copied(source, node, node.step.name))
        return node.step.bytes_beside + sum(copied)
    largest = max((source.bytes for source in sources), default=0)
    if node.device.type != "cpu":
        return node.step.copies * largest + node.step.workspace if node.step.copies else 0
    beside = max(node.step.copies * largest, node.step.bytes_beside)
    copied = node.bytes + largest + beside + node.step.weight_bytes
    return copied if node.step.widened == 1 else 2 * node.step.widened * copied  # wider, and in its order


def _is_copied(source: Node, node: Node, operator: str) -> bool:
    """Whether the operator that makes `node` copies a map before it reads it."""
    last, sides = operator in _WITHOUT_GAPS_OR_LAST, len(source.shape)
    if not last and operator not in _WITHOUT_GAPS:
        return False
    if "adaptive_avg" in operator and node.shape[-2:] == (1, 1):  # a mean
        return False
    if source.device.type != "cpu":
        if operator == "pixel_shuffle":
            return False
        last = last and "group_norm" not in operator
    orders = [[*range(sides)], *([[0, *range(2, sides), 1]] if last and sides > 3 else [])]
    return not any(_lies_in(source, order) for order in orders)


def _lies_in(node: Node, order: Sequence[int]) -> bool:
    """Whether a map's places follow each other in memory by these dimensions, the last one's side by side."""
    size = 1
    for dim in reversed(order):
        if node.shape[dim] > 1 and node.strides[dim] != size:
            return False
        size *= node.shape[dim]
    return True


def _written(node: Node) -> Optional[Node]:
    """The map whose memory an operator was called to write its result to, and could: it looks the same."""
    written = None if node.eager is None else node.eager.written
    if written is None or (written.step is not None and written.step.moves):  # that may show memory of others
        return None
    looks = written.shape, written.strides, written.dtype, written.device
    return written if looks == (node.shape, node.strides, node.dtype, node.device) else None
