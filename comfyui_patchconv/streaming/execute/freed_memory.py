"""What a process keeps of freed strips, on a CPU, and when it is handed back."""

from __future__ import annotations

from ...memory.allocator import trim
from ...memory.sizes import allocator_bytes
from ...memory.usage import anonymous
from ..plan.schedule import Schedule

_LOOKS = 8
"""Looks at the process's memory while it computes as much as it may keep."""


class FreedMemory:
    """What the process has beside what is stored, on a CPU: the C library keeps freed strips, ever more of them."""

    def __init__(self, schedule: Schedule) -> None:
        self._stored, self.held = schedule.stored, 0
        self._before = anonymous()
        self._within = self._between = 0

    def count(self, size: int) -> None:
        """So many bytes more, or fewer, are stored."""
        self.held += size

    def computed(self, size: int, workspace: int) -> None:
        """A step has computed so many bytes, in a strip that takes `workspace` bytes."""
        self._within, self._between = self._within + size, self._between + size
        if self._within >= workspace // _LOOKS:  # a strip of a video has a thousand steps
            self._within = 0
            self._hand_back(workspace - workspace // _LOOKS)  # until the next look it may grow by that much

    def applied(self, size: int) -> None:
        """An operator was applied whole, its result has so many bytes, and what it was made of is freed."""
        self._between += size
        usual = allocator_bytes("cpu")
        if self._between >= usual // _LOOKS:
            self._between = 0
            self._hand_back(usual)

    def strip_done(self, kept: int) -> None:
        """A strip is over, and `kept` bytes of it are kept for the next."""
        usual = allocator_bytes("cpu") + kept
        if self._between >= usual // _LOOKS:
            self._between = 0
            self._hand_back(usual)

    def _hand_back(self, usual: int) -> None:
        """Hand freed memory back to the system where the process has grown by more than the stored maps, those that are
        to come at the peak, and `usual` bytes of strips."""
        if anonymous() - self.held - self._before > usual + max(self._stored - self.held, 0):
            trim()
