"""Errors of memory that ran out, on any device, and what an error says."""

from __future__ import annotations

import torch

_MESSAGES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "status_alloc_failed",  # cuDNN and cuBLAS, where there is none for what they work in
    "storage size calculation overflowed",  # torch, of more than any machine has
    "could not create a primitive",  # oneDNN, where there is no room for what it works in
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed, on any device: only CUDA's has a type of its own."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MESSAGES)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
