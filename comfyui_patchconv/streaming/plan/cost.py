"""Rough times of steps, to compare two ways of doing the same on the same machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Optional

from ..graph.node import Node

_STEP = 8e-6
"""Seconds to have one step done, whatever its size."""

_BYTE = 3e-10
"""Seconds to write or read a byte."""

_PRODUCT = 2e-11
"""Seconds for a multiplication and an addition."""


def seconds_of(order: Iterable[Node], strips: int = 1, twice: Optional[Mapping[Node, int]] = None) -> float:
    """Estimate the seconds to compute the maps of `order`, each in so many strips.

    twice: of a map, the rows that a strip computes though the one before it had them.
    """
    total = 0.0
    for node in order:
        if node.step is not None:
            elements = node.bytes // max(node.itemsize, 1)
            each = elements * node.step.work * _PRODUCT + (0.0 if node.step.moves else node.bytes * _BYTE)
            more = (strips - 1) * twice.get(node, 0) / max(node.rows, 1) if twice else 0.0
            total += each * (1 + more) + strips * _STEP
    return total
