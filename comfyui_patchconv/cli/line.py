"""The line on a terminal that says how far work is; it is gone when the work is done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..terminal import watched

_WIDTH = 40
"""Characters that are cleared; nothing that is shown has more."""


def show(text: str) -> None:
    """Show `text` in the place of what is there."""
    print(f"\r{text}", end="", file=sys.stderr, flush=True)


def percent(done: int, work: int) -> None:
    """Show how much of the work is done."""
    if work:
        show(f"{done / work:4.0%}")


@contextmanager
def cleared() -> Iterator[None]:
    """Clear the line at the end of the block, by spaces: not every terminal of Windows knows a code for it."""
    try:
        yield
    finally:
        if watched():
            show(" " * _WIDTH + "\r")
