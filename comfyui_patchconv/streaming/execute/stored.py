"""Stored maps: one tensor, or strips that are added in order and can be freed in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Optional, Union

import torch
from torch import Tensor

from ..graph.node import Node, Span, dense_strides, in_order
from ..graph.steps import rows_of
from .offloaded import OffloadedStrips, strips_for
from .tensors import is_borrowed
from .to_file import map_in_file


class StoredStrips:
    """Rows `band` of a map, as strips along `node.dim`.

    offloaded: they lie in host memory, or in a file where the device is the CPU. count: is told the bytes that they
    take on the device, as these change. beside: rows of the map that are not of the band, as first row and values,
    which somebody else stores.
    """

    def __init__(self, node: Node, offloaded: bool, count: Callable[[int], None], band: Span) -> None:
        self.node, self.dim, (self.end, last) = node, node.dim or 0, band
        self.beside: list[tuple[int, Tensor]] = []
        self._count: Callable[[int], None] = (lambda size: None) if offloaded else count
        self._strips: list[tuple[int, int, Tensor]] = []  # first row, rows, values
        self._buffer: Optional[OffloadedStrips] = (
            strips_for(node.device, (last - self.end) * node.row_bytes, self.dim)
            if offloaded and self.end < last
            else None
        )

    def append(self, strip: Tensor) -> None:
        """The next rows."""
        rows = strip.shape[self.dim]
        if self._buffer is not None:
            strip = self._buffer.offload(strip)
        elif is_borrowed(strip):
            strip = strip.clone()
        self._strips.append((self.end, rows, strip))
        self.end += rows
        self._count(rows * self.node.row_bytes)

    def read(self, first: int, last: int) -> Tensor:
        """Rows `[first, last)`, on the device: a view where one strip has them all."""
        found: list[tuple[int, Tensor]] = []
        buffer, dim = self._buffer, self.dim
        for start, values in self.beside:
            low, high = max(first, start), min(last, start + values.shape[dim])
            if low < high:
                found.append((low, values.narrow(dim, low - start, high - low)))
        if buffer is not None:
            buffer.release(first)
        for start, rows, strip in self._strips:
            if start + rows <= first:
                continue
            if start >= last:
                if buffer is not None and last > first:
                    buffer.prefetch(start, strip, self.node.device)
                break
            if buffer is not None:
                strip = buffer.fetch(start, strip, self.node.device)
            low, high = max(first - start, 0), min(last, start + rows) - start
            found.append((start + low, rows_of(strip, dim, low, high)))
        if buffer is not None and last >= self.end:
            buffer.release(self.end)
        parts = [values for _, values in (sorted(found, key=itemgetter(0)) if self.beside else found)]
        if not parts:
            return no_rows(self.node, dim)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def free(self, before: int) -> None:
        """Free the strips that lie wholly above row `before`."""
        while self._strips and self._strips[0][0] + self._strips[0][1] <= before:
            _, rows, strip = self._strips.pop(0)
            self._count(-rows * self.node.row_bytes)
            if self._buffer is not None:
                self._buffer.discard(strip)


class StoredTensor:
    """A map in one tensor, with the strides of eager's, or contiguous in a file if `offloaded`, where the device is the
    CPU: in its node's home where it has one.

    count: see `StoredStrips`. first: the row from which on rows are appended; what lies outside of these is `put`.
    """

    def __init__(
        self, node: Node, offloaded: bool, inference: bool, count: Callable[[int], None], first: int = 0
    ) -> None:
        self.node, self.end, self._rows = node, first, 0
        self._count: Callable[[int], None] = (lambda size: None) if offloaded else count
        self.dim = node.dim if node.dim is not None else 0
        if node.home is not None:
            self._count, self.tensor = (lambda size: None), node.home
            return
        if offloaded and node.device.type == "cpu":
            self.tensor = map_in_file(node)
            return
        with torch.inference_mode(inference):
            self.tensor = empty(node)

    @classmethod
    def of(cls, node: Node, result: Tensor, inference: bool, count: Callable[[int], None]) -> StoredTensor:
        """A map whose rows are all there: `result`, or a copy of it where that looks otherwise than eager's."""
        count(node.bytes)
        if result.is_inference() != inference or result.shape != node.shape or not in_order(result, node.strides):
            with torch.inference_mode(inference):
                kept = empty(node)
            result = kept.copy_(result)
        return cls.around(node, result, node.dim or 0, count)

    @classmethod
    def around(cls, node: Node, memory: Tensor, dim: int, count: Callable[[int], None]) -> StoredTensor:
        """A map whose rows along `dim` all lie in `memory`, or are to be put there, however that lies."""
        stored = cls.__new__(cls)
        stored.node, stored.tensor, stored.dim, stored._count = node, memory, dim, count
        stored.end = stored._rows = node.rows
        return stored

    def append(self, strip: Tensor) -> None:
        rows = strip.shape[self.dim]
        self.put(self.end, strip)
        self.end += rows

    def put(self, first: int, rows: Tensor) -> None:
        """Rows from `first` on."""
        count = rows.shape[self.dim]
        self.tensor.narrow(self.dim, first, count).copy_(rows)
        self._rows += count
        self._count(count * self.node.row_bytes)

    def read(self, first: int, last: int) -> Tensor:
        return self.tensor.narrow(self.dim, first, last - first)

    def free(self, before: int) -> None:
        """It is freed as a whole."""
        if before >= self.end and self._rows:
            self._count(-self._rows * self.node.row_bytes)
            self._rows = 0


def joined(stored: StoredStrips, band: Span, inference: bool) -> Tensor:
    """Rows `band` of a map in one tensor, in the order of eager's."""
    node, rows = stored.node, band[1] - band[0]
    shape = [*node.shape[: stored.dim], rows, *node.shape[stored.dim + 1 :]]
    dense = dense_strides(shape, node.strides)
    with torch.inference_mode(inference):
        result = torch.empty(shape, dtype=node.dtype, device=node.device)
        if dense is not None:
            result = torch.empty_strided(shape, dense, dtype=node.dtype, device=node.device)
        return result.copy_(stored.read(*band))


def whole_of(node: Node, stored: Mapping[Node, Union[StoredTensor, StoredStrips]]) -> Tensor:
    """A map that is there in one tensor: an argument, or one that is stored so."""
    if node.tensor is not None:
        return node.tensor
    whole = stored[node]
    assert isinstance(whole, StoredTensor)
    return whole.tensor


def no_rows(node: Node, dim: int) -> Tensor:
    """None of a map's rows along `dim`."""
    shape = [*node.shape[:dim], 0, *node.shape[dim + 1 :]]
    return torch.empty(shape, dtype=node.dtype, device=node.device)


def empty(node: Node) -> Tensor:
    """An empty tensor for a map: with eager's strides where these leave no gaps, else in their order without gaps."""
    dense = dense_strides(node.shape, node.strides)
    if dense is None:
        return torch.empty(node.shape, dtype=node.dtype, device=node.device)
    return torch.empty_strided(node.shape, dense, dtype=node.dtype, device=node.device)
