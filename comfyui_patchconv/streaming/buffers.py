"""Where stored maps lie when the device shall not hold them: host memory, or a file where the host is the device."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..memory import free


class HostBuffer:
    """Copies of strips in host memory, page-locked for CUDA so that the host need not wait for them.

    Until the device is through with its work they may be read by the device alone, whole.
    """

    def keep(self, strip: Tensor) -> Tensor:
        copy = self._empty(strip)
        return copy.copy_(strip, non_blocking=copy.is_pinned())

    @staticmethod
    def _empty(strip: Tensor) -> Tensor:
        if strip.device.type == "cuda":
            with suppress(RuntimeError):  # systems lock a part of their memory at most
                return torch.empty(strip.shape, dtype=strip.dtype, pin_memory=True)
        return torch.empty(strip.shape, dtype=strip.dtype)

    def discard(self, strip: Tensor) -> None:
        """The memory of a strip goes with it."""


class FileBuffer:
    """Strips in a file of `size` bytes without a name, mapped into memory: it is gone when nothing reads it any more.

    The system writes it out and reads it as it sees fit; none of it counts as this process's own memory. It lies where
    temporary files do (`TMPDIR`), and takes room as strips come. Raises OSError where there is none.
    """

    def __init__(self, size: int) -> None:
        self._end = 0
        try:
            self._file = tempfile.TemporaryFile(prefix="patchconv-")  # noqa: SIM115 - open while it is mapped
            self._file.truncate(size)
            self._map = mmap.mmap(self._file.fileno(), size)
        except (OSError, OverflowError) as error:
            raise OSError(_no_room(size, error)) from error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next part of the file as a tensor."""
        self._take(torch.Size(shape).numel() * dtype.itemsize)
        return self._next(shape, dtype)

    def keep(self, strip: Tensor) -> Tensor:
        """The next part of the file, with the values of `strip`."""
        if not hasattr(os, "pwrite"):
            return self.empty(tuple(strip.shape), strip.dtype).copy_(strip)
        strip = strip.contiguous()
        self._write((ctypes.c_char * strip.nbytes).from_address(strip.data_ptr()))
        return self._next(tuple(strip.shape), strip.dtype)

    def _next(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        tensor = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._end).view(shape)
        self._end += tensor.nbytes
        return tensor

    def _write(self, values: Any) -> None:
        """Write bytes at the end: in half of the time that touching their pages in the map takes."""
        rest, place = memoryview(values), self._end
        try:
            while rest:
                written = os.pwrite(self._file.fileno(), rest, place)
                rest, place = rest[written:], place + written
        except OSError as error:
            raise OSError(_no_room(len(rest), error)) from error

    def discard(self, strip: Tensor) -> None:
        """Give the pages back that lie wholly within a strip kept here, before they are written out for nothing."""
        first = strip.data_ptr() - torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        last = (first + strip.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        remove = getattr(mmap, "MADV_REMOVE", None)
        if remove is not None and first < last:
            with suppress(OSError):  # not every file system can
                self._map.madvise(remove, first, last - first)

    def _take(self, size: int) -> None:
        """Room for the next `size` bytes: what is missing is an error now, not a crash when they are written.

        Windows has taken it for the whole file already.
        """
        if not hasattr(os, "posix_fallocate"):
            if hasattr(os, "pwrite"):
                self._write(bytes(size))
            return
        try:
            os.posix_fallocate(self._file.fileno(), self._end, size)
        except OSError as error:
            raise OSError(_no_room(size, error)) from error


GIVES_BACK = hasattr(mmap, "MADV_REMOVE")
"""Whether the room of strips that are discarded can be had again before the whole file is gone."""


def room(device: torch.device) -> int:
    """Bytes that there is room for elsewhere than on `device`."""
    return shutil.disk_usage(tempfile.gettempdir()).free if device.type == "cpu" else free(torch.device("cpu"))


def require_room(size: int) -> None:
    """Raise OSError where files have no room for `size` bytes."""
    unused = room(torch.device("cpu")) if size else 0
    if size > unused:
        raise OSError(_no_room(size, f"{unused / 1e6:.0f} MB are free"))


def _no_room(size: int, why: object) -> str:
    return (
        f"The budget has {size / 1e6:.0f} MB of feature maps lie in a file, and {tempfile.gettempdir()} has no room "
        f"for it ({why}): have TMPDIR name a folder on a larger disk, or raise the budget."
    )


def lasting(like: Tensor) -> Tensor:
    """An empty tensor as `like` that a map cannot mistake for a strip of its own (`rows._is_borrowed`): in more memory
    than it needs, or on the CPU in the system's, where that is possible.

    It outlives the temporary tensors around it, between which it would leave gaps that the allocator cannot use.
    """
    flags = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    if like.device.type != "cpu" or not flags or not like.nbytes:
        return like.new_empty((*like.shape[:-2], like.shape[-2] + 1, like.shape[-1])).narrow(-2, 0, like.shape[-2])
    return torch.frombuffer(mmap.mmap(-1, like.nbytes, flags=flags), dtype=like.dtype).view(like.shape)
