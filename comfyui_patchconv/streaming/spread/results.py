"""Results of which each rank has its band, and one rank the whole if it is asked for."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ..plan.bands import band
from ..plan.schedule import USUAL
from .ranks import Ranks, bytes_of
from .together import BYTES_AT_ONCE, tensor_of


class InBands:
    """A process group whose ranks keep their bands of what calls return: `stream(vae, group=InBands(group))`.

    Each map among the results, in lists, tuples and dictionaries too, is a `Band` then, and the whole is on no rank:
    `gathered` puts it together on one. What is no map, such as a mean, is the same on all ranks, as without it.
    """

    def __init__(self, group: Any) -> None:
        self.group = group


class Band(NamedTuple):
    """The rows of a map that are a rank's.

    values: rows `[first, first + values.shape[dim])` along `dim` of `rows` ones; none where there are more ranks.
    """

    values: Tensor
    dim: int
    first: int
    rows: int

    @classmethod
    def of(cls, whole: Tensor, dim: int, rank: int, ranks: int) -> Band:
        """A rank's band of a map that is there as a whole, in memory of its own."""
        rows = whole.shape[dim]
        first, last = band(rows, rank, ranks)
        values = whole.narrow(dim, first, last - first)
        return cls(values if ranks == 1 else values.clone(), dim, first, rows)


def gathered(part: Band, group: Any, on: int = 0, silent_seconds: float = USUAL.silent_seconds) -> Optional[Tensor]:
    """The whole map on rank `on` of `group`, and None on its others: all of them have to call it, each with its `Band`.

    silent_seconds: see `Tuning`. Raises ValueError for a rank that the group has not, and where this process is not in
    the group; SpreadError where another rank fails, is gone, or does not come.
    """
    ranks = Ranks(group.group if isinstance(group, InBands) else group, silent_seconds)
    if not 0 <= on < ranks.count:
        raise ValueError(f"on is {on!r}: give the number of one of the group's ranks, 0 to {ranks.count - 1}.")
    with ranks.call(), torch.no_grad():
        return _received(part, ranks) if ranks.rank == on else _sent(part, ranks, on)


def _steps(part: Band, first: int, last: int) -> list[tuple[int, int]]:
    """A band's rows in pieces that are sent at once."""
    row_bytes = part.values[:0].new_empty(()).itemsize
    for dim, side in enumerate(part.values.shape):
        row_bytes *= 1 if dim == part.dim else side
    at_once = max(BYTES_AT_ONCE // max(row_bytes, 1), 1)
    return [(row, min(row + at_once, last)) for row in range(first, last, at_once)]


def _sent(part: Band, ranks: Ranks, on: int) -> None:
    for first, last in _steps(part, part.first, part.first + part.values.shape[part.dim]):
        rows = part.values.narrow(part.dim, first - part.first, last - first)
        ranks.exchange({on: bytes_of(rows, ranks.device)}, {})


def _received(part: Band, ranks: Ranks) -> Tensor:
    shape = [*part.values.shape[: part.dim], part.rows, *part.values.shape[part.dim + 1 :]]
    whole = part.values.new_empty(shape)
    whole.narrow(part.dim, part.first, part.values.shape[part.dim]).copy_(part.values)
    for rank in range(ranks.count):
        for first, last in _steps(part, *band(part.rows, rank, ranks.count)) if rank != ranks.rank else ():
            rows = whole.narrow(part.dim, first, last - first)
            coming = ranks.room(rows.numel() * rows.element_size())
            ranks.exchange({}, {rank: coming})
            rows.copy_(tensor_of(coming, rows.shape, rows.dtype, rows.device))
    return whole
