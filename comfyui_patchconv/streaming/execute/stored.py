"""Stored maps: one tensor, or strips that are added in order and can be freed in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional, Union

import torch
from torch import Tensor

from ...memory.mapped import MappedFile
from ..graph.node import Node, dense_strides
from .buffers import FileBuffer, HostBuffer, buffer_for, is_borrowed, no_room


class Strips:
    """A map as strips of rows along `node.dim`.

    offloaded: they lie in host memory, or in a file where the device is the CPU. count: is told the bytes that they
    take on the device, as these change.
    """

    def __init__(self, node: Node, offloaded: bool, count: Callable[[int], None]) -> None:
        self.node, self.dim, self.end = node, node.dim or 0, 0
        self._count: Callable[[int], None] = (lambda size: None) if offloaded else count
        self._strips: list[tuple[int, int, Tensor]] = []  # first row, rows, values
        self._buffer: Optional[Union[HostBuffer, FileBuffer]] = (
            buffer_for(node.device, node.bytes, self.dim) if offloaded else None
        )

    def append(self, strip: Tensor) -> None:
        """The next rows."""
        rows = strip.shape[self.dim]
        if self._buffer is not None:
            strip = self._buffer.keep(strip)
        elif is_borrowed(strip):
            strip = strip.clone()
        self._strips.append((self.end, rows, strip))
        self.end += rows
        self._count(rows * self.node.row_bytes)

    def read(self, first: int, last: int) -> Tensor:
        """Rows `[first, last)`, on the device: a view where one strip has them all."""
        parts, buffer, dim = [], self._buffer, self.dim
        if buffer is not None:
            buffer.forget(first)
        for start, rows, strip in self._strips:
            if start + rows <= first:
                continue
            if start >= last:
                if buffer is not None and last > first:
                    buffer.expect(start, strip, self.node.device)
                break
            if buffer is not None:
                strip = buffer.bring(start, strip, self.node.device)
            low, high = max(first - start, 0), min(last, start + rows) - start
            parts.append(strip if (low, high) == (0, rows) else strip.narrow(dim, low, high - low))
        if buffer is not None and last >= self.end:
            buffer.forget(self.end)
        if not parts:
            shape = [*self.node.shape[:dim], 0, *self.node.shape[dim + 1 :]]
            return torch.empty(shape, dtype=self.node.dtype, device=self.node.device)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def free(self, before: int) -> None:
        """Free the strips that lie wholly above row `before`."""
        while self._strips and self._strips[0][0] + self._strips[0][1] <= before:
            _, rows, strip = self._strips.pop(0)
            self._count(-rows * self.node.row_bytes)
            if self._buffer is not None:
                self._buffer.discard(strip)


class Single:
    """A map in one tensor, with the strides of eager's: in its node's home, or in a file if `offloaded`, where the
    device is the CPU.

    count: see `Strips`.
    """

    def __init__(self, node: Node, offloaded: bool, inference: bool, count: Callable[[int], None]) -> None:
        self.node, self.end = node, 0
        self._count: Callable[[int], None] = (lambda size: None) if offloaded else count
        self.dim = node.dim if node.dim is not None else 0
        if node.home is not None:
            self._count, self.tensor = (lambda size: None), node.home
            return
        if offloaded and node.device.type == "cpu":
            self.tensor = MappedFile(node.bytes, no_room).empty(node.shape, node.dtype)
            return
        with torch.inference_mode(inference):
            self.tensor = empty(node)

    def append(self, strip: Tensor) -> None:
        rows = strip.shape[self.dim]
        self.tensor.narrow(self.dim, self.end, rows).copy_(strip)
        self.end += rows
        self._count(rows * self.node.row_bytes)

    def read(self, first: int, last: int) -> Tensor:
        return self.tensor.narrow(self.dim, first, last - first)

    def free(self, before: int) -> None:
        """It is freed as a whole."""
        if before >= self.end > 0:
            self._count(-self.end * self.node.row_bytes)
            self.end = 0


def empty(node: Node) -> Tensor:
    """An empty tensor for a map: with eager's strides where these leave no gaps, else in their order without gaps."""
    dense = dense_strides(node.shape, node.strides)
    if dense is None:
        return torch.empty(node.shape, dtype=node.dtype, device=node.device)
    return torch.empty_strided(node.shape, dense, dtype=node.dtype, device=node.device)
