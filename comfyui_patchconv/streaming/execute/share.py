"""Which rows of a pass a process computes, and what it does together with others before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Union

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

    def after(self, one_pass: Pass, new: Mapping[Node, Stored], gathered: Mapping[Node, Accumulator]) -> None:
        """Have all rows of the new maps that are stored whole, and all that was gathered."""
        ...


class Alone:
    """All of it, where there are no others."""

    def bands(self, one_pass: Pass) -> dict[Node, Span]:
        return {target.node: (0, target.rows) for target in one_pass.targets}

    def before(self, one_pass: Pass, stored: Mapping[Node, Stored]) -> None:
        """All rows are here."""

    def after(self, one_pass: Pass, new: Mapping[Node, Stored], gathered: Mapping[Node, Accumulator]) -> None:
        """Nothing is missing."""


ALONE = Alone()
