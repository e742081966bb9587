"""Line buffers: the rows of a step that a strip leaves for the next one, on the device or offloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional

import torch
from torch import Tensor

from ..graph.node import Node
from .offloaded import OffloadedLines, lines_for
from .tensors import dense, lasting


class Lines:
    """The line buffers of one pass.

    order: its steps. offloaded: those whose line buffers are, with the bytes of each.

    A strip leaves its rows where it found those of the strip before: one that fails has lost them.
    """

    def __init__(self, order: Sequence[Node], offloaded: Mapping[Node, int], device: torch.device) -> None:
        self._lines: dict[Node, Tensor] = {}
        self._rooms: dict[Node, Tensor] = {}
        self._offloaded: Optional[OffloadedLines] = None
        if offloaded:
            self._offloaded = lines_for(device, offloaded)
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
