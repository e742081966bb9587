"""Where stored maps lie when the device shall not hold them: host memory, or a file where the host is the device."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
from typing import Optional, Union

import torch
from torch import Tensor

from ...memory.mapped import MappedFile
from ...memory.usage import free
from ..graph.node import dense_strides
from .copies import Arrival, Copies, Leaving, copies_of, if_there_is_room


class HostBuffer:
    """Strips in host memory. One that the device wrote leaves while it writes the next, and one that it will read comes
    while it reads those before.

    A strip on its way takes its memory on the device until it is known to have left.
    """

    def __init__(self, copies: Copies, dim: int = -2) -> None:
        self._copies, self._dim, self._leaving = copies, dim, Leaving(copies)
        self._fetched: dict[int, _Fetched] = {}  # strips that are on the device too, or come there, by their first row

    def offload(self, strip: Tensor) -> Tensor:
        """The values of `strip`, which nothing may write to any more, in memory of the host.

        It may be read there only once it has arrived, which `fetch` and `wait` see to.
        """
        repeats = any(stride == 0 and side > 1 for stride, side in zip(strip.stride(), strip.shape))
        if is_borrowed(strip) or repeats:
            strip = strip.clone()
        self._leaving.make_way()
        copy = self._copies.room(strip)
        self._leaving.add(copy, strip)
        return copy

    def fetch(self, start: int, strip: Tensor, device: torch.device) -> Tensor:
        """An offloaded strip, on the device again; row `start` is its first."""
        fetched = self._fetched.get(start) or self._start(start, strip, device)
        return fetched.ready()

    def prefetch(self, start: int, strip: Tensor, device: torch.device) -> None:
        """The strip from row `start` on is the one that will be read next: it may come now, where there is room."""
        if start not in self._fetched:
            if_there_is_room(lambda: self._start(start, strip, device))

    def _start(self, start: int, strip: Tensor, device: torch.device) -> _Fetched:
        self.wait()
        fetched = self._fetched[start] = _Fetched(
            torch.empty_like(strip, device=device), strip, self._copies, strip.shape[self._dim]
        )
        return fetched

    def release(self, before: int) -> None:
        """Rows above `before` will not be read again soon: their strips need not be on the device."""
        gone = [start for start, fetched in self._fetched.items() if start + fetched.rows <= before]
        for start in gone:
            del self._fetched[start]

    def wait(self) -> None:
        """Wait for all strips that are leaving."""
        self._leaving.wait()

    def discard(self, strip: Tensor) -> None:
        """The memory of a strip is freed with it."""


class _Fetched:
    """An `offloaded` strip, which comes into `values` on the device."""

    def __init__(self, values: Tensor, offloaded: Tensor, copies: Copies, rows: int) -> None:
        self.rows = rows
        self._values, self._copies = values, copies
        self._coming: Optional[tuple[Tensor, Arrival]] = (offloaded, copies.start(values, offloaded))

    def ready(self) -> Tensor:
        """Its values, for work that the device is given after this."""
        if self._coming is not None:
            self._copies.await_on_device(self._coming[1])
            self._coming = None
        return self._values

    def __del__(self) -> None:
        coming = getattr(self, "_coming", None)
        if coming is not None:  # it still writes to memory that is freed now
            coming[1].synchronize()


class FileBuffer:
    """Strips in a file of `size` bytes without a name; see `MappedFile`. Raises OSError where there is no room."""

    def __init__(self, size: int) -> None:
        self._file = MappedFile(size, no_room)

    def offload(self, strip: Tensor) -> Tensor:
        """The next part of the file, with the values of `strip`."""
        if not hasattr(os, "pwrite"):
            return self._file.empty(tuple(strip.shape), strip.dtype).copy_(strip)
        if dense_strides(strip.shape, strip.stride()) != list(strip.stride()):
            strip = strip.contiguous()
        values = (ctypes.c_char * strip.nbytes).from_address(strip.data_ptr())
        kept = self._file.filled(values, tuple(strip.shape), strip.dtype)
        return kept.as_strided(strip.shape, strip.stride())

    def fetch(self, start: int, strip: Tensor, device: torch.device) -> Tensor:
        """An offloaded strip is where it can be read."""
        return strip

    def prefetch(self, start: int, strip: Tensor, device: torch.device) -> None:
        """The system reads ahead by itself."""

    def release(self, before: int) -> None:
        """Pages that are not read go by themselves."""

    def wait(self) -> None:
        """All are there."""

    def discard(self, strip: Tensor) -> None:
        """Give back the room of an offloaded strip, where the system can."""
        self._file.discard(strip)


def buffer_for(device: torch.device, size: int, dim: int = -2) -> Union[HostBuffer, FileBuffer]:
    """Where a map of `size` bytes lies that `device` shall not hold, and that comes in rows along `dim`."""
    return FileBuffer(size) if device.type == "cpu" else HostBuffer(copies_of(device), dim)


def room(device: torch.device) -> int:
    """Bytes of what does not fit on `device` that there is room for."""
    return shutil.disk_usage(tempfile.gettempdir()).free if device.type == "cpu" else free(torch.device("cpu"))


def require_room(size: int) -> None:
    """Raise OSError where files have no room for `size` bytes."""
    unused = room(torch.device("cpu")) if size else 0
    if size > unused:
        raise OSError(no_room(size, f"{unused / 1e6:.0f} MB are free"))


def no_room(size: int, why: object) -> str:
    return (
        f"The budget has {size / 1e6:.0f} MB of feature maps lie in a file, and {tempfile.gettempdir()} has no room "
        f"for it ({why}): have TMPDIR name a folder on a larger disk, or raise the budget."
    )


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
