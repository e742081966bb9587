"""What work takes, reckoned roughly: for the comparison of two ways to do the same, on the same machine."""

from __future__ import annotations

from collections.abc import Iterable

from ..graph.node import Node

_STEP = 8e-6
"""Seconds to have one step done, whatever its size."""

_BYTE = 3e-10
"""Seconds to write or read a byte."""

_PRODUCT = 2e-11
"""Seconds for a multiplication and an addition."""


def seconds_of(order: Iterable[Node], strips: int = 1, extra_rows: float = 0.0) -> float:
    """Of computing the maps of `order`, each in so many strips. extra_rows: the share of rows computed twice."""
    total = 0.0
    for node in order:
        if node.step is not None:
            elements = node.bytes // max(node.itemsize, 1)
            each = elements * node.step.work * _PRODUCT + (0.0 if node.step.moves else node.bytes * _BYTE)
            total += each * (1 + (extra_rows if node.step.cheap else 0.0)) + strips * _STEP
    return total
