"""Which new maps lie on the device and which are offloaded, and the peak that follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from ..graph.node import Node
from .schedule import Schedule, Target
from .sweep import Sweep


class Placement:
    """What lies on the device and what is offloaded, step by step; it notes in `schedule` what that comes to.

    budget: bytes to stay within; None for no limit. held: bytes that lie on the device already. ranks: how many
    processes do it together: each stores a band of a map's rows, unless it has all of them. offloaded: the maps that
    were ever offloaded.
    """

    def __init__(self, schedule: Schedule, budget: Optional[int], held: int, ranks: int) -> None:
        self.offloaded: set[Node] = set()
        self._schedule, self._budget, self._held, self._ranks = schedule, budget, held, ranks
        self._offloaded_bytes = 0

    def bytes_of(self, target: Target) -> int:
        """Bytes that a process stores of a map, at most."""
        node = target.node
        if node.home is not None:
            return 0
        return node.bytes if target.whole or target.everywhere else -(-node.rows // self._ranks) * node.row_bytes

    def put(self, node: Node) -> None:
        """The result of an operator that is applied whole lies on the device from now on. Its other results do while it
        is applied."""
        self._note(node.bytes, 0, 0 if node.step is None else node.step.bytes_beside)
        self._held += node.bytes

    def release(self, target: Target) -> None:
        """A map is freed."""
        if target.offloaded:
            self._offloaded_bytes -= self.bytes_of(target)
        else:
            self._held -= self.bytes_of(target)

    def put_band(self, target: Target, workspace: int) -> None:
        """The band of a map that no pass makes lies on the device from now on, or is offloaded. workspace: bytes that
        making it takes."""
        size = self.bytes_of(target)
        target.offloaded = not target.result and size > 0 and not self._fits(self._held + workspace, 0, size)
        if target.offloaded:
            self.offloaded.add(target.node)
            self._schedule.offloaded += size
        self._note(0 if target.offloaded else size, size if target.offloaded else 0, workspace)
        self._held += 0 if target.offloaded else size
        self._offloaded_bytes += size if target.offloaded else 0

    def join(self, results: Sequence[Target]) -> None:
        """The strips of bands that are results become one tensor each, one after the other."""
        sizes = [self.bytes_of(target) for target in results if not target.whole]
        self._note(max(sizes, default=0), 0, 0)

    def place(
        self, targets: Sequence[Target], reductions: Sequence[Node], shrinking: Sequence[Target], sweep: Sweep
    ) -> dict[Node, int]:
        """Decide for each new map of a pass whether it has to be offloaded. Gives the line buffers that have to be as
        well, by their steps: for want of room beside maps that have to stay. They come and go with every strip.

        reductions: whose results lie on the device. shrinking: stored maps that are freed as the pass goes on.
        """
        self._held += sum(node.bytes for node in reductions)
        cpu = sweep.way.device.type == "cpu"
        freed = sum(self.bytes_of(target) for target in shrinking if not target.offloaded)
        given_back = sum(self.bytes_of(target) for target in shrinking if target.offloaded)
        growth = offloaded = 0
        held = self._held + sweep.workspace
        for target in targets:
            size = self.bytes_of(target)
            movable = not target.result and (cpu or not target.whole) and target.node.device == sweep.way.device
            given = freed if cpu or not target.whole else 0  # what is one tensor takes its memory at once, but on a CPU
            target.offloaded = movable and size > 0 and not self._fits(held, given, size)
            if target.offloaded:
                self.offloaded.add(target.node)
                offloaded += size
            else:
                held += size
                growth += size
        over = 0 if self._budget is None else self._held + max(growth - freed, 0) + sweep.workspace - self._budget
        lines = sweep.lines_to_offload(over) if over > 0 else {}
        of_lines = sum(lines.values())
        self._schedule.offloaded += offloaded + of_lines
        self._note(growth - freed, offloaded - given_back + of_lines, sweep.workspace - sweep.bytes_saved(lines))
        self._held += growth
        self._offloaded_bytes += offloaded
        return lines

    def _fits(self, held: int, freed: int, new: int) -> bool:
        """Whether `new` bytes can be added to `held` ones, while `freed` of those are freed at the same pace."""
        return self._budget is None or held + max(new - freed, 0) <= self._budget

    def _note(self, growth: int, offloaded: int, workspace: int) -> None:
        """What is held grows by `growth` bytes now, what is offloaded by `offloaded`, and `workspace` bytes are in
        use beside both."""
        schedule = self._schedule
        stored = self._held + max(growth, 0)
        schedule.stored = max(schedule.stored, stored)
        schedule.peak = max(schedule.peak, stored + workspace)
        schedule.offloaded_at_once = max(schedule.offloaded_at_once, self._offloaded_bytes + max(offloaded, 0))
