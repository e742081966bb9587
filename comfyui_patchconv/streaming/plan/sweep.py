"""One pass in strips, counted: how many rows at once, what lies beside stored maps meanwhile, what can be freed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import Optional

from ...memory.sizes import allocator_bytes, strip_bytes
from ..graph.node import Node
from .schedule import Tuning

_STRIPS_AT_ONCE = 6
"""Strips of the widest step alive at once: with their halo rows, its result, and what a backend copies of them."""

_COPIES = 3
"""What the widest step takes beside the strips that are alive: padded rows, and what a backend copies of them."""

_WEIGHTS = 8
"""What it costs a backend to have weights in its own order for each strip, against computing a map of their size."""

_STEP_BYTES_ELSEWHERE = 4 << 20
"""Bytes of a strip of an average step, on devices other than the CPU, below which telling the device what to do takes
longer than doing it. Not measured yet."""

_SHARE_FOR_COSTS = 8
"""Strips that are larger than suits a device, for the sake of such costs, take this part of a budget at most."""

_KERNEL_BYTES = 20 << 20
"""Of kernels that steps keep from strip to strip: those of one convolution of 512 channels by 3x3."""

_AT_ONCE = 2
"""Strips of a map that leave at once: one is copied while the device computes the next."""


def steps_to(roots: Iterable[Node], stored: Collection[Node]) -> list[Node]:
    """The steps that lead to `roots`, these included, from stored maps on, in the program's order."""
    stack = [node for node in roots if node.tensor is None and node not in stored]
    found = set(stack)
    while stack:
        for source in stack.pop().inputs:
            if source not in found and source.tensor is None and source not in stored:
                found.add(source)
                stack.append(source)
    return sorted(found, key=_serial)


_serial = attrgetter("serial")


def computed_again(order: Sequence[Node], roots: Collection[Node]) -> set[Node]:
    """The steps that are as cheap to compute anew from stored maps as their rows are to keep."""
    again: set[Node] = set()
    inside = set(order)
    for node in order:
        assert node.step is not None
        near = all(source not in inside or source in again for source in node.inputs)
        if node not in roots and (node.step.moves or (node.step.cheap and near)):
            again.add(node)
    return again


class Sweep:
    """A pass that computes `roots` from stored maps, or reads them if they are stored: along `dims` then.

    order: its steps. height: rows of the tallest root. strip_rows: of these, how many come at once. workspace: bytes
    that it takes beside stored maps. elsewhere: the stored maps that do not lie on the device. keeping: the steps that
    keep their kernels.
    """

    def __init__(
        self, roots: Sequence[Node], stored: Collection[Node], tuning: Tuning, budget: Optional[int],
        elsewhere: Collection[Node] = (), dims: Optional[dict[Node, int]] = None, order: Optional[list[Node]] = None,
    ) -> None:  # fmt: skip
        self.roots, self.order = list(roots), steps_to(roots, stored) if order is None else order
        self._tuning, self._budget, self._elsewhere = tuning, budget, elsewhere
        nodes = self.order or self.roots
        dims = dims or {}
        self.height = max(root.shape[dims[root]] if root in dims else root.rows for root in self.roots)
        self.device = max(nodes, key=lambda node: node.bytes).device
        self.again = computed_again(self.order, set(self.roots))
        self._readers: dict[Node, list[tuple[Node, int]]] = {}
        for node in self.order:
            place = 0
            for source, dim in zip(node.inputs, node.dims):
                if dim is not None:
                    self._readers.setdefault(source, []).append((node, place))
                    place += 1
        height = max(self.height, 1)
        share = max(node.bytes for node in nodes) // height
        suitable = strip_bytes(self.device.type)
        suitable = tuning.strip_bytes if tuning.strip_bytes is not None else suitable
        self._suitable = suitable
        rows = min(max(suitable // _STRIPS_AT_ONCE // max(share, 1), 1), height)
        self.strip_rows = self._whole_groups(max(rows, self._rows_worth_their_costs(share, height)))
        self._shared = self._rows_of_two_strips()
        kept = [node for node in self.order if node in self._readers and node not in self.again]
        single = self.strip_rows >= height  # there is no next strip
        self.line_bytes = 0 if single else 2 * sum(node.row_bytes * self._shared[node] for node in kept)
        self.work = sum(node.bytes for node in self.order)
        self.keeping = self._keeping_kernels()
        self.workspace = self._bytes_beside_maps()

    def frontiers(self) -> list[list[Node]]:
        """Where this pass could be two: for each height on the way, the maps of no more or of no fewer rows, as are all
        before them, that later steps read."""
        found: list[list[Node]] = []
        inside = set(self.order)
        roots = set(self.roots)
        for height in dict.fromkeys(node.rows for node in self.order):
            for sign in (1, -1):
                before: set[Node] = set()
                for node in self.order:
                    if sign * node.rows > sign * height:
                        continue
                    if all([source not in inside or source in before for source in node.inputs]):
                        before.add(node)
                if before & roots or len(before) == len(self.order):
                    continue
                frontier = dict.fromkeys(
                    source for node in self.order if node not in before for source in node.inputs if source in before
                )
                if frontier and list(frontier) not in found:
                    found.append(list(frontier))
        return found

    def rows_at_once(self, node: Node) -> int:
        """Rows of `node` that come at once, at most."""
        return -(-node.rows * self.strip_rows // max(self.height, 1))

    def _rows_worth_their_costs(self, row_bytes: int, height: int) -> int:
        """Rows in a strip whose maps outweigh what each strip costs whatever its size: many for a video's frames.

        row_bytes: of the widest step, for a row. A budget is not spent on it.
        """
        maps = max(sum(node.bytes for node in self.order), 1)
        weights = sum(node.step.weight_bytes for node in self.order if node.step is not None)
        rows = _WEIGHTS * weights * height // maps
        if self.device.type != "cpu":
            rows = max(rows, _STEP_BYTES_ELSEWHERE * len(self.order) * height // maps)
        for node in self.order:
            if node.step is not None and node.step.least_rows > 1:
                rows = max(rows, -(-node.step.least_rows * height // max(node.rows, 1)))
        if self._budget is not None:
            alive = self._bytes_alive([node.bytes / height for node in self.order])
            row_bytes = max(_STRIPS_AT_ONCE * row_bytes, int(alive) + _COPIES * row_bytes)
            rows = min(rows, self._budget // _SHARE_FOR_COSTS // max(row_bytes, 1))
        return min(rows, height)

    def _rows_of_two_strips(self) -> dict[Node, int]:
        """Of each step, how many rows a strip and the one before it both read: kept between strips, in two parts that
        take turns, or computed again."""
        done: dict[Node, int] = {}
        kept: dict[Node, int] = {}
        ahead: dict[Node, int] = {}  # the first row that is still to be read, or computed
        middle = {root: max(root.rows // 2, 1) for root in self.roots}
        for node in reversed(self.order):  # readers before what they read
            high, low = middle.get(node, 0), node.rows
            for reader, place in self._readers.get(node, ()):
                assert reader.step is not None
                high = max(high, reader.step.needs(done[reader] - 1, done[reader])[place][1])
                if ahead[reader] < reader.rows:
                    low = min(low, reader.step.needs(ahead[reader], ahead[reader] + 1)[place][0])
            done[node] = max(min(high, node.rows), 1)
            ahead[node] = min(low, done[node]) if node in self.again else done[node]
            kept[node] = max(done[node] - low, 0)
        return kept

    def _whole_groups(self, rows: int) -> int:
        """Of so many rows of the roots, as many as every step makes in whole groups, where there are that many."""
        groups = (
            -(-node.step.rows_together * self.height // max(node.rows, 1))
            for node in self.order
            if node.step is not None and node.step.rows_together > 1
        )
        unit = max(groups, default=1)
        return rows // unit * unit or rows

    def _keeping_kernels(self) -> list[Node]:
        """The steps that keep kernels of their own from strip to strip: those that these serve most, as many as there
        is room for."""
        room = min(self._suitable, _KERNEL_BYTES)
        room = room if self._budget is None else min(room, self._budget // _SHARE_FOR_COSTS)
        makers = [node for node in self.order if node.step is not None and node.step.kernel_bytes]
        keeping = []
        for node in sorted(makers, key=lambda node: node.bytes * node.step.work / node.step.kernel_bytes, reverse=True):  # type: ignore[union-attr]
            if node.step.kernel_bytes <= room:  # type: ignore[union-attr]
                room -= node.step.kernel_bytes  # type: ignore[union-attr]
                keeping.append(node)
        return keeping

    def _bytes_beside_maps(self) -> int:
        """Bytes taken beside stored maps: a strip's rows, what the widest step adds to them, the rows kept between
        strips."""
        share = self.strip_rows / max(self.height, 1)
        strips = [node.row_bytes * min(share * node.rows + self._shared[node], node.rows) for node in self.order]
        largest = max(strips, default=0.0)
        usual = min(_STRIPS_AT_ONCE, len(self.order) + 2) * largest
        # Small strips leave gaps between them; of large ones the last is still there when the next one comes.
        steps = [node.step for node in self.order if node.step is not None]
        copies = (_COPIES + (usual > self._suitable)) * largest * max((step.widened for step in steps), default=1)
        widest = max(min(usual, self._suitable), self._bytes_alive(strips) + copies)
        of_steps = max((step.workspace for step in steps), default=0)
        if self.device.type == "cpu":  # weights in the order of its backend
            of_steps += max((step.weight_bytes * step.widened for step in steps), default=0)
        of_steps += sum(node.step.kernel_bytes for node in self.keeping if node.step is not None)
        allocator = allocator_bytes(self.device.type)
        allocator = self._tuning.allocator_bytes if self._tuning.allocator_bytes is not None else allocator
        return int(widest) + of_steps + self.line_bytes + allocator + self._bytes_on_the_way(share)

    def _bytes_on_the_way(self, share: float) -> int:
        """Bytes of strips that come from elsewhere, and of those that leave where the roots may have to lie there.

        Those that a strip of this pass reads come whole and are put together then; the next one comes meanwhile.
        """
        if self.device.type == "cpu":
            return 0
        coming = sum(5 * share * source.bytes for source in self._readers if source in self._elsewhere)
        if self._budget is None:
            return int(coming)
        return int(coming) + _AT_ONCE * sum(root.row_bytes * self.rows_at_once(root) for root in self.roots)

    def _bytes_alive(self, strips: list[float]) -> float:
        """The most bytes of strips, of so many bytes each step's, that later steps still read."""
        size = dict(zip(self.order, strips))
        last: dict[Node, int] = {}
        for place in range(len(self.order) - 1, -1, -1):
            node = self.order[place]
            last.setdefault(node, place)
            shows = _shows(node)
            for source in node.inputs:
                last[source] = max(last.get(source, 0), last[node] if source is shows else place)
        freed: dict[int, float] = {}
        alive = most = 0.0
        for place, node in enumerate(self.order):
            if _shows(node) is None:
                alive += size[node]
                freed[last[node]] = freed.get(last[node], 0.0) + size[node]
            most = max(most, alive)
            alive -= freed.pop(place, 0.0)
        return most


def _shows(node: Node) -> Optional[Node]:
    """The map that a step gives back a part of as it is, in the same memory, such as some frames of it."""
    return node.inputs[0] if node.step is not None and node.step.moves and len(node.inputs) == 1 else None
