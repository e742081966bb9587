"""Which rows of a pass a process computes, and what it does together with others before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, Union

from torch import Tensor

from ..graph.node import Node, Span
from ..graph.steps import Accumulator
from ..plan.schedule import Pass
from .stored import StoredStrips, StoredTensor

Stored = Union[StoredTensor, StoredStrips]


class Share(Protocol):
    """The part of a process. What it says of a pass depends on nothing but the pass."""

    def bands(self, one_pass: Pass) -> dict[Node, Span]:
        """The rows of each target that this process computes."""
        ...

    def before(self, one_pass: Pass, stored: Mapping[Node, Stored]) -> None:
        """Have the rows of stored maps here that `one_pass` reads of them."""
        ...

    def band(self, rows: int) -> Span:
        """Of a map of so many rows those of this process."""
        ...

    def in_turn(self, maps: Sequence[StoredStrips], rows: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """All rows of maps that lie in bands, so many at once: the first of them, and the rows of each map, which are
        there until the next ones are asked for."""
        ...

    def after(self, one_pass: Pass, new: Mapping[Node, Stored], gathered: Mapping[Node, Accumulator]) -> None:
        """Have all rows of the new maps that are stored whole, and all that was gathered."""
        ...


class Alone:
    """All of it, where there are no others."""

    def bands(self, one_pass: Pass) -> dict[Node, Span]:
        return {target.node: (0, target.rows) for target in one_pass.targets}

    def band(self, rows: int) -> Span:
        return 0, rows

    def in_turn(self, maps: Sequence[StoredStrips], rows: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
        count = maps[0].node.rows
        for first in range(0, count, rows):
            yield first, [one.read(first, min(first + rows, count)) for one in maps]

    def before(self, one_pass: Pass, stored: Mapping[Node, Stored]) -> None:
        """All rows are here."""

    def after(self, one_pass: Pass, new: Mapping[Node, Stored], gathered: Mapping[Node, Accumulator]) -> None:
        """Nothing is missing."""


ALONE = Alone()
