"""Which rows are whose, and which of them a pass reads elsewhere: integers that all ranks work out alike."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from ..graph.node import Node, Span
from ..plan.bands import band, reach
from ..plan.schedule import Pass


def bands_of(one_pass: Pass, rank: int, ranks: int) -> dict[Node, Span]:
    """The rows of each target of a pass that `rank` computes."""
    if one_pass.everywhere:
        rank, ranks = 0, 1
    return {target.node: band(target.rows, rank, ranks) for target in one_pass.targets}


class Move(NamedTuple):
    """Rows of a stored map that one rank has, and another one reads."""

    node: Node
    owner: int
    reader: int
    rows: Span

    @property
    def bytes(self) -> int:
        return (self.rows[1] - self.rows[0]) * self.node.row_bytes


def moves_before(one_pass: Pass, stored: Collection[Node], ranks: int) -> list[Move]:
    """What has to move before a pass, in the order in which each rank packs it. stored: the maps that lie in bands."""
    found = []
    for reader in range(ranks):
        read = reach(one_pass.order, bands_of(one_pass, reader, ranks))
        for node in stored:
            if node not in read:
                continue
            low, high = read[node]
            for owner in range(ranks):
                first, last = band(node.rows, owner, ranks)
                rows = max(first, low), min(last, high)
                if owner != reader and rows[0] < rows[1]:
                    found.append(Move(node, owner, reader, rows))
    return found
