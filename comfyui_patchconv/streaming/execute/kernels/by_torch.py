"""Chains by PyTorch's operators, one step after the other: where a kernel cannot do them after all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from torch import Tensor

from ...graph.node import Node
from .chains import Chain

Read = Callable[[Node, Optional[int], int, int], Tensor]
"""Rows `[first, last)` of a map along a dimension, or all of one that is read whole (None)."""


def compute(chain: Chain, first: int, last: int, read: Read) -> Tensor:
    """Rows `[first, last)` of what a chain gives."""
    start, place, _ = chain.links[0]
    of_source, *spans = chain.spans(first, last)
    value = read(chain.source, start.dims[place], *of_source)
    for (node, place, _), span in zip(chain.links, spans):
        pieces = [
            value if index == place else read(one, dim, *span)
            for index, (one, dim) in enumerate(zip(node.inputs, node.dims))
        ]
        assert node.step is not None
        value = node.step.compute(*span, pieces)
    return value
