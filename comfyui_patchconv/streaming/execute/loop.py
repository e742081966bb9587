"""Runs a schedule: a flat loop over its passes, and in each over its strips."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ...memory.allocator import keep_freed_blocks, release, trim
from ...memory.errors import is_out_of_memory
from ...memory.sizes import allocator_bytes
from ...memory.usage import anonymous
from ..graph.attention import Attend, Merging
from ..graph.node import Node, Span, dense_strides
from ..graph.steps import Accumulator, Convolve, Reduce
from ..plan.schedule import Apply, InTurn, Pass, Schedule, Target
from .kernels import Chain, Kernels
from .lines import Lines
from .share import ALONE, Share, Stored
from .stored import StoredStrips, StoredTensor, empty, joined, no_rows
from .strips import Parts, Rows, StepRows

OnProgress = Callable[[int], None]
"""Called after each strip with the bytes of maps that it computed."""


_AUTOCAST: Any = functools.reduce(
    operator.or_,
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
        for name in dir(torch._C.DispatchKey)
        if name.startswith("Autocast")
    ),
)


class Loop:
    """Runs `schedule` and stores its results in their nodes. Raises ValueError where `PATCHCONV_KERNELS` is no choice.

    inference: whether the caller is in inference mode. share: the part of it that this process does. bands: this
    process's rows of the results that are to lie in bands.
    """

    def __init__(self, schedule: Schedule, inference: bool, on_progress: OnProgress, share: Share = ALONE) -> None:
        self._schedule, self._inference, self._on_progress, self._share = schedule, inference, on_progress, share
        self._stored: dict[Node, Stored] = {}
        self._memory = _Memory(schedule)
        self._shared: set[int] = set()  # memory of maps that others show too
        self._bands_of_results: dict[Node, Span] = {}
        self.bands: dict[Node, Tensor] = {}
        devices = {step.device for step in schedule.steps if isinstance(step, Pass)}
        self._kernels = {device: Kernels(device) for device in devices}

    def run(self) -> None:
        """Do all of it. Raises what operators raise; of memory that runs out see `_PassLoop.compute`."""
        if any(isinstance(step, Pass) for step in self._schedule.steps):
            keep_freed_blocks()
        # What autocast had to do with these operators was done when the program called them.
        with torch.inference_mode(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            for step in self._schedule.steps:
                if isinstance(step, Apply):
                    self._apply(step)
                elif isinstance(step, InTurn):
                    self._attend_in_turn(step)
                else:
                    self._run_pass(step)
                for node in step.freed:
                    self._free(node)
                if isinstance(step, Apply) and step.node.device.type == "cpu":
                    self._memory.applied(step.work)
        for node, stored in self._stored.items():
            if isinstance(stored, StoredTensor):
                node.store(stored.tensor)
            elif node.in_bands:
                self.bands[node] = joined(stored, self._bands_of_results[node], self._inference)
                stored.free(node.rows)

    def _free(self, node: Node) -> None:
        stored = self._stored.pop(node, None)
        if stored is not None:
            stored.free(node.rows)

    def _run_pass(self, step: Pass) -> None:
        self._share.before(step, self._stored)
        bands = self._share.bands(step)
        self._bands_of_results |= {node: rows for node, rows in bands.items() if node.in_bands}
        one_pass = _PassLoop(
            step, bands, self._stored, self._memory, self._inference, self._on_progress, self._kernels[step.device]
        )
        one_pass.compute()
        self._share.after(step, one_pass.new, one_pass.gathered)
        one_pass.finish()

    def _attend_in_turn(self, step: InTurn) -> None:
        target, node, attend = step.target, step.target.node, step.target.node.step
        assert isinstance(attend, Attend)
        queries, *maps = (self._in_strips(source) for source in node.inputs)
        first, last = self._share.band(node.rows)
        merging = Merging(attend, queries.read, (first, last), step.queries, no_rows(node, node.dim or 0))
        for row, (keys, values) in self._share.in_turn(maps, step.keys):
            merging.add(keys, values, row)
        result = StoredStrips(node, target.offloaded, self._memory.count, (first, last))
        if first < last:
            result.append(merging.result())
        self._stored[node] = result
        self._on_progress(step.work)

    def _in_strips(self, node: Node) -> StoredStrips:
        stored = self._stored[node]
        assert isinstance(stored, StoredStrips)
        return stored

    def _apply(self, step: Apply) -> None:
        node = step.node
        sources = node.eager.inputs() if node.eager is not None and step.eagerly else node.inputs
        pieces = [_whole(source, self._stored) for source in sources]
        with torch.inference_mode(self._inference), torch.no_grad():
            result = self._eagerly(step, pieces) if step.eagerly else self._at_once(node, pieces)
        if node.step is not None:
            node.step.end()
        self._stored[node] = StoredTensor.of(node, result, self._inference, self._memory.count)
        self._on_progress(step.work)

    def _eagerly(self, step: Apply, pieces: Sequence[Tensor]) -> Tensor:
        """What the program's own operator gives."""
        eager = step.node.eager
        assert eager is not None
        if step.in_place and eager.written is not None:
            written = _whole(eager.written, self._stored)
            one_each = dense_strides(written.shape, written.stride()) is not None  # not one value for many places
            if one_each and _memory_of(written) not in self._shared:
                return eager.compute(pieces, in_place=True)
        return self._own(eager.compute(pieces), pieces)

    def _own(self, result: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """What an operator gave; notes whether it shares memory with what the operator was given."""
        memory = _memory_of(result)
        if memory in map(_memory_of, pieces):
            self._shared.add(memory)
        else:
            self._shared.discard(memory)  # of a map that is freed
        return result

    def _at_once(self, node: Node, pieces: Sequence[Tensor]) -> Tensor:
        """All rows of a step."""
        assert node.step is not None
        if node.step.takes_all:
            return self._own(node.step.compute(0, 1, pieces), pieces)
        if node.step.reduces:
            return _reduced(node, pieces)
        spans = iter(node.step.needs(0, node.rows))
        pieces = [
            piece if dim is None else _rows_of_whole(piece, dim, *next(spans)) for piece, dim in zip(pieces, node.dims)
        ]
        return self._own(node.step.compute(0, node.rows, pieces), pieces)


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _rows_of_whole(piece: Tensor, dim: int, first: int, last: int) -> Tensor:
    return piece if (first, last) == (0, piece.shape[dim]) else piece.narrow(dim, first, last - first)


def _reduced(node: Node, pieces: Sequence[Tensor]) -> Tensor:
    gathered: Any = node.step.start()  # type: ignore[union-attr]
    gathered.add(pieces[0])
    result = empty(node)
    gathered.result(result)
    return result


def _whole(node: Node, stored: dict[Node, Any]) -> Tensor:
    if node.tensor is not None:
        return node.tensor
    return stored[node].tensor


class _Memory:
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


_UNTIL_STEADY = 1
"""Strips that are computed before any row is freed that they have read. The next one takes as much as all behind it,
and where that does not fit all are computed again, smaller."""

_LOOKS = 8
"""Looks at the process's memory while it computes as much as it may keep."""


class _PassLoop:
    """One pass, strip by strip: `compute`, then `finish`.

    bands: the rows of each target that are computed. new, gathered: the maps and the reductions that come of it.
    """

    def __init__(
        self, one_pass: Pass, bands: dict[Node, Span], stored: dict[Node, Stored], memory: _Memory, inference: bool,
        on_progress: OnProgress, kernels: Kernels,
    ) -> None:  # fmt: skip
        self._pass, self._bands, self._stored, self._memory = one_pass, bands, stored, memory
        self._inference, self._on_progress = inference, on_progress
        self._inside = set(one_pass.order)
        self.new: dict[Node, Stored] = {}
        self._begin()
        self._freed, self._told = False, 0
        device = one_pass.device
        self._kernels = kernels
        self._wanted = {target.node for target in one_pass.targets}
        self._gathering = {target.node for target in one_pass.targets if any(map(_gathers_moments, target.reductions))}
        self._chains = kernels.chains_of(one_pass.order, self._wanted, one_pass.recomputed)
        self._computed_as = {link.node: node for node, chain in self._chains.items() for link in chain.links}
        self._sources = self._read_at_once()
        self._last_readers = {source: node for node, sources in self._sources.items() for source in sources}
        self._cpu = device.type == "cpu"
        self._device = device

    def _begin(self) -> None:
        """Nothing is computed."""
        one_pass = self._pass
        self._rows = Rows(one_pass, self._bands)
        self._lines = Lines(one_pass.order, one_pass.offloaded_lines, one_pass.device)
        reductions: list[Any] = [node for target in one_pass.targets for node in target.reductions]
        self.gathered: dict[Node, Accumulator] = {node: node.step.start() for node in reductions}
        self._free_new()
        for target in one_pass.targets:
            if target.stored and target.node not in self._stored:
                self.new[target.node] = self._room_for(target)

    def _free_new(self) -> None:
        for node, made in self.new.items():
            made.free(node.rows)
        self.new.clear()

    def _room_for(self, target: Target) -> Stored:
        band = self._bands[target.node]
        if target.whole:
            return StoredTensor(target.node, target.offloaded, self._inference, self._memory.count, band[0])
        return StoredStrips(target.node, target.offloaded, self._memory.count, band)

    def _read_at_once(self) -> dict[Node, list[Node]]:
        """What each step reads, each map once; for the last one of a chain what all of that reads."""
        found: dict[Node, list[Node]] = {}
        for node in self._pass.order:
            if self._computed_as.get(node, node) is node:
                chain = self._chains.get(node)
                steps = [node] if chain is None else [link.node for link in chain.links]
                found[node] = list(dict.fromkeys(source for one in steps for source in one.inputs))
        return found

    def compute(self) -> None:
        """Compute all rows that are wanted. Raises what says that memory ran out where single rows do not fit, or where
        it is too late to begin again: rows that strips have read are freed."""
        rows, finer = min(max(self._pass.strip_rows, 1), max(self._rows.height, 1)), 1
        for node in self._pass.keeping:
            node.step.begin()  # type: ignore[union-attr]
        while not self._all_strips(rows, finer):
            self._begin()
            rows, finer = (-(-rows // 2), 1) if rows > 1 else (1, 2 * finer)

    def _all_strips(self, rows: int, finer: int) -> bool:
        """Compute all in strips of so many rows; False where memory ran out. finer: see `Parts`."""
        height = self._rows.height
        for number, first in enumerate(range(0, height, rows)):
            last = min(first + rows, height)
            parts = Parts(self._rows, self._pass, last, rows, finer) if first == 0 or finer > 1 else None
            if not self._in_parts(last, parts):
                return False
            if number >= _UNTIL_STEADY or last == height:
                for node in self._pass.shrinking:
                    self._stored[node].free(self._rows.first_needed(node))
                    self._freed = True
            self._tell(self._pass.work * last // height)
        if not height:
            self._tell(self._pass.work)
        return True

    def _tell(self, work: int) -> None:
        """So many bytes are computed; what was told before memory ran out is not told again."""
        self._on_progress(max(work - self._told, 0))
        self._told = max(work, self._told)

    def _in_parts(self, last: int, parts: Optional[Parts]) -> bool:
        """The strip up to row `last`, in parts if there are any; False where memory ran out."""
        while parts is not None and not parts.is_last:
            if not self._strip(parts.wanted(self._rows), parts.rows <= 1):
                return False
            parts.part += 1
        return self._strip(self._rows.wanted(last), parts is not None and parts.rows <= 1)

    def finish(self) -> None:
        """The maps and the results of reductions are there for the next step."""
        for node in self._pass.order:
            node.step.end()  # type: ignore[union-attr]
        for node, gathered in self.gathered.items():
            result = empty(node)
            gathered.result(result)
            self._stored[node] = StoredTensor.of(node, result, self._inference, self._memory.count)
        self._stored.update(self.new)

    def _strip(self, wanted: dict[Node, Span], single: bool = False) -> bool:
        """Compute the rows that are wanted; False where memory ran out, and it can be begun again. single: it has no
        more than one row of each step."""
        try:
            strip = self._compute(self._rows.advance(wanted))
            new = [rows for target in self._pass.targets for rows in self._new_rows(target, strip, wanted)]
        except (RuntimeError, MemoryError) as error:
            if single or self._freed or not is_out_of_memory(error):
                raise
        else:
            del strip
            while new:
                self._give(*new.pop(0))
            if self._cpu:
                self._memory.strip_done(self._pass.line_bytes)
            return True
        release(self._device)
        return False

    def _new_rows(self, target: Target, strip: _Strip, wanted: dict[Node, Span]) -> Iterable[_NewRows]:
        """Rows of a target that a strip has, if any; what lies outside of its band was computed for other steps."""
        node, moments = target.node, None
        if node in strip.roots:
            first, piece = strip.roots.pop(node)
            moments = strip.moments.get(node)
        elif node in wanted and node not in self._inside:
            first, last = wanted[node]
            piece = self._read(node, target.dim, first, last)
        else:
            return
        low, high = self._bands[node]
        begin, end = max(first, low), min(first + piece.shape[target.dim], high)
        if begin >= end:
            return
        part = _rows_of_whole(piece, target.dim, begin - first, end - first)
        if node in self._gathering and (moments is None or part is not piece):
            moments = self._kernels.moments(part, target.dim)
        yield _NewRows(target, part, moments)

    def _give(self, target: Target, piece: Tensor, moments: Optional[Tensor]) -> None:
        """Rows of a target go where they are wanted."""
        for reduction in target.reductions:
            gathered: Any = self.gathered[reduction]
            if moments is not None and _gathers_moments(reduction):
                gathered.add_moments(moments, piece.numel())
            else:
                gathered.add(piece)
        if target.node in self.new:
            self.new[target.node].append(piece)

    def _read(self, node: Node, dim: int, first: int, last: int) -> Tensor:
        """Rows of a stored map, along any of its dimensions."""
        if node.tensor is not None:
            return node.tensor.narrow(dim, first, last - first)
        stored = self._stored[node]
        if isinstance(stored, StoredTensor):
            return stored.tensor.narrow(dim, first, last - first)
        return stored.read(first, last)

    def _compute(self, works: list[StepRows]) -> _Strip:
        """One strip."""
        strip = _Strip({work.node: work for work in works})
        there = strip.there
        for work in works:
            node, (start, high) = work.node, work.rows
            if node not in self._sources:  # it is computed with a later step
                continue
            dim = node.dim or 0
            line = self._lines.read(node)
            piece: Optional[Tensor] = line
            if start < high:
                piece = self._rows_of(work, strip)
                if node in self._wanted:
                    strip.roots[node] = (start, piece)
                if line is not None:
                    piece = torch.cat((line, piece), dim)
            if piece is not None:
                there[node] = (work.begin, piece)
                self._keep(work, piece, dim)
                if self._cpu and start < high:
                    self._memory.computed((high - start) * node.row_bytes, self._pass.workspace)
            for source in self._sources[node]:
                if self._last_readers[source] is node:
                    there.pop(source, None)
        return strip

    def _keep(self, work: StepRows, piece: Tensor, dim: int) -> None:
        """Keep the rows that the next strip reads again."""
        node, end = work.node, work.begin + piece.shape[dim]
        if work.keep >= end or node in self._pass.recomputed:
            self._lines.drop(node)
        elif work.rows[0] < work.rows[1]:
            self._lines.keep(node, piece.narrow(dim, work.keep - work.begin, end - work.keep), dim)

    def _rows_of(self, work: StepRows, strip: _Strip) -> Tensor:
        node = work.node
        chain = self._chains.get(node)
        if chain is not None:
            return self._rows_of_chain(chain, work, strip)
        pieces, spans = [], iter(work.needs)
        for source, dim in zip(node.inputs, node.dims):
            if source in strip.padded:
                next(spans)
                pieces.append(strip.there[source][1])
            else:
                pieces.append(self._piece(source, dim, *((0, 0) if dim is None else next(spans)), strip))
        if node.inputs and node.inputs[0] in strip.padded:
            assert isinstance(node.step, Convolve)
            return node.step.call(pieces)
        assert node.step is not None
        return node.step.compute(*work.rows, pieces)

    def _rows_of_chain(self, chain: Chain, work: StepRows, strip: _Strip) -> Tensor:
        """The same of the last step of a chain."""
        edges, reader = None, strip.works.get(chain.convolution) if chain.convolution is not None else None
        if reader is not None and reader.needs and reader.needs[0] == work.rows:
            step: Any = reader.node.step
            edges = step.edges(*reader.rows)

        def read(source: Node, dim: Optional[int], first: int, last: int) -> Tensor:
            return self._piece(source, dim, first, last, strip)

        done = self._kernels.compute(chain, *work.rows, read, edges, work.node in self._gathering)
        if done.padded:
            strip.padded.add(work.node)
        if done.moments is not None:
            strip.moments[work.node] = done.moments
        return done.rows

    def _piece(self, source: Node, dim: Optional[int], low: int, high: int, strip: _Strip) -> Tensor:
        """Rows `[low, high)` of what a step reads along `dim`; all of it where that is None."""
        if dim is None:
            return _whole(source, self._stored)
        if source not in self._inside:
            return self._read(source, dim, low, high)
        if low >= high or source not in strip.there:
            return no_rows(source, dim)
        begin, piece = strip.there[source]
        assert low >= begin  # what lies before it is gone
        whole = low == begin and high - low == piece.shape[dim]
        return piece if whole else piece.narrow(dim, low - begin, high - low)


class _NewRows(NamedTuple):
    """New rows of a target. moments: see `_Strip`."""

    target: Target
    piece: Tensor
    moments: Optional[Tensor]


class _Strip:
    """What a strip has computed so far.

    works: what it does for each step. there: of each step that is still read, the first row and the rows. roots: the
    same of the new rows of each target. padded: the steps whose rows a convolution's padding lies around. moments: of
    the new rows of targets.
    """

    def __init__(self, works: dict[Node, StepRows]) -> None:
        self.works = works
        self.there: dict[Node, tuple[int, Tensor]] = {}
        self.roots: dict[Node, tuple[int, Tensor]] = {}
        self.padded: set[Node] = set()
        self.moments: dict[Node, Tensor] = {}


def _gathers_moments(reduction: Node) -> bool:
    """Whether a reduction is the statistics of a norm, of a map as it is."""
    return isinstance(reduction.step, Reduce) and reduction.step.moments
