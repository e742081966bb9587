"""Bytes, seconds and millions of elements: the units in which people give and read them."""

from __future__ import annotations

import re

MILLION = 1_000_000
MIB, GIB = 2**20, 2**30

_MOST = 2.0**63
"""Bytes, in which sizes are counted by numbers of 64 bits."""


def bytes_of(text: str) -> int:
    """Bytes of `2GiB`, `1.5 GB`, `800MB` or a bare number. Raises ValueError for anything else, for less than 1, and
    for more than any machine has."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B|)", text, re.ASCII | re.IGNORECASE)
    unit = found[2].lower() if found else ""
    scale = (1024 if "i" in unit else 1000) ** (" kmgt".index(unit[0]) if unit not in ("", "b") else 0)
    value = float(found[1]) * scale if found else 0.0
    if value >= _MOST:
        raise ValueError(f"{text[:20]!r}… is more than any machine has: give a size such as 2GiB or 800MB")
    if round(value) < 1:
        raise ValueError(f"{text!r} is not a size above 0 such as 2GiB or 800MB")
    return round(value)


def size_of(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def time_of(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s"
