"""One pass in strips, counted: how many rows at once, what lies beside stored maps meanwhile, what can be freed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import ceil
from typing import Optional

from ...memory.sizes import STRIPS_AT_ONCE, allocator_bytes, strip_bytes
from ..graph.node import Node
from .copies import times_copied, times_made
from .schedule import STRIPS_LEAVING, Pass, Target, Tuning
from .way import Way

_COPIES = 3
"""What the widest step takes beside the strips that are alive: padded rows, and what a backend copies of them."""

_WEIGHTS = 8
"""What it costs a backend to have weights in its own order for each strip, against computing a map of their size."""

_ROWS_TO_A_HALO = 4
"""New rows of a strip to each that a convolution reads once more: with fewer, joining them to those kept takes as long
as convolving them. RealESRGAN x4plus has strips of three rows in its body where its tail alone is looked at."""

_STRIPS_LEFT = 20
"""Strips that are left of a map of few rows, such as the bands of a spectrogram: with fewer nothing is saved."""

_STEP_BYTES_ELSEWHERE = 4 << 20
"""Bytes of a strip of an average step, on devices other than the CPU, below which telling the device what to do takes
longer than doing it. Not measured yet."""

_SHARE_FOR_COSTS = 8
"""Strips that are larger than suits a device, for the sake of such costs, take this part of a budget at most."""

_KERNEL_BYTES = 20 << 20
"""Of kernels that steps keep from strip to strip: those of one convolution of 512 channels by 3x3."""

_LINES_ON_THE_WAY = 4
"""Line buffers that leave or come: those of two steps leave, and those of two come."""


def suitable_bytes(tuning: Tuning, device_type: str) -> int:
    """Bytes of strips that suit a device, whatever part of it they take."""
    return strip_bytes(device_type) if tuning.suitable_bytes is None else tuning.suitable_bytes


class Sweep:
    """A pass in strips within a budget: how many rows at once, and what that takes.

    way: its steps. strip_rows: of the rows of the tallest root, how many come at once. line_bytes: of all line buffers.
    workspace: bytes that it takes beside stored maps. keeping: the steps that keep their kernels. offloaded: the stored
    maps that do not lie on the device. ranks: how many processes do it together, each a band of its rows. spare: bytes
    of which costs may take a part where there is no budget; None for any number.
    """

    def __init__(
        self, way: Way, tuning: Tuning, budget: Optional[int], offloaded: Collection[Node] = (), ranks: int = 1,
        spare: Optional[int] = None,
    ) -> None:  # fmt: skip
        self.way, self._tuning, self._budget, self._offloaded = way, tuning, budget, offloaded
        self._spare = budget if budget is not None else spare
        height = max(way.height, 1)
        band = -(-height // ranks)
        row_bytes = way.widest // height
        usual = int(tuning.strip_share * suitable_bytes(tuning, way.device.type))
        self._suitable = suitable = usual if tuning.strip_bytes is None else tuning.strip_bytes
        rows = min(max(suitable // STRIPS_AT_ONCE // max(row_bytes, 1), 1), height)
        rows = min(max(rows, self._rows_worth_their_costs(row_bytes, height)), band)
        self.strip_rows = rows if rows == band < height else self._whole_groups(rows)
        single = self.strip_rows >= band  # there is no next strip
        self._lines = {} if single else {node: node.row_bytes * way.kept[node] for node in way.buffered}
        self.line_bytes = sum(self._lines.values())
        self.keeping = self._keeping_kernels()
        self.workspace = self._bytes_beside_maps()

    def lines_to_offload(self, size: int) -> dict[Node, int]:
        """The steps whose line buffers would have to be offloaded for it to take `size` bytes less, or all that help,
        with the bytes of each: the largest, as few as will do."""
        cpu = self.way.device.type == "cpu"
        found: dict[Node, int] = {}
        for node in sorted(self._lines, key=self._lines.__getitem__, reverse=True):
            if not found and not cpu:
                size += _LINES_ON_THE_WAY * self._lines[node]
            if size <= 0 or not self._lines[node]:
                break
            found[node] = self._lines[node]
            size -= self._lines[node]
        return found if self.bytes_saved(found) > 0 else {}

    def bytes_saved(self, lines: Mapping[Node, int]) -> int:
        """By how much less it takes where the line buffers of these steps are offloaded."""
        on_the_way = 0 if self.way.device.type == "cpu" else _LINES_ON_THE_WAY * max(lines.values(), default=0)
        return sum(lines.values()) - on_the_way

    def as_pass(
        self,
        targets: list[Target],
        shrinking: list[Node],
        freed: list[Node],
        offloaded_lines: dict[Node, int],
        everywhere: bool = False,
    ) -> Pass:
        """The pass that is made of it; see `Pass`."""
        way = self.way
        return Pass(
            targets=targets,
            order=way.order,
            device=way.device,
            height=way.height,
            strip_rows=self.strip_rows,
            recomputed=way.recomputed,
            keeping=self.keeping,
            shrinking=shrinking,
            freed=freed,
            work=way.work,
            line_bytes=self.line_bytes - sum(offloaded_lines.values()),
            offloaded_lines=offloaded_lines,
            workspace=self.workspace - self.bytes_saved(offloaded_lines),
            everywhere=everywhere,
        )

    def rows_at_once(self, node: Node) -> int:
        """Rows of `node` that come at once, at most."""
        return -(-node.rows * self.strip_rows // max(self.way.height, 1))

    def _rows_worth_their_costs(self, row_bytes: int, height: int) -> int:
        """Rows in a strip whose maps outweigh what each strip costs whatever its size: many for a video's frames.

        row_bytes: of the widest step, for a row. A budget is not spent on it.
        """
        maps = max(sum(node.bytes for node in self.way.order), 1)
        weights = sum(node.step.weight_bytes for node in self.way.order if node.step is not None)
        rows = int(_WEIGHTS * self._tuning.strip_share * weights * height / (maps + self.way.copied))
        if self.way.device.type != "cpu":
            rows = max(rows, _STEP_BYTES_ELSEWHERE * len(self.way.order) * height // maps)
        for node in self.way.order:
            if node.step is not None and node.step.least_rows > 1:
                rows = max(rows, -(-node.step.least_rows * height // max(node.rows, 1)))
        if self._tuning.strip_bytes is None:
            rows = max(rows, self._rows_worth_their_halos(height))
        if self._spare is not None:
            alive = self._bytes_alive([node.bytes / height for node in self.way.order])
            row_bytes = max(STRIPS_AT_ONCE * row_bytes, int(alive) + _COPIES * row_bytes)
            rows = min(rows, self._spare // _SHARE_FOR_COSTS // max(row_bytes, 1))
        return min(rows, height)

    def _rows_worth_their_halos(self, height: int) -> int:
        """Rows in a strip beside which those that convolutions read once more are few."""
        rows = 0
        for node in self.way.order:
            if node.step is not None and node.step.overlap:
                source, dim = node.by_rows[0]
                new = int(_ROWS_TO_A_HALO * self._tuning.strip_share * node.step.overlap)
                rows = max(rows, -(-new * height // max(source.shape[dim], 1)))
        return min(rows, height // _STRIPS_LEFT)

    def _whole_groups(self, rows: int) -> int:
        """Of so many rows of the roots, as many as every step makes in whole groups, where there are that many."""
        groups = (
            -(-node.step.rows_together * self.way.height // max(node.rows, 1))
            for node in self.way.order
            if node.step is not None and node.step.rows_together > 1
        )
        unit = max(groups, default=1)
        return rows // unit * unit or rows

    def _keeping_kernels(self) -> list[Node]:
        """The steps that keep kernels of their own from strip to strip: those that these serve most, as many as there
        is room for."""
        room = min(self._suitable, _KERNEL_BYTES)
        room = room if self._budget is None else min(room, self._budget // _SHARE_FOR_COSTS)
        makers = [node for node in self.way.order if node.step is not None and node.step.kernel_bytes]
        keeping = []
        for node in sorted(makers, key=lambda node: node.bytes * node.step.work / node.step.kernel_bytes, reverse=True):  # type: ignore[union-attr]
            if node.step.kernel_bytes <= room:  # type: ignore[union-attr]
                room -= node.step.kernel_bytes  # type: ignore[union-attr]
                keeping.append(node)
        return keeping

    def _bytes_beside_maps(self) -> int:
        """Bytes taken beside stored maps: a strip's rows, what the widest step adds to them, the rows kept between
        strips."""
        share = self.strip_rows / max(self.way.height, 1)
        strips = [node.row_bytes * min(share * node.rows + self.way.shared[node], node.rows) for node in self.way.order]
        largest = max(strips, default=0.0)
        usual = min(STRIPS_AT_ONCE, len(self.way.order) + 2) * largest
        # Small strips leave gaps between them; of large ones the last is still there when the next one comes.
        steps = [node.step for node in self.way.order if node.step is not None]
        copied = _COPIES + (usual > self._suitable) + max((step.copies for step in steps), default=0)
        copies = max(copied * largest * max((step.widened for step in steps), default=1), self._bytes_copied(share))
        widest = max(min(usual, self._suitable), self._bytes_alive(strips) + copies)
        of_steps = max((step.workspace for step in steps), default=0)
        if self.way.device.type == "cpu":  # weights in the order of its backend
            of_steps += max((step.weight_bytes * step.widened for step in steps), default=0)
        of_steps += sum(node.step.kernel_bytes for node in self.keeping if node.step is not None)
        allocator = allocator_bytes(self.way.device.type)
        allocator = self._tuning.allocator_bytes if self._tuning.allocator_bytes is not None else allocator
        return int(widest) + of_steps + self.line_bytes + allocator + self._bytes_on_the_way(share)

    def _bytes_copied(self, share: float) -> float:
        """The most bytes that one step copies of the stored maps that it reads, and of its result."""
        most = 0.0
        for node in self.way.order:
            step, made = node.step, times_made(node)
            read = self.way.outer.get(node, ())
            if step is None or (made == 1 and not read):
                continue
            rows = min(
                ceil(share * node.rows) + (self.way.shared[node] if node in self.way.recomputed else 0), node.rows
            )
            copied = rows * node.row_bytes * made * step.widened
            spans = step.needs((node.rows - rows) // 2, (node.rows + rows) // 2) if read else ()
            for source, dim, place in read:
                first, last = spans[place]
                side = max(source.shape[dim], 1)
                copied += min(last - first, side) * (source.bytes // side) * times_copied(node, source)
            most = max(most, copied)
        return most

    def _bytes_on_the_way(self, share: float) -> int:
        """Bytes of strips that come back from host memory, and of those that leave where the roots may be offloaded.

        Those that a strip of this pass reads come whole and are put together then; the next one comes meanwhile.
        """
        if self.way.device.type == "cpu":
            return 0
        coming = sum(5 * share * source.bytes for source in self.way.readers if source in self._offloaded)
        if self._budget is None:
            return int(coming)
        return int(coming) + STRIPS_LEAVING * sum(root.row_bytes * self.rows_at_once(root) for root in self.way.roots)

    def _bytes_alive(self, strips: list[float]) -> float:
        """The most bytes of strips, of so many bytes each step's, that later steps still read."""
        freed = [0.0] * len(strips)
        alive = most = 0.0
        for place, (size, last) in enumerate(zip(strips, self.way.last_reads)):
            if last is not None:
                alive += size
                freed[last] += size
            if alive > most:
                most = alive
            alive -= freed[place]
        return most
