"""New tensors that rows are copied into: with memory of their own, laid out in it as another tensor is."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from ..graph.node import dense_strides


def is_borrowed(strip: Tensor) -> bool:
    """Whether a strip lies in memory that is more than its own, or not torch's (a part of a file may be discarded)."""
    storage = strip.untyped_storage()
    own = strip.device.type != "cpu" or getattr(storage, "resizable", lambda: False)()  # torch 2.1 cannot tell
    return not own or storage.nbytes() > strip.numel() * strip.element_size()


def lasting(like: Tensor) -> Tensor:
    """An empty tensor as `like` that a map cannot mistake for a strip of its own (`is_borrowed`): in more memory
    than it needs, by a value, or on the CPU in the system's, where that is possible.

    It outlives the temporary tensors around it, between which it would leave gaps that the allocator cannot use.
    """
    flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    if like.device.type != "cpu" or not flags or not like.nbytes:
        return dense(like.new_empty(like.numel() + 1)[:-1], like)
    try:
        mapped = mmap.mmap(-1, like.nbytes, flags=flags)
    except OSError as error:
        raise MemoryError(f"The system gives no {like.nbytes / 1e6:.0f} MB more ({error}).") from error
    return dense(torch.frombuffer(mapped, dtype=like.dtype), like)


def dense(room: Tensor, like: Tensor) -> Tensor:
    """`room`, of one dimension, in the shape of `like` and in its order, without gaps."""
    strides = dense_strides(like.shape, like.stride())
    return room.view(like.shape) if strides is None else room.as_strided(like.shape, strides)
