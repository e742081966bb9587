"""One streamed call: the caller's code is recorded once, planned where a value is demanded, and run in strips."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any, Optional
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..memory.allocator import no_collections, rare_collections
from . import suited
from .execute.loop import Loop
from .execute.offloaded import room
from .execute.share import ALONE, Share
from .execute.to_file import require_room
from .graph.node import Node, ancestors
from .graph.steps import RowLocal
from .plan.bands import band
from .plan.choose import choose
from .plan.schedule import InTurn, Pass, Schedule, Tuning
from .record.held import is_ordinary
from .record.lazy import LazyTensor
from .record.recorder import Recorder
from .spread.agree import Offer, agree, at_home, program_of, sum_of
from .spread.ranks import Ranks
from .spread.results import Band
from .spread.samples import Batch
from .spread.together import Together

OnProgress = Callable[[int, int], None]
"""Called after each strip with the work done and the work in all, in bytes of maps computed (0: not known)."""


class Call:
    """One call of a function. report, on_progress: see `streamed`. schedules: of earlier calls, by what they are for.
    ranks: who makes it together; None for this process alone. in_bands: each is to have its `Band` of results. least:
    see `Streamed`.

    peak: bytes expected at once, of all segments. rows: of a strip of the pass that computes most. work: bytes of maps
    computed so far. in_strips: whether anything was to be computed otherwise than eager does. on_cpu: whether on the
    CPU. parts: in how many parts the samples of a batch were at most, which groups of ranks have taken. in_turn: of how
    many attentions keys and values went from rank to rank.
    """

    def __init__(
        self, budget: Optional[int], report: dict[str, int], on_progress: Optional[OnProgress], tuning: Tuning,
        schedules: OrderedDict[Any, Any], phantom: bool = False, ranks: Optional[Ranks] = None, in_bands: bool = False,
        least: bool = False,
    ) -> None:  # fmt: skip
        self.budget, self.report, self.tuning, self.least = budget, report, tuning, least
        self.peak = self.stored = self.offloaded = self.offloaded_at_once = 0
        self.work = self.eager_peak = self.planned = self.rows = 0
        self.streamed = self.in_strips = self.on_cpu = self._stopped = False
        self._most = 0
        self._on_progress, self._schedules, self._phantom = on_progress, schedules, phantom
        self._made: list[ref[Node]] = []
        self._ranks, self._inputs = ranks, ""
        self.parts, self._samples, self.in_turn = 1, 1, 0
        self._in_bands, self._bands = in_bands and ranks is not None, dict[Node, Tensor]()
        self.recorder = Recorder(self.evaluate, report, phantom, **({"small": 0} if tuning.always else {}))
        self.recorder.budget, self.recorder.note_made = budget if ranks is None else None, self._note_made

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What `function(*args, **kwargs)` returns."""
        recorder = self.recorder
        originals: dict[int, Tensor] = {}

        entered: dict[int, LazyTensor] = {}

        def enter(value: Any) -> Any:
            if not is_map(value):
                return value
            lazy = entered.get(id(value))  # two arguments may be one object
            if lazy is None:
                lazy = entered[id(value)] = recorder.defer(value)
                originals[id(lazy)] = value
            return lazy

        given = [enter(value) for value in args]
        named = {name: enter(value) for name, value in kwargs.items()}
        # What is garbage, and no longer the program's, shall be so on all ranks at once.
        with rare_collections() if self._ranks is None else no_collections():
            if self._ranks is not None:
                self._inputs = sum_of(list(originals.values()))
                batches = {value.shape[0] for value in originals.values()}
                self._samples = batches.pop() if len(batches) == 1 else 1
            try:
                with recorder:
                    result = function(*given, **named)
                del given, named
                with torch.no_grad():
                    if self._in_bands:
                        result = self._with_bands(result)
                    recorder.finish()
            except BaseException:
                self._forsake()
                raise
            finally:
                recorder.memory.forget_given()
                back = {id(value): originals[id(value)] for value in entered.values()}
                for value in entered.values():
                    give_memory(value, back[id(value)])
                    give_attributes(value, back)
        self.eager_peak = recorder.eager_peak
        return _with_originals(result, back)

    def _with_bands(self, result: Any) -> Any:
        """A result with this rank's bands in the place of deferred maps that come by rows."""
        deferred: dict[int, Node] = {}

        def find(value: Any) -> Any:
            lazy = isinstance(value, LazyTensor) and is_map_of(value.view_.spec) and value.view_.cell.real is None
            node = value.view_.node() if lazy else None
            if node is not None and node.tensor is None and node.dim is not None and node.home is None:
                deferred[id(value)] = node
            return value

        replaced(result, find)
        for node in deferred.values():
            node.in_bands = True
        self.recorder.store(deferred.values())
        bands = {key: self._band(node) for key, node in deferred.items() if node in self._bands}
        for node in deferred.values():
            node.in_bands = False
        self._bands = {}
        return replaced(result, lambda value: bands.get(id(value), value))

    def _band(self, node: Node) -> Band:
        assert self._ranks is not None
        assert node.dim is not None
        first, _ = band(node.rows, self._ranks.rank, self._ranks.count)
        return Band(self._bands[node], node.dim, first, node.rows)

    def _forsake(self) -> None:
        """The program failed: what it left behind has values all the same, if they can be had.

        Where other ranks took part, which know nothing of that, it is computed here alone once somebody asks for it; so
        is what was to be computed when the call was stopped, or had no room: that may take as long as all of it.
        """
        if self._ranks is None:
            with suppress(Exception), torch.no_grad():  # the program's own error is the one to tell
                self.recorder.finish(only_computed=self._stopped)
        self._ranks = self._on_progress = None

    def begin(self) -> None:
        """A call of its own begins, as an estimate counts several: what was stored before is none of it."""
        self.peak, self._made = 0, []

    def evaluate(self, roots: Sequence[Node], keep: Sequence[Node]) -> None:
        """Store `roots`: plan the way to them, and run the plan."""
        self._stopped = True  # until all is done
        self._evaluate(roots, keep)
        self._stopped = False

    def _evaluate(self, roots: Sequence[Node], keep: Sequence[Node]) -> None:
        held = self._held()
        batch = self._batch(roots)
        wanted = roots if batch is None else batch.roots
        if self._ranks is None:
            schedule = self._schedule(roots, keep, held)
        elif batch is None:
            schedule = self._agreed(roots, keep, held, self._ranks.count)
        else:  # what the program may still ask for is computed again: this rank has a part of the samples
            schedule = self._agreed(wanted, [], held + batch.bytes, batch.peers.count)
        self.peak, self.stored = max(self.peak, schedule.peak), max(self.stored, schedule.stored)
        self.offloaded += schedule.offloaded
        self.offloaded_at_once = max(self.offloaded_at_once, schedule.offloaded_at_once)
        self.planned += schedule.work
        passes = [step for step in schedule.steps if isinstance(step, Pass)]
        for one in passes:
            self._most, self.rows = max((self._most, self.rows), (one.work, one.strip_rows))
        self.in_turn += sum(isinstance(step, InTurn) for step in schedule.steps)
        self.in_strips = self.in_strips or bool(passes)
        self.on_cpu = self.on_cpu or any(one.device.type == "cpu" for one in passes)
        if self._phantom:
            store_without_values(roots)
        else:
            self.recorder.memory.require_there()
            if schedule.offloaded_at_once and roots[0].device.type == "cpu":
                require_room(schedule.offloaded_at_once)
            peers = self._ranks if batch is None else batch.peers
            share: Share = ALONE if peers is None or peers.count == 1 else Together(peers)
            loop = Loop(schedule, self.recorder.inference, self._progress, share)
            loop.run()
            self._bands |= loop.bands
            if batch is not None:
                batch.put_together()
        for node in (*roots, *keep):
            if node.tensor is not None:
                if node.home is None:
                    self._made.append(ref(node))
                if not self._phantom:  # it may be a view of another that is stored, or of an argument
                    self.recorder.memory.watch(node)

    def _held(self) -> int:
        """Bytes that values of the call take now: what was planned or computed at once and is there yet, what the
        program writes to at once, and what was copied before it did."""
        self._made = [one for one in self._made if one() is not None]
        made = [node for node in (one() for one in self._made) if node is not None]
        counted = {node.tensor.untyped_storage()._cdata for node in made}
        written: dict[int, int] = {}
        for tensor in self.recorder.held():
            cell = tensor.view_.cell
            if cell.real is not None and cell.real.untyped_storage()._cdata not in counted:
                written[id(cell)] = cell.bytes
        return sum(node.bytes for node in made) + sum(written.values()) + self.recorder.memory.copied

    def _note_made(self, node: Node) -> None:
        """`node` was computed at once, by no plan."""
        self._made.append(ref(node))
        self.peak = max(self.peak, self._held())

    def _batch(self, roots: Sequence[Node]) -> Optional[Batch]:
        """How the samples of `roots` are split over the ranks; None where they are not."""
        if self._ranks is None or self._samples == 1 or any(root.in_bands for root in roots):
            return None
        batch = Batch.of(roots, self._ranks, self._samples, self.recorder.inference)
        if batch is not None:
            self.parts = max(self.parts, batch.parts)
        return batch

    def _agreed(self, roots: Sequence[Node], keep: Sequence[Node], held: int, together: int) -> Schedule:
        """The one that all ranks follow. together: how many share the rows of these nodes."""
        assert self._ranks is not None
        nodes = ancestors(roots)
        names = _named(nodes)
        unused = room(max(roots, key=lambda node: node.bytes).device)
        offer = Offer(program_of(nodes, names, roots, keep), self._inputs, self.budget, held, unused)

        def plan(budget: Optional[int], held: int, room: int) -> Schedule:
            self.budget = budget
            schedule = self._schedule(roots, keep, held, lambda: room, together)
            return schedule.renamed(lambda node: names[node])

        there = list(names)
        return at_home(agree(self._ranks, offer, plan).renamed(lambda number: there[number]))

    def _schedule(
        self, roots: Sequence[Node], keep: Sequence[Node], held: int, unused: Optional[Callable[[], int]] = None,
        ranks: int = 1,
    ) -> Schedule:  # fmt: skip
        """The schedule of an earlier call that was alike, or a new one. unused: room for what is offloaded; None to
        look for it. ranks: how many share the rows."""
        nodes = ancestors(roots)
        names = _named(nodes)
        key = _fingerprint(nodes, names, roots, keep), held, ranks
        budget, found = self._schedules.get(key, (None, None))
        if found is not None and _suits(found, budget, self.budget):
            there = list(names)
            return found.renamed(lambda number: there[number])
        with no_collections():
            schedule = self._chosen(roots, keep, held, unused, ranks)
            self._schedules[key] = self.budget, schedule.renamed(lambda node: names[node])
        while len(self._schedules) > _MOST:
            self._schedules.popitem(last=False)
        return schedule

    def _chosen(
        self, roots: Sequence[Node], keep: Sequence[Node], held: int, unused: Optional[Callable[[], int]], ranks: int
    ) -> Schedule:
        """A new one; see `_schedule`."""
        device = max(roots, key=lambda node: node.bytes).device
        tuning, there = self._tuning_for(device), unused or (lambda: room(device))
        if self.least and self.budget is not None:
            schedule = choose(roots, keep, tuning, None, held, there, ranks)
            if schedule.peak <= self.budget:
                return schedule
        return choose(roots, keep, tuning, self.budget, held, there, ranks)

    def _tuning_for(self, device: torch.device) -> Tuning:
        """Strips of the bytes that suit a device, where nobody said how many."""
        tuning = self.tuning
        if tuning.strip_bytes is None and tuning.suitable_bytes is None:
            tuning = replace(tuning, suitable_bytes=suited.USUAL.strip_bytes(device))
        return tuning

    def _progress(self, work: int) -> None:
        self.streamed = True
        self.work += work
        if self._on_progress is not None:
            self._on_progress(self.work, self.planned)


_MOST = 64
"""Schedules that are kept."""

_ALIKE = 1.25
"""How much larger a budget may be before maps that were offloaded for a smaller one are looked at again."""


def is_map(value: Any) -> bool:
    """Whether an argument is a feature map: of an image `[B, C, H, W]`, a video, a sound `[B, C, L]`, or tokens."""
    return is_ordinary(value) and is_map_of(value)


def is_map_of(looks: Any) -> bool:
    """The same of a tensor by its looks."""
    return looks.dtype.is_floating_point and len(looks.shape) >= 3 and prod(looks.shape) > 0


def joins(args: Any, kwargs: Any) -> bool:
    """Whether the arguments of a call are deferred already, by a streamed call that it is a part of."""
    return any(isinstance(value, LazyTensor) for value in (*args, *kwargs.values()))


def arguments(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What two calls of a method of a module have in common if their arguments are alike. None for a call that may be
    like no other."""
    module = getattr(function, "__self__", function)
    if not isinstance(module, nn.Module):
        return None
    return _hashable((ref(module), getattr(function, "__func__", None), _looks(args), _looks(kwargs)))


def signature(function: Callable[..., Any], given: Any) -> Any:
    """What they have in common if all that is set in the module is alike, too, and what tensors look like. given: their
    `arguments`. None for a call that may be like no other."""
    if given is None:
        return None
    module: Any = getattr(function, "__self__", function)
    return _hashable((given, tuple(_looks(part.__dict__) for part in module.modules())))


def _hashable(key: Any) -> Any:
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _looks(value: Any, depth: int = 8) -> Any:
    """What a value is: a tensor by what it looks like, anything but numbers and texts by which object it is."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if depth and isinstance(value, (list, tuple)):
        return type(value), tuple(_looks(one, depth - 1) for one in value)
    if depth and isinstance(value, dict):
        return tuple((name, _looks(one, depth - 1)) for name, one in value.items())
    if isinstance(value, (int, float, str, type(None), torch.dtype, torch.device)):
        return type(value), value
    return type(value), id(value)


def store_without_values(nodes: Sequence[Node]) -> None:
    """In an estimate: these are there now, as far as their shapes go. What stands for them is none of the program's."""
    with _disable_current_modes():
        for node in nodes:
            node.store(torch.empty_strided(node.shape, node.strides, dtype=node.dtype, device="meta"))


def _with_originals(value: Any, originals: dict[int, Tensor]) -> Any:
    """A result in which what stood for an argument is that argument again, and what is still deferred is not."""

    def original(one: Any) -> Any:
        if id(one) not in originals and isinstance(one, LazyTensor):  # before torch 2.3 no object becomes another
            with torch.no_grad():
                ordinary = originals[id(one)] = one.view_.cell.recorder.real(one).detach()
            vars(ordinary).update(replaced(attributes_of(one), original))
        return originals.get(id(one), one)

    return replaced(value, original)


def give_memory(stood: Tensor, original: Tensor) -> None:
    """Leave the argument `original` with the memory and the looks of what stood for it: once that was ordinary, the
    program may have given it others."""
    if not isinstance(stood, LazyTensor) and _place(stood) != _place(original):
        original.data = stood.detach()


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def give_attributes(lazy: LazyTensor, originals: dict[int, Tensor]) -> None:
    """Leave what the program has set on the tensor that stood for an argument on that argument."""
    original, own = vars(originals[id(lazy)]), attributes_of(lazy)
    for name in original.keys() - own.keys():
        del original[name]
    original.update(replaced(own, lambda one: originals.get(id(one), one)))


def attributes_of(lazy: LazyTensor) -> dict[str, Any]:
    """The attributes of a deferred tensor that are the program's."""
    return {name: value for name, value in vars(lazy).items() if name not in ("original_", "view_")}


def replaced(value: Any, other: Callable[[Any], Any], depth: int = 8) -> Any:
    """A result with what `other` gives in the place of each thing in it, in lists, tuples and dictionaries too."""
    new = other(value)
    if new is not value or isinstance(value, Tensor):
        return new
    if depth and type(value) in (list, tuple):
        mapped = [replaced(one, other, depth - 1) for one in value]
        if any(one is not before for one, before in zip(mapped, value)):
            if isinstance(value, list):
                value[:] = mapped
            else:
                return tuple(mapped)
    elif depth and isinstance(value, dict):
        for key, one in list(value.items()):
            mapped_one = replaced(one, other, depth - 1)
            if mapped_one is not one:
                value[key] = mapped_one
    return value


def _suits(schedule: Schedule, made_for: Optional[int], budget: Optional[int]) -> bool:
    """Whether a schedule that was made for one budget will do for another."""
    if budget == made_for:
        return True
    if budget is None:
        return not schedule.offloaded
    fits = schedule.peak <= budget
    return fits and (not schedule.offloaded or (made_for is not None and made_for <= budget <= _ALIKE * made_for))


def _fingerprint(nodes: Sequence[Node], names: dict[Node, int], roots: Sequence[Node], keep: Sequence[Node]) -> Any:
    """What a schedule for these nodes depends on: the graph, how maps and what they are made of lie in memory, which
    steps eager does by the program's own operators and which map each of these writes to, and which rows each step
    reads, at three places of it."""
    return (
        tuple((names[node], node.home is None, node.in_bands) for node in roots),
        tuple(names[node] for node in keep),
        tuple(
            (
                *_lies(node), node.dim, node.dims, *_traits(node), tuple(names[source] for source in node.inputs),
                None if node.eager is None else _known(node.eager.written, names),
            )
            for node in nodes
        ),
        tuple(_lies(node) for node in names if node.tensor is not None),
        tuple(
            _lies(source)
            for node in nodes if node.eager is not None
            for source in node.eager.inputs() if source not in names
        ),
    )  # fmt: skip


def _lies(node: Node) -> tuple[Any, ...]:
    """How a map lies in memory, and in which: what an operator copies of it goes by that."""
    return node.shape, node.strides, node.dtype, node.device


def _known(node: Optional[Node], names: dict[Node, int]) -> Any:
    """A map by its number; by how it lies where it has none."""
    return names.get(node, _lies(node)) if node is not None else None


def _traits(node: Node) -> tuple[Any, ...]:
    step = node.step
    if step is None:
        return ()
    known = step.takes_all or type(step) is RowLocal
    rows = () if known else (0, (node.rows - 1) // 2, node.rows - 1)
    needs = tuple(tuple(step.needs(row, row + 1)) for row in rows)
    costs = (
        step.weight_bytes, step.kernel_bytes, step.workspace, step.least_rows, step.rows_together, step.widened,
        step.work, step.copies, step.block, step.bytes_beside, step.overlap, step.pads, step.in_turn,
    )  # fmt: skip
    return type(step), step.name, step.cheap, step.moves, step.repeats, *costs, needs


def _named(nodes: Sequence[Node]) -> dict[Node, int]:
    """Numbers for nodes and for the stored ones that they read."""
    names: dict[Node, int] = {}
    for node in nodes:
        for one in (*node.inputs, node):
            names.setdefault(one, len(names))
    return names
