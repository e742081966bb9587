"""Where stored maps lie when the device shall not hold them: host memory, or a file where the host is the device."""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress

import torch
from torch import Tensor


class HostBuffer:
    """Copies of strips in host memory, page-locked for CUDA so that they need not wait for each other."""

    def keep(self, strip: Tensor) -> Tensor:
        copy = torch.empty(strip.shape, dtype=strip.dtype, device="cpu", pin_memory=strip.device.type == "cuda")
        return copy.copy_(strip, non_blocking=copy.is_pinned())

    def discard(self, strip: Tensor) -> None:
        """The memory of a strip goes with it."""


class FileBuffer:
    """Strips in a file of `size` bytes without a name, mapped into memory: it is gone when nothing reads it any more.

    The system writes it out and reads it as it sees fit; none of it counts as this process's own memory. It lies where
    temporary files do (`TMPDIR`). Raises OSError where there is no room for it.
    """

    def __init__(self, size: int) -> None:
        with tempfile.TemporaryFile(prefix="patchconv-") as file:
            if hasattr(os, "posix_fallocate"):  # room that is missing is an error now, not a crash when it is written
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)
        self._end = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next part of the file as a tensor."""
        tensor = torch.frombuffer(self._map, dtype=dtype, count=torch.Size(shape).numel(), offset=self._end).view(shape)
        self._end += tensor.nbytes
        return tensor

    def keep(self, strip: Tensor) -> Tensor:
        return self.empty(tuple(strip.shape), strip.dtype).copy_(strip)

    def discard(self, strip: Tensor) -> None:
        """Give the pages back that lie wholly within a strip kept here, before they are written out for nothing."""
        first = strip.data_ptr() - torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        last = (first + strip.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        remove = getattr(mmap, "MADV_REMOVE", None)
        if remove is not None and first < last:
            with suppress(OSError):  # not every file system can
                self._map.madvise(remove, first, last - first)


def lasting(like: Tensor) -> Tensor:
    """An empty tensor as `like`; on the CPU in memory of its own, where the system has that.

    It outlives the temporary tensors around it, between which it would leave gaps that the allocator cannot use.
    """
    flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    if like.device.type != "cpu" or not flags or not like.nbytes:
        return torch.empty_like(like)
    return torch.frombuffer(mmap.mmap(-1, like.nbytes, flags=flags), dtype=like.dtype).view(like.shape)
