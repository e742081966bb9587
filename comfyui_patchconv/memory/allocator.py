"""What allocators keep of freed memory, what it costs to have again, and when Python looks for garbage."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Optional

import torch


def release(device: torch.device) -> None:
    """Hand freed blocks that the device's allocator keeps back, so that a smaller request can use them.

    On a CPU that is the C library: of three strips of 25 MB each, behind which memory ran out, it kept all 75.
    """
    gc.collect()
    if device.type == "cpu":
        trim()
    empty_cache = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


@cache
def keep_freed_blocks() -> None:
    """Have glibc keep freed blocks of strip size for the next strip, once for this process.

    It maps blocks above a threshold anew each time, zeroed page by page, and raises that threshold to the size of a
    freed block, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). Freeing one of that size, never touched, made 64 -> 64
    channels at 2048² take 0.80 of eager's time instead of 1.2. Other allocators lose nothing.
    """
    with suppress(RuntimeError, MemoryError):
        torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


@cache
def _trim() -> Optional[Callable[[int], int]]:
    """glibc's `malloc_trim`; None where it is another library."""
    with suppress(OSError, AttributeError, TypeError):
        return ctypes.CDLL(None).malloc_trim
    return None


@contextmanager
def no_collections() -> Iterator[None]:
    """Within the block Python looks for no circles of garbage: a large graph is made, and all of it is used. Each look
    goes through every object that the process has."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_RARELY = 50_000
"""Objects that have come to be, and are still there, at which to look for garbage: more than a call's graph of some
hundred steps has."""


class _Thresholds:
    """What `gc` had set before the first of the `blocks` that go on."""

    def __init__(self) -> None:
        self.blocks, self.before, self.lock = 0, gc.get_threshold(), threading.Lock()


_thresholds = _Thresholds()


@contextmanager
def rare_collections() -> Iterator[None]:
    """Within the block, and in other threads meanwhile, Python looks for circles of garbage more rarely: the code of
    somebody else makes a large graph, and may make garbage too. What that code sets itself stays set."""
    with _thresholds.lock:
        if not _thresholds.blocks:
            _thresholds.before = first, *others = gc.get_threshold()
            if 0 < first < _RARELY:
                gc.set_threshold(_RARELY, *others)
        _thresholds.blocks += 1
    try:
        yield
    finally:
        with _thresholds.lock:
            _thresholds.blocks -= 1
            if not _thresholds.blocks and gc.get_threshold() == (_RARELY, *_thresholds.before[1:]):
                gc.set_threshold(*_thresholds.before)


def trim() -> None:
    """Hand what the C library keeps of freed memory back to the system, where that is possible.

    Strips of many sizes, allocated in turn, leave gaps between them that add up to several times what is in use.
    """
    malloc_trim = _trim()
    if malloc_trim is not None:
        malloc_trim(0)
