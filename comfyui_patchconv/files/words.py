"""Texts out of files, made fit for a sentence: strangers may have written them."""

from __future__ import annotations

from collections.abc import Iterable

_MOST = 80


def short(text: object, most: int = _MOST) -> str:
    """`text` in one line of at most `most` characters, all of them printable."""
    found = ascii(str(text)[: most + 1])[1:-1]
    return found if len(found) <= most else found[: most - 3] + "..."


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first `most` of these names in a line of at most 130 characters, and how many more there are."""
    found = list(names)
    if not found:
        return "no tensors"
    shown = found[:most]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(short(name, 130 // len(shown) - 2) for name in shown) + more


def shape_of(shape: Iterable[int]) -> str:
    """A shape, however long it is said to be."""
    return short(list(shape), 40)
