"""Out-of-memory errors: how to recognise one, and how to give back what a device's cache still holds."""

from __future__ import annotations

import gc

import torch

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed, on any device: only CUDA's has a type of its own."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MESSAGES)


def release(device: torch.device) -> None:
    """Hand freed blocks of the device's caching allocator back, so that a smaller request can use them."""
    gc.collect()
    empty_cache = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()
