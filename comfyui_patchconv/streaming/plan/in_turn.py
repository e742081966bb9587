"""Attention whose keys and values go from rank to rank in pieces, and are whole on none: what that takes."""

from __future__ import annotations

from math import prod
from typing import NamedTuple, Optional

from ..graph.node import Node

_SCORES_AT_ONCE = 4 << 20
"""Bytes of scores at once: so few are in a processor's cache while they are looked at three times."""

_KEYS_AT_ONCE = 4 << 20
"""Bytes of keys and values that are on their way from a rank to the next."""

_SHARE_OF_BUDGET = 32
"""Of a budget, the part that scores take at most, and that keys and values do that are on their way."""

_COPIES_OF_SCORES = 3
"""The scores, what they are scaled by, and what is made of them."""


class Pieces(NamedTuple):
    """How an attention is done in turn: so many keys of a band are on their way at once, and meet so many queries."""

    keys: int
    queries: int


def can_be_in_turn(node: Node) -> bool:
    """Whether a step is attention whose queries, keys and values all come by rows, and are not there yet."""
    if node.step is None or not node.step.in_turn:
        return False
    rows = len(node.shape) - 2
    return all(source.dim == rows and source.tensor is None for source in node.inputs) and node.dim == rows


def pieces_of(node: Node, budget: Optional[int], ranks: int) -> Pieces:
    """How much at once, so that it takes little of a budget."""
    query, key, value = node.inputs
    part = 1 << 62 if budget is None else budget // _SHARE_OF_BUDGET
    keys = max(min(_KEYS_AT_ONCE, part) // max(key.row_bytes + value.row_bytes, 1), 1)
    keys = min(keys, max(-(-key.rows // ranks), 1))
    of_a_query = prod(node.shape[:-2]) * keys * wide_bytes(node)
    queries = max(min(_SCORES_AT_ONCE, part) // max(of_a_query, 1), 1)
    return Pieces(keys, min(queries, max(-(-query.rows // ranks), 1)))


def workspace_of(node: Node, pieces: Pieces, ranks: int) -> int:
    """Bytes that a rank takes beside its bands of the queries, keys, values and the result."""
    query, key, value = node.inputs
    wide, queries = wide_bytes(node), -(-query.rows // ranks)
    sums = 2 * queries * prod(node.shape[:-2]) * wide
    sums += 0 if node.itemsize == wide else queries * node.row_bytes // node.itemsize * wide
    moving = 3 * pieces.keys * (key.row_bytes + value.row_bytes)  # what goes, what comes, and what is packed of strips
    wider = 0 if node.itemsize == wide else 2 * pieces.keys * (key.row_bytes + value.row_bytes) * wide // node.itemsize
    scores = _COPIES_OF_SCORES * prod(node.shape[:-2]) * pieces.queries * pieces.keys * wide
    of_queries = 3 * pieces.queries * (query.row_bytes + node.row_bytes) // node.itemsize * wide
    return sums + moving + wider + scores + of_queries


def wide_bytes(node: Node) -> int:
    """Bytes of a number that sums are kept in."""
    return max(node.itemsize, 4)
