"""Chains by PyTorch's operators: each writes over what the one before it gave, where their types are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from torch import Tensor

from ...graph.node import Node
from ..buffers import is_borrowed
from .chains import Chain

Read = Callable[[Node, Optional[int], int, int], Tensor]
"""Rows `[first, last)` of a map along a dimension, or all of one that is read whole (None)."""


def compute(chain: Chain, first: int, last: int, read: Read, own: bool) -> Tensor:
    """Rows `[first, last)` of what a chain gives. own: those that it reads may be overwritten."""
    source = chain.source
    value = read(source, chain.links[0].node.dims[chain.links[0].place], first, last)
    own = own and not is_borrowed(value)
    for node, place, element in chain.links:
        overwrite = element.overwrite
        if own and overwrite is not None and value.dtype == node.dtype:
            other = element.other
            value = overwrite(value, None if other is None else read(node.inputs[other], node.dims[other], first, last))
            continue
        pieces = [
            value if index == place else read(one, dim, first, last)
            for index, (one, dim) in enumerate(zip(node.inputs, node.dims))
        ]
        assert node.step is not None
        result = node.step.compute(first, last, pieces)
        own = own if result is value else element.kind != "cast" or value.dtype != result.dtype
        value = result
    return value
