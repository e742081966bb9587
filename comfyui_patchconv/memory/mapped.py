"""Tensors in a file without a name, which are no memory of this process's own."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_ZEROS = 1 << 20
"""Bytes that are written at once where room can be taken by writing alone."""


class MappedFile:
    """A file of `size` bytes without a name, mapped into memory: it is gone when nothing reads it any more.

    The system writes it out and reads it as it sees fit; none of it counts as this process's own memory. It lies where
    temporary files do (`TMPDIR`), and takes room as parts of it are taken, one behind the other. Raises OSError, with
    what `no_room` says of bytes and a reason, where there is none.
    """

    def __init__(self, size: int, no_room: Callable[[int, object], str]) -> None:
        self._end, self._no_room = 0, no_room
        try:
            self._file = tempfile.TemporaryFile(prefix="patchconv-")  # noqa: SIM115 - open while parts are taken
            self._file.truncate(size)
            self._map = mmap.mmap(self._file.fileno(), size)
        except (OSError, OverflowError) as error:
            raise OSError(no_room(size, error)) from error

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next part of the file as a tensor without values."""
        self._take(torch.Size(shape).numel() * dtype.itemsize)
        return self._next(shape, dtype)

    def filled(self, values: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next part of the file as a tensor of these bytes; only where the system has `os.pwrite`.

        It takes half of the time that touching their pages in the map does.
        """
        self._write(values)
        return self._next(shape, dtype)

    def discard(self, part: Tensor) -> None:
        """Give the pages back that lie wholly within a part, before they are written out for nothing."""
        first = part.data_ptr() - torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        last = (first + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        remove = getattr(mmap, "MADV_REMOVE", None)
        if remove is not None and first < last:
            with suppress(OSError):  # not every file system can
                self._map.madvise(remove, first, last - first)

    def _next(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        tensor = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._end).view(shape)
        self._end += tensor.nbytes
        return tensor

    def _take(self, size: int) -> None:
        """Room for the next `size` bytes: what is missing is an error now, not a crash when they are written.

        macOS has no call for it, so zeros are written there. Windows has taken it for the whole file already.
        """
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._file.fileno(), self._end, size)
            except OSError as error:
                raise OSError(self._no_room(size, error)) from error
        elif hasattr(os, "pwrite"):
            zeros = bytes(min(size, _ZEROS))
            for done in range(0, size, _ZEROS):
                self._write(memoryview(zeros)[: size - done], done)

    def _write(self, values: Any, behind: int = 0) -> None:
        """Write bytes `behind` the end."""
        rest, place = memoryview(values), self._end + behind
        try:
            while rest:
                written = os.pwrite(self._file.fileno(), rest, place)
                rest, place = rest[written:], place + written
        except OSError as error:
            raise OSError(self._no_room(len(rest), error)) from error
