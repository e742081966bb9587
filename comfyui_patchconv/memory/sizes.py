"""What suits a kind of device: bytes of a strip, and of freed memory that its allocator keeps. Figures only."""

from __future__ import annotations

STRIP_BYTES = {"cpu": 32 << 20}
"""CPU: half of it each way is what the allocator can hand out again (`allocator.keep_freed_blocks`); so strips ran in
0.80 to 0.98 of eager's time, and in 1.1 to 1.4 with 64 MiB each way."""

_STRIP_BYTES_OF_OTHERS = 64 << 20
"""Enough rows to fill a GPU, little beside what it holds anyway, where nothing was measured (`streaming.suited`)."""

STRIPS_AT_ONCE = 6
"""Strips of the widest step alive at once: with their halo rows, its result, and what a backend copies of them."""

_ALLOCATOR_BYTES = {"cpu": 24 << 20}


def strip_bytes(device_type: str) -> int:
    """Bytes of input and output of one strip that suit a device type."""
    return STRIP_BYTES.get(device_type, _STRIP_BYTES_OF_OTHERS)


def allocator_bytes(device_type: str) -> int:
    """Bytes of freed strips that the allocator may keep before they are handed back to the system. It may keep more
    while less is held than at the peak: what is handed back has to be taken anew."""
    return _ALLOCATOR_BYTES.get(device_type, 0)
