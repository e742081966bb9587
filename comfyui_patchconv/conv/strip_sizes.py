"""How many strips, of how many rows. Integers only; the figures are measured by `benchmarks/`."""

from __future__ import annotations

from typing import Optional

from ..memory.sizes import strip_bytes

DEFAULT_THRESHOLD = 16_000_000
"""Input elements (C·H·W, times depth for 3-D) from which a convolution is run in strips."""

MAX_ELEMENTS = 2**31 - 1
"""Largest tensor that every backend indexes: PyTorch's `canUse32BitIndexMath`, INT_MAX on MPS."""

_STRIP_COPIES = 3
"""A strip's rows, its result, and the reordered copies that a backend makes of them."""


def strip_rows(rows: int, splits: int, row_bytes: int, device_type: str, suitable: Optional[int] = None) -> int:
    """Output rows of one strip, from 1 to `rows`.

    rows: output rows in all. splits: strips asked for, at least; 0 for as many as suit the device. On a CPU strips
    are never larger than suits it: smaller ones are both thriftier and faster.
    row_bytes: bytes of input and output that each output row stands for. suitable: bytes of a strip; None for what
    suits the device.
    """
    most = max((strip_bytes(device_type) if suitable is None else suitable) // max(row_bytes, 1), 1)
    if splits == 0:
        return min(most, rows)
    asked = -(-rows // min(splits, rows))
    return min(asked, most) if device_type == "cpu" else asked


def working_set(maps: int, splits: int, threshold: int, device_type: str, element_bytes: int) -> int:
    """Bytes that a convolution in strips needs besides its input and output: of a strip, or whole below the threshold.

    maps: bytes of the largest feature maps that are held at once. threshold: elements.
    """
    suitable = strip_bytes(device_type)
    strip = maps // splits if splits else suitable
    strip = min(strip, suitable) if device_type == "cpu" else strip
    return max(_STRIP_COPIES * strip, min(2 * threshold * element_bytes, maps))


def legal_rows(row_elements: int, fixed_elements: int = 0, most: int = MAX_ELEMENTS) -> int:
    """Rows of `row_elements` elements that, with `fixed_elements` more, stay within `most`; 0 if none do."""
    return max(most - fixed_elements, 0) // max(row_elements, 1)
