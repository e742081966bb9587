"""Runs a schedule: a flat loop over its steps: passes (`pass_loop`), single operators, attention in turn."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...memory.allocator import keep_freed_blocks
from ..graph.attention import Attend, Merging
from ..graph.node import Eager, Node, Span, dense_strides
from ..graph.steps import rows_of
from ..plan.schedule import Apply, InTurn, Pass, Schedule
from .freed_memory import FreedMemory
from .kernels import Kernels
from .pass_loop import OnProgress, PassLoop
from .share import ALONE, Share, Stored
from .stored import StoredStrips, StoredTensor, empty, joined, no_rows, whole_of

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
        self._memory = FreedMemory(schedule)
        self._shared: set[int] = set()  # memory of maps that others show too
        self._bands_of_results: dict[Node, Span] = {}
        self.bands: dict[Node, Tensor] = {}
        devices = {step.device for step in schedule.steps if isinstance(step, Pass)}
        self._kernels = {device: Kernels(device) for device in devices}

    def run(self) -> None:
        """Do all of it. Raises what operators raise; of memory that runs out see `PassLoop.compute`."""
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
        one_pass = PassLoop(
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
        if node.in_bands:
            self._bands_of_results[node] = first, last
        self._on_progress(step.work)

    def _in_strips(self, node: Node) -> StoredStrips:
        stored = self._stored[node]
        assert isinstance(stored, StoredStrips)
        return stored

    def _apply(self, step: Apply) -> None:
        node = step.node
        # Another rank's device may do by an operator of the program's what this one does otherwise.
        eager = node.eager if step.eagerly else None
        sources = node.inputs if eager is None else eager.inputs()
        pieces = [whole_of(source, self._stored) for source in sources]
        with torch.inference_mode(self._inference), torch.no_grad():
            result = self._at_once(node, pieces) if eager is None else self._eagerly(eager, step.in_place, pieces)
        if node.step is not None:
            node.step.end()
        self._stored[node] = StoredTensor.of(node, result, self._inference, self._memory.count)
        self._on_progress(step.work)

    def _eagerly(self, eager: Eager, in_place: bool, pieces: Sequence[Tensor]) -> Tensor:
        """What the program's own operator gives."""
        if in_place and eager.written is not None:
            written = whole_of(eager.written, self._stored)
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
        pieces = [piece if dim is None else rows_of(piece, dim, *next(spans)) for piece, dim in zip(pieces, node.dims)]
        return self._own(node.step.compute(0, node.rows, pieces), pieces)


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _reduced(node: Node, pieces: Sequence[Tensor]) -> Tensor:
    gathered: Any = node.step.start()  # type: ignore[union-attr]
    gathered.add(pieces[0])
    result = empty(node)
    gathered.result(result)
    return result
