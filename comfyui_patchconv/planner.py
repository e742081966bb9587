"""How many strips, of how many rows. Integers only; the figures are measured by `benchmarks/`."""

from __future__ import annotations

DEFAULT_THRESHOLD = 16_000_000
"""Input elements (C·H·W, times depth for 3-D) from which a convolution is run in strips."""

MAX_ELEMENTS = 2**31 - 1
"""Largest tensor that every backend indexes: PyTorch's `canUse32BitIndexMath`, INT_MAX on MPS."""

STRIP_BYTES = {"cpu": 16 << 20}
"""Automatic strips: bytes that one strip's input and output may take together, per device type."""

STRIP_BYTES_ELSEWHERE = 64 << 20


def strip_rows(rows: int, splits: int, row_bytes: int, device_type: str) -> int:
    """Output rows of one strip, from 1 to `rows`.

    rows: output rows in all. splits: strips asked for; 0 for as many as keep one strip, of `row_bytes` bytes of input
    and output for each output row, within the device's `STRIP_BYTES`.
    """
    if splits > 0:
        return -(-rows // min(splits, rows))
    target = STRIP_BYTES.get(device_type, STRIP_BYTES_ELSEWHERE)
    return min(max(target // max(row_bytes, 1), 1), rows)


def legal_rows(row_elements: int, fixed_elements: int = 0) -> int:
    """Rows of `row_elements` elements that, with `fixed_elements` more, stay within `MAX_ELEMENTS`; 0 if none do."""
    return max(MAX_ELEMENTS - fixed_elements, 0) // max(row_elements, 1)
