"""Where stored maps lie when the device shall not hold them: host memory, or a file where the host is the device."""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress
from typing import Optional

import torch
from torch import Tensor

from .order import has_channels_last


class HostBuffer:
    """Copies of strips in host memory, page-locked for CUDA so that they need not wait for each other."""

    def keep(self, strip: Tensor) -> Tensor:
        copy = torch.empty(strip.shape, dtype=strip.dtype, device="cpu", pin_memory=strip.device.type == "cuda")
        return copy.copy_(strip, non_blocking=copy.is_pinned())

    def discard(self, strip: Tensor) -> None:
        """The memory of a strip goes with it."""


class _MappedBuffer:
    """Strips one behind the other in mapped memory, whose pages can be given up one by one."""

    _map: mmap.mmap
    _give_up: Optional[int]
    _end = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next part of the buffer as a tensor."""
        count = torch.Size(shape).numel()
        tensor = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._end).view(shape)
        self._end += count * dtype.itemsize
        return tensor

    def empty_like(self, strip: Tensor) -> Tensor:
        """The next part of the buffer, as `empty`, in the order of `strip`."""
        if has_channels_last(strip):
            return self.empty(tuple(strip.permute(0, 2, 3, 1).shape), strip.dtype).permute(0, 3, 1, 2)
        return self.empty(tuple(strip.shape), strip.dtype)

    def keep(self, strip: Tensor) -> Tensor:
        return self.empty_like(strip).copy_(strip)

    def discard(self, strip: Tensor) -> None:
        """Give the pages back that lie wholly within a strip kept here."""
        first = strip.data_ptr() - torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        last = first + strip.numel() * strip.element_size()
        first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        if self._give_up is not None and first < last:
            with suppress(OSError):  # not every file system can
                self._map.madvise(self._give_up, first, last - first)


class MemoryBuffer(_MappedBuffer):
    """Strips in memory of their own, which they can give back whatever lies beside them in the allocator's."""

    _give_up = getattr(mmap, "MADV_DONTNEED", None)

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    @classmethod
    def works(cls) -> bool:
        """Whether this system maps memory so, and takes pages back."""
        return cls._give_up is not None and hasattr(mmap, "MAP_ANONYMOUS")


class FileBuffer(_MappedBuffer):
    """Strips in a file of `size` bytes without a name, mapped into memory: it is gone when nothing reads it any more.

    The system writes it out and reads it as it sees fit; none of it counts as this process's own memory. It lies where
    temporary files do (`TMPDIR`). Raises OSError where there is no room for it.
    """

    _give_up = getattr(mmap, "MADV_REMOVE", None)  # before they are written out for nothing

    def __init__(self, size: int) -> None:
        with tempfile.TemporaryFile(prefix="patchconv-") as file:
            if hasattr(os, "posix_fallocate"):  # room that is missing is an error now, not a crash when it is written
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            self._map = mmap.mmap(file.fileno(), size)


def lasting(like: Tensor) -> Tensor:
    """An empty tensor as `like`, in memory of its own on the CPU: it outlives the temporary tensors around it."""
    if like.device.type != "cpu" or not MemoryBuffer.works():
        return torch.empty_like(like)
    return MemoryBuffer(max(like.numel(), 1) * like.element_size()).empty_like(like)
