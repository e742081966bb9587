"""Line buffers: the rows of a step that a strip leaves for the next one, on the device or offloaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Optional, Union

import torch
from torch import Tensor

from ...memory.mapped import MappedFile
from ..graph.node import Node
from .copies import Arrival, Leaving, copies_of, if_there_is_room
from .offloaded import dense, lasting, no_room

_ALIGNED = 64
"""Bytes of which the parts of a file are multiples, so that each begins where any type of values may."""


class Lines:
    """The line buffers of one pass.

    order: its steps. offloaded: those whose line buffers are, with the bytes of each.

    A strip leaves its rows where it found those of the strip before: one that fails has lost them.
    """

    def __init__(self, order: Sequence[Node], offloaded: Mapping[Node, int], device: torch.device) -> None:
        self._lines: dict[Node, Tensor] = {}
        self._rooms: dict[Node, Tensor] = {}
        self._offloaded: Union[_InFile, _InHostMemory, None] = None
        if offloaded:
            self._offloaded = _InFile(offloaded.values()) if device.type == "cpu" else _InHostMemory(device)
        in_order = [node for node in order if node in offloaded]
        self._following = dict(zip(in_order, [*in_order[1:], None]))

    def read(self, node: Node) -> Optional[Tensor]:
        """The rows that are kept of a step, on the device; None for none."""
        line = self._lines.get(node)
        if line is None or self._offloaded is None or node not in self._following:
            return line
        rows = self._offloaded.fetch(node, line)
        following = self._following[node]
        if following is not None and following in self._lines:
            self._offloaded.prefetch(following, self._lines[following])
        return rows

    def keep(self, node: Node, rows: Tensor, dim: int) -> None:
        """Keep these rows of a step, which lie along `dim`, in the place of those that were kept before."""
        room = self._rooms.get(node)
        if self._offloaded is not None and node in self._following:
            if room is None or room.nbytes < rows.nbytes:
                room = self._rooms[node] = self._offloaded.room(rows.nbytes)
            self._lines[node] = kept = dense(room[: rows.nbytes].view(rows.dtype), rows)
            self._offloaded.offload(node, kept, rows)
        else:
            if room is None or room.shape[dim] < rows.shape[dim]:
                room = self._rooms[node] = lasting(rows)
            self._lines[node] = room.narrow(dim, 0, rows.shape[dim]).copy_(rows)

    def drop(self, node: Node) -> None:
        """No row of a step is read again."""
        self._lines.pop(node, None)


class _InFile:
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


class _InHostMemory:
    """Rows in host memory. They leave while the device goes on, and come while it reads those of the step before."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copies = device, copies_of(device)
        self._leaving = Leaving(self._copies)
        self._coming: dict[Node, tuple[Tensor, Arrival]] = {}

    def room(self, size: int) -> Tensor:
        """So many bytes, which nothing else uses."""
        return self._copies.room(torch.empty(size, dtype=torch.uint8, device="meta"))

    def offload(self, node: Node, kept: Tensor, rows: Tensor) -> None:
        """Have the values of `rows` in `kept`, a part of a room, once all have left, or are fetched."""
        self._leaving.make_way()
        self._leaving.add(kept, dense(rows.new_empty(rows.numel()), rows).copy_(rows))

    def fetch(self, node: Node, line: Tensor) -> Tensor:
        """What was kept, on the device."""
        if node not in self._coming:
            self._start(node, line)
        rows, arrival = self._coming.pop(node)
        self._copies.await_on_device(arrival)
        return rows

    def prefetch(self, node: Node, line: Tensor) -> None:
        """This will be fetched next: it may come now, where there is room."""
        if node not in self._coming:
            if_there_is_room(lambda: self._start(node, line))

    def _wait_for_all(self) -> None:
        """Wait for all that are on their way; what came for nothing is freed."""
        self._leaving.wait()
        for _, arrival in self._coming.values():
            arrival.synchronize()
        self._coming.clear()

    def _start(self, node: Node, line: Tensor) -> None:
        if self._leaving.has(line):
            self._leaving.wait()
        rows = torch.empty_like(line, device=self._device)
        self._coming[node] = rows, self._copies.start(rows, line)

    def __del__(self) -> None:
        self._wait_for_all()  # what is on its way writes to memory that is freed now
