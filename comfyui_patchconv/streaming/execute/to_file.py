"""What goes to a file, where the host is the device: strips of stored maps, whole maps, and line buffers."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Collection

import torch
from torch import Tensor

from ...memory.mapped import MappedFile
from ..graph.node import Node, dense_strides
from .tensors import lasting

_ALIGNED = 64
"""Bytes of which the parts of a file are multiples, so that each begins where any type of values may."""


class StripsInFile:
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


class LinesInFile:
    """Rows in one file without a name, where the host is the device. sizes: bytes of each step's."""

    def __init__(self, sizes: Collection[int]) -> None:
        self._left = sum(sizes) + 2 * _ALIGNED * len(sizes)
        self._file = MappedFile(self._left, no_room)

    def room(self, size: int) -> Tensor:
        """So many bytes, which nothing else uses."""
        size = -(-size // _ALIGNED) * _ALIGNED
        if size > self._left:  # of a strip that had to be halved more rows may be kept
            return lasting(torch.empty(size, dtype=torch.uint8))
        self._left -= size
        return self._file.empty((size,), torch.uint8)

    def offload(self, node: Node, kept: Tensor, rows: Tensor) -> None:
        """Have the values of `rows` in `kept`, a part of a room."""
        kept.copy_(rows)

    def fetch(self, node: Node, line: Tensor) -> Tensor:
        """What was kept, on the device."""
        return line

    def prefetch(self, node: Node, line: Tensor) -> None:
        """The system reads ahead by itself."""


def map_in_file(node: Node) -> Tensor:
    """An empty tensor for a whole map."""
    return MappedFile(node.bytes, no_room).empty(node.shape, node.dtype)


def free_on_disk() -> int:
    """Bytes that files without a name have room for: none where their folder is gone."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free
    except OSError:
        return 0


def require_room(size: int) -> None:
    """Raise OSError where files have no room for `size` bytes."""
    unused = free_on_disk() if size else 0
    if size > unused:
        raise OSError(no_room(size, f"{unused / 1e6:.0f} MB are free"))


def no_room(size: int, why: object) -> str:
    if not os.path.isdir(tempfile.gettempdir()):
        return (
            f"The budget has {size / 1e6:.0f} MB of feature maps lie in a file, and {tempfile.gettempdir()} is not "
            "there: have TMPDIR name a folder that is, and start anew, or make it, or raise the budget."
        )
    return (
        f"The budget has {size / 1e6:.0f} MB of feature maps lie in a file, and {tempfile.gettempdir()} has no room "
        f"for it ({why}): have TMPDIR name a folder on a larger disk, or raise the budget."
    )
