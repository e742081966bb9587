"""What operators copy of what they read and make: counted whole for eager, and for the rows of a strip."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.node import Node, Step

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


def times_copied(node: Node, source: Node) -> float:
    """How many times the bytes of what a step reads of a stored map, row by row, it takes beside that and its result:
    rows of several strips are joined, and rows at the edges padded; a backend has a copy in its order, in wider numbers
    where it computes in such."""
    step = node.step
    if step is None or (step.moves and source.tensor is not None):
        return 0.0
    if not step.weight_bytes:
        return 1.0 + step.copies
    return 1.0 + _blocks_read(source, step.block) * (step.copies + (1 if step.widened == 1 else 2 * step.widened))


def times_made(node: Node) -> float:
    """How many times the bytes of its result a step takes for that in the order of its backend, in place of it."""
    return 1.0 if node.step is None else _blocks(node, node.step.block)


def _blocks(node: Node, block: int) -> float:
    """How many times its bytes a map takes in the order of a CPU's convolutions, which has whole blocks of channels."""
    if block == 1 or node.device.type != "cpu" or node.itemsize > 4 or node.strides[1] == 1:
        return 1.0
    channels = max(node.shape[1], 1)
    return -(-channels // block) * block / channels


def _blocks_read(source: Node, block: int) -> float:
    """The same of a map that such a convolution reads: less than one block stays in the order that it is in."""
    return _blocks(source, block) if len(source.shape) > 2 and source.shape[1] > block else 1.0


def bytes_copied(node: Node, sources: Sequence[Node]) -> int:
    """Bytes that an operator takes beside its result, all of it at once: on a CPU a convolution has copies in the
    order of its backend, and norms, softmax and pools copy what lies in another order than they read."""
    return 0 if node.step is None else _bytes_padded(node) + _bytes_ordered(node, node.step, sources)


def _bytes_padded(node: Node) -> int:
    """Bytes of what a convolution or a pool reads, with the rows of its padding around it: where it is ours, not the
    program's own operator."""
    if node.eager is not None or node.step is None or not node.step.pads:
        return 0
    edges, (source, dim) = node.step.pads, node.by_rows[0]
    side = max(source.shape[dim], 1)
    return (side + edges) * (source.bytes // side)


def _bytes_ordered(node: Node, step: Step, sources: Sequence[Node]) -> int:
    """Bytes of what an operator puts in another order, and of what else it takes beside its result."""
    if not step.weight_bytes:
        copied = (source.bytes for source in sources if _is_copied(source, node, step.name))
        return step.bytes_beside + sum(copied)
    if node.device.type != "cpu":
        largest = max((source.bytes for source in sources), default=0)
        return step.copies * largest + step.workspace if step.copies else 0
    largest = max((source.bytes * _blocks_read(source, step.block) for source in sources), default=0)
    beside = max(step.copies * largest, step.bytes_beside)
    copied = int(node.bytes * times_made(node) + largest + beside) + step.weight_bytes
    return copied if step.widened == 1 else 2 * step.widened * copied  # wider, and in its order


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
