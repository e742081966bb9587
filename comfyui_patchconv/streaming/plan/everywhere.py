"""Maps that every rank computes whole, because that takes less time than sending each the rows of the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..graph.node import Node
from .schedule import Tuning

_WORTH_A_BYTE = {"cpu": 200}
"""Multiplications that a rank's device does while a byte comes: a core of 2e10 in a second over 1 Gbit/s."""

_WORTH_A_BYTE_OF_OTHERS = 4000
"""A GPU of 1e14 in a second, over PCIe 4.0 x16. Not measured yet."""


def worth_a_byte(tuning: Tuning, device_type: str) -> int:
    """Multiplications that a rank does rather than have a byte sent."""
    if tuning.worth_a_byte is not None:
        return tuning.worth_a_byte
    return _WORTH_A_BYTE.get(device_type, _WORTH_A_BYTE_OF_OTHERS)


def computed_by_all(order: Sequence[Node], worth: int) -> set[Node]:
    """What leads to the maps that steps read as a whole, as attention does its keys and values, where it is little to
    compute beside the bytes of these maps.

    order: the steps, in the program's order. worth: see `worth_a_byte`. With N ranks, each would send (N - 1) / N of
    these bytes, and computes (N - 1) / N of that more instead.
    """
    found: set[Node] = set()
    for node in order:
        whole = [source for source in read_whole(node) if source.tensor is None and source.dim is not None]
        if not whole:
            continue
        before = _ancestors(whole, found)
        if any(one.in_bands for one in before):
            continue
        if sum(map(_work, before)) <= worth * sum(source.bytes for source in whole if source in before):
            found |= before
    return found


def read_whole(node: Node) -> list[Node]:
    """The maps that a step needs whole before it computes any row, each once."""
    assert node.step is not None
    all_of_it = node.step.takes_all
    found = (source for source, dim in zip(node.inputs, node.dims) if dim is None or dim != source.dim or all_of_it)
    return list(dict.fromkeys(found))


def _ancestors(nodes: Sequence[Node], known: Collection[Node]) -> set[Node]:
    """These maps and all that they are made of, but for those that are known or there."""
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node.tensor is None and node not in known and node not in found:
            found.add(node)
            stack.extend(node.inputs)
    return found


def _work(node: Node) -> int:
    """Multiplications of a step."""
    return node.bytes // max(node.itemsize, 1) * (node.step.work if node.step is not None else 1)
