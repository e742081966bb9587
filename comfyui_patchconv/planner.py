"""How many strips, of how many rows. Integers only; the figures are measured by `benchmarks/`."""

from __future__ import annotations

from typing import Optional

MODES = ("patch", "stream")
"""What users choose between: each large convolution in strips, or all of a decoder or encoder."""

MILLION, GIB = 1_000_000, 2**30
"""The units in which users give elements and bytes."""

DEFAULT_THRESHOLD = 16_000_000
"""Input elements (C·H·W, times depth for 3-D) from which a convolution is run in strips."""

MAX_ELEMENTS = 2**31 - 1
"""Largest tensor that every backend indexes: PyTorch's `canUse32BitIndexMath`, INT_MAX on MPS."""

STRIP_BYTES = {"cpu": 32 << 20}
"""Bytes of input and output of one strip that suit a device type. CPU: half of it each way is what the allocator can
hand out again (memory.py); so strips ran in 0.80 to 0.98 of plain's time, and in 1.1 to 1.4 with 64 MiB each way."""

STRIP_BYTES_ELSEWHERE = 64 << 20
"""The same for other devices: enough rows to fill a GPU, little beside what it holds anyway. Not measured yet."""

ALLOCATOR_BYTES = {"cpu": 24 << 20}
"""What an allocator may keep of freed strips, beside those in use, before it has to hand it back; more while less is
stored than at the worst moment, since what is handed back is taken anew."""

MARGIN = 1.1
"""Of what a host makes room by, over what was counted."""

_STRIP_COPIES = 3
"""A strip's rows, its result, and the reordered copies that a backend makes of them."""

OF_FREE = 0.8
"""Share of the free memory that an automatic budget takes: the rest is for what a count does not see."""


def strip_rows(rows: int, splits: int, row_bytes: int, device_type: str) -> int:
    """Output rows of one strip, from 1 to `rows`.

    rows: output rows in all. splits: strips asked for, at least; 0 for as many as suit the device. On a CPU strips
    are never larger than suits it: smaller ones are both thriftier and faster.
    row_bytes: bytes of input and output that each output row stands for.
    """
    suitable = max(STRIP_BYTES.get(device_type, STRIP_BYTES_ELSEWHERE) // max(row_bytes, 1), 1)
    if splits == 0:
        return min(suitable, rows)
    asked = -(-rows // min(splits, rows))
    return min(asked, suitable) if device_type == "cpu" else asked


def working_set(maps: int, splits: int, threshold: int, device_type: str, element_bytes: int) -> int:
    """Bytes that a convolution in strips needs besides its input and output: of a strip, or whole below the threshold.

    maps: bytes of the largest feature maps that are held at once. threshold: elements.
    """
    suitable = STRIP_BYTES.get(device_type, STRIP_BYTES_ELSEWHERE)
    strip = maps // splits if splits else suitable
    strip = min(strip, suitable) if device_type == "cpu" else strip
    return max(_STRIP_COPIES * strip, min(2 * threshold * element_bytes, maps))


def fits(budget: Optional[int], held: int, freed: int, new: int) -> bool:
    """Whether `new` bytes can be added to `held` within `budget`, while `freed` of them go at the same pace."""
    return budget is None or held + max(new - freed, 0) <= budget


def legal_rows(row_elements: int, fixed_elements: int = 0) -> int:
    """Rows of `row_elements` elements that, with `fixed_elements` more, stay within `MAX_ELEMENTS`; 0 if none do."""
    return max(MAX_ELEMENTS - fixed_elements, 0) // max(row_elements, 1)
