"""What goes to host memory, and comes back, beside a device's other work: strips of stored maps, and line buffers."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..graph.node import Node
from .copies import Arrival, Copies, Leaving, copies_of, if_there_is_room
from .tensors import dense, is_borrowed


class StripsOnHost:
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


class LinesOnHost:
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
