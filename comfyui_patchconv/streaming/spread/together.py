"""The exchange of rows before a pass, and the merging of statistics and joining of bands behind it, over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from weakref import WeakSet

import torch
from torch import Tensor

from ..execute.share import Stored
from ..execute.stored import StoredStrips, StoredTensor
from ..graph.node import Node, Span
from ..graph.steps import Accumulator
from ..plan.bands import band
from ..plan.schedule import Pass
from .moves import Move, bands_of, moves_before
from .ranks import Peers, bytes_of

BYTES_AT_ONCE = 4 << 20
"""Bytes of a rank's band that are on their way at once while a map is put together."""


class Together:
    """A `Share`: this rank's bands.

    before: rows beside them come from those that store them, in one message from each. after: what was gathered is
    merged in the order of the ranks, so that all have the same, and what is stored whole is put together everywhere. Of
    a pass that every rank does whole, all have all.
    """

    def __init__(self, ranks: Peers) -> None:
        self._ranks = ranks
        self._lent: list[StoredStrips] = []
        self._everywhere: WeakSet[Node] = WeakSet()

    def bands(self, one_pass: Pass) -> dict[Node, Span]:
        return bands_of(one_pass, self._ranks.rank, self._ranks.count)

    def before(self, one_pass: Pass, stored: Mapping[Node, Stored]) -> None:
        ranks = self._ranks
        in_bands = (node for node in stored if node not in self._everywhere)
        maps = {node: one for node in in_bands if isinstance(one := stored[node], StoredStrips)}
        moves = moves_before(one_pass, maps, ranks.count)
        outgoing: dict[int, list[Tensor]] = {}
        coming: dict[int, list[Move]] = {}
        for move in moves:
            if move.owner == ranks.rank:
                rows = bytes_of(maps[move.node].read(*move.rows), ranks.device)
                outgoing.setdefault(move.reader, []).append(rows)
            elif move.reader == ranks.rank:
                coming.setdefault(move.owner, []).append(move)
        incoming = {owner: ranks.room(sum(move.bytes for move in some)) for owner, some in coming.items()}
        ranks.exchange({reader: torch.cat(parts) for reader, parts in outgoing.items()}, incoming)
        for owner, some in coming.items():
            for move, part in zip(some, incoming[owner].split([move.bytes for move in some])):
                here = maps[move.node]
                here.beside.append((move.rows[0], _rows_of(part, move.node, here.dim)))
                self._lent.append(here)

    def band(self, rows: int) -> Span:
        return band(rows, self._ranks.rank, self._ranks.count)

    def in_turn(self, maps: Sequence[StoredStrips], rows: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """Each piece of a rank's band goes all round: to the rank before, which has used its own meanwhile."""
        ranks, nodes = self._ranks, [one.node for one in maps]
        count, row_bytes = ranks.count, sum(node.row_bytes for node in nodes)
        bands = [band(nodes[0].rows, rank, count) for rank in range(count)]
        before, behind = (ranks.rank - 1) % count, (ranks.rank + 1) % count
        for begin in range(0, max(last - first for first, last in bands), rows):
            pieces = [(min(first + begin, last), min(first + begin + rows, last)) for first, last in bands]
            here = torch.cat([bytes_of(one.read(*pieces[ranks.rank]), ranks.device) for one in maps])
            for turn in range(count):
                first, last = pieces[(ranks.rank + turn) % count]
                if first < last:
                    parts = here.split([(last - first) * node.row_bytes for node in nodes])
                    yield first, [_rows_of(part, node, one.dim) for part, node, one in zip(parts, nodes, maps)]
                if turn + 1 < count:
                    low, high = pieces[(ranks.rank + turn + 1) % count]
                    coming = ranks.room((high - low) * row_bytes)
                    ranks.exchange({before: here} if first < last else {}, {behind: coming} if low < high else {})
                    here = coming

    def after(self, one_pass: Pass, new: Mapping[Node, Stored], gathered: Mapping[Node, Accumulator]) -> None:
        for strips in self._lent:
            strips.beside = []
        self._lent = []
        if one_pass.everywhere:
            self._everywhere.update(new)
            return
        if gathered:
            self._merge(list(gathered.values()))
        for target in one_pass.targets:
            whole = new.get(target.node)
            if isinstance(whole, StoredTensor):
                put_together(self._ranks, whole, target.rows)

    def _merge(self, gathered: Sequence[Accumulator]) -> None:
        """Have each of these gather what those of all ranks have."""
        sizes = [one.numbers for one in gathered]
        mine = bytes_of(torch.cat([one.state() for one in gathered]), self._ranks.device)
        states = [state.cpu().view(torch.float64).split(sizes) for state in self._ranks.of_all(mine)]
        for place, one in enumerate(gathered):
            one.merge([state[place] for state in states])


def put_together(ranks: Peers, whole: StoredTensor, rows: int) -> None:
    """Have all of so many rows of a map here, of which each rank has its band."""
    node = whole.node
    row_bytes = node.bytes // max(rows, 1)
    at_once = max(BYTES_AT_ONCE // max(row_bytes, 1), 1)
    bands = [band(rows, rank, ranks.count) for rank in range(ranks.count)]
    for begin in range(0, max(last - first for first, last in bands), at_once):
        parts = {
            rank: (first + begin, min(first + begin + at_once, last))
            for rank, (first, last) in enumerate(bands)
            if first + begin < last
        }
        own = parts.pop(ranks.rank, None)
        others = [rank for rank in range(ranks.count) if rank != ranks.rank]
        outgoing = dict.fromkeys(others, bytes_of(whole.read(*own), ranks.device)) if own is not None else {}
        incoming = {rank: ranks.room((last - first) * row_bytes) for rank, (first, last) in parts.items()}
        ranks.exchange(outgoing, incoming)
        for rank, (first, _) in parts.items():
            whole.put(first, _rows_of(incoming[rank], node, whole.dim))


def _rows_of(received: Tensor, node: Node, dim: int) -> Tensor:
    """Rows of a map from their bytes."""
    shape = list(node.shape)
    shape[dim] = 1
    shape[dim] = received.numel() // max(prod(shape) * node.itemsize, 1)
    return tensor_of(received, shape, node.dtype, node.device)


def tensor_of(received: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor from its bytes."""
    values = received.to(device)
    if values.storage_offset() % dtype.itemsize:  # it lies behind rows of another type
        values = values.clone()
    return values.view(dtype).view(list(shape))
