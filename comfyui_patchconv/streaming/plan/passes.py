"""Which passes there are, and what each of them stores: decided one after the other, as a run would need them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import inf
from typing import Any, Optional

from ..graph.node import Node
from .bands import cut_for, cut_to_send_less
from .cost import seconds_of
from .everywhere import read_whole
from .for_later import half_or_less, parts_of, stored_for_later
from .in_turn import can_be_in_turn, pieces_of, workspace_of
from .lifetimes import Lifetimes
from .placement import Placement
from .reduced import reductions_of, with_reductions
from .schedule import Apply, InTurn, Pass, Schedule, Target, Tuning
from .sweep import Sweep
from .way import Way, Ways

_MUCH = 0.2
"""Of what a pass takes, the part that line buffers have to be for it to be halved."""


class Passes:
    """Plans the way to `roots`: what a step needs whole, or statistics of, is stored or gathered in a pass beforehand.

    keep: see `Lifetimes`. budget, held, ranks: see `Placement`. recomputed_from: maps of so many bytes that are cheap
    to recompute from a smaller one are recomputed wherever they are read; None for never. spare: see `Sweep`. in_turn:
    keys and values of attention are whole on no rank where that can be. everywhere: maps that every rank computes
    whole, with all that they are made of. halved: passes are parted whose line buffers weigh much. worth_a_byte:
    see `cut_to_send_less`; 0 for no such cuts.
    """

    def __init__(
        self, roots: Sequence[Node], keep: Sequence[Node], tuning: Tuning, budget: Optional[int],
        recomputed_from: Optional[int] = None, held: int = 0, ways: Optional[Ways] = None, ranks: int = 1,
        spare: Optional[int] = None, in_turn: bool = False, everywhere: Collection[Node] = (),
        halved: bool = False, worth_a_byte: int = 0,
    ) -> None:  # fmt: skip
        self.schedule = Schedule()
        self._roots, self._tuning, self._budget, self._recomputed_from = list(roots), tuning, budget, recomputed_from
        self._ranks, self._spare, self._in_turn, self._halved = ranks, spare, in_turn, halved
        self._ways = ways or Ways()
        self._maps = Lifetimes(roots, keep, self._ways)
        self._maps.everywhere |= {*everywhere}
        self._worth_a_byte = worth_a_byte
        self._placement = Placement(self.schedule, budget, held, ranks)
        self._sweeps: dict[Any, Sweep] = {}

    def plan(self, below: Optional[float] = None) -> Optional[Schedule]:
        """Decide on everything. below: bytes; None is returned as soon as the peak is known to be no lower."""
        stored, parts = self._maps.stored, parts_of(self._roots)
        for node in self._maps.order:
            if below is not None and self.schedule.peak >= below:
                return None
            if node not in stored:
                self._prepare(node)
            if node in parts and node not in stored:
                self._store_part(node)
        rest = [root for root in self._roots if root not in stored]
        for device in dict.fromkeys(root.device for root in rest):
            self._store([root for root in rest if root.device == device and root not in stored])
        self._placement.join([stored[root] for root in self._roots if root.in_bands and root in stored])
        return None if below is not None and self.schedule.peak >= below else self.schedule

    # What a step needs beforehand

    def _prepare(self, node: Node) -> None:
        """Have what `node` needs before any of its rows can be computed, and what comes whole."""
        step = node.step
        assert step is not None
        if self._in_turn and can_be_in_turn(node) and self._attend_in_turn(node):
            return
        self._store_themselves(read_whole(node))
        if step.takes_all:
            self._apply(node)
        elif step.reduces:
            self._gather(node)

    def _attend_in_turn(self, node: Node) -> bool:
        """Have attention with its queries, keys and values in bands; False where one of these maps has to be whole."""
        maps, sources = self._maps, list(dict.fromkeys(node.inputs))
        maps.in_turn.add(node)
        target = maps.target(node)
        if target.whole or any(maps.target(source).whole for source in sources):
            maps.in_turn.discard(node)
            return False
        self._store_themselves(sources)
        pieces = pieces_of(node, self._budget, self._ranks)
        self._placement.put_band(target, workspace_of(node, pieces, self._ranks))
        maps.store(target)
        freed = maps.freed([target])
        self._release(freed)
        self.schedule.steps.append(InTurn(target, pieces.keys, pieces.queries, freed, node.bytes))
        self.schedule.work += node.bytes
        self.schedule.seconds += seconds_of([node])
        return True

    def _apply(self, node: Node) -> None:
        self._placement.put(node)
        self._maps.store(Target(node, whole=True, result=node in self._maps.results))
        freed = self._maps.freed()
        self._release(freed)
        self.schedule.steps.append(Apply(node, freed, node.bytes))
        self.schedule.work += node.bytes
        self.schedule.seconds += seconds_of([node])

    def _gather(self, reduction: Node) -> None:
        """Have a reduction's result: its input is stored in the same pass, unless it is cheap to recompute."""
        ((source, dim),) = reduction.by_rows
        alone = [Target(source, stored=False, reductions=[reduction])]
        if self._maps.is_there(source):
            self._add_pass([Target(source, stored=False, reductions=reductions_of(source, dim, self._maps))])
        elif self._leave_unstored(source):
            self._add_pass(alone)
        elif self._is_made_for(reduction, source):
            self._pass_to(alone)
        else:
            self._store([source])
        if reduction not in self._maps.stored:  # its input was stored with the map that it is a part of
            self._add_pass([Target(source, stored=False, reductions=[reduction])])

    def _is_made_for(self, reduction: Node, source: Node) -> bool:
        """Whether a reduction's input arranges what it reads of several maps, and nothing else reads it."""
        assert source.step is not None
        alone = self._maps.readers[source] == [reduction] and not self._maps.outlives(source)
        ready = all(self._maps.is_there(one) or dim == one.dim for one, dim in zip(source.inputs, source.dims))
        return source.step.moves and len(source.inputs) > 1 and alone and ready

    def _leave_unstored(self, node: Node) -> bool:
        """Have `node` recomputed wherever it is read, and store what it is made of; False where it is to be stored."""
        source = half_or_less(node, self._maps)
        if source is None:
            return False
        self.schedule.recomputable_sizes.add(node.bytes)
        if self._recomputed_from is None or node.bytes < self._recomputed_from:
            return False
        if not self._maps.is_there(source):
            self._store([source])
        self._maps.recomputed_everywhere.add(node)
        return True

    # Storing

    def _store(self, nodes: Sequence[Node]) -> None:
        """Store maps in one pass, or what they are parts of, and what else of that pass later steps read."""
        self._store_themselves(list(dict.fromkeys(self._maps.origin(node) for node in nodes)))

    def _store_themselves(self, nodes: Sequence[Node]) -> None:
        missing = [node for node in nodes if not self._maps.is_there(node)]
        if missing:
            self._pass_to([self._maps.target(node) for node in missing])

    def _store_part(self, part: Node) -> None:
        """Store a part of a root now where that frees more than it takes, with what the next part will read."""
        steps = self._maps.steps_to([part])
        freed = self._maps.bytes_freed_after(steps, set(steps))
        if 2 * part.bytes <= freed:
            kept = sum(node.bytes for node in stored_for_later([part], self._maps))
            if part.bytes + kept <= freed:
                self._store([part])

    def _pass_to(self, targets: list[Target]) -> None:
        """One pass to targets and to what else of it later steps read, or several where that takes or sends less."""
        nodes = [target.node for target in targets]
        self._cut(nodes)
        self._halve(nodes)
        if self._ranks > 1 and not self._maps.everywhere.issuperset(nodes):
            self._cut_for_bands(nodes)
        self._add_pass(targets + [self._maps.target(node) for node in stored_for_later(nodes, self._maps)])

    def _cut(self, roots: Sequence[Node]) -> None:
        """Where a pass takes less as two, because small maps with large weights want large strips and large maps small
        ones, store what lies between beforehand."""
        sweep = self._sweep(roots)
        if len({node.rows for node in sweep.way.order}) < 2:
            return
        wanted = [*roots, *stored_for_later(roots, self._maps)]
        best, cut = self._tuning.worth_a_cut * self._sweep(wanted).workspace, None
        for frontier in sweep.way.frontiers:
            size = sum(self._placement.bytes_of(self._maps.target(node)) for node in frontier)
            if size < best and self._maps.recomputed_everywhere.isdisjoint(frontier):
                first = [*frontier, *stored_for_later(frontier, self._maps)]
                behind = [node for node in wanted if node not in first]
                peak = max(self._sweep(first).workspace, size + self._sweep_behind(first, behind).workspace)
                if peak < best:
                    best, cut = peak, frontier
        if cut is not None:
            self._store(cut)

    def _halve(self, roots: Sequence[Node]) -> None:
        """Where line buffers are much of what a pass takes, and halving them spares more than is stored between its
        parts, store that beforehand."""
        lines = inf
        while (sweep := self._sweep(roots)).line_bytes < lines:
            lines, room = sweep.line_bytes, self._taken_in_turn(sweep, roots)
            if lines < _MUCH * (room + sweep.workspace) or not sweep.way.halfway:
                break
            between = sweep.way.halfway
            size = sum(self._placement.bytes_of(self._maps.target(node)) for node in between)
            if size - room >= lines / 2 or not self._maps.recomputed_everywhere.isdisjoint(between):
                break
            self.schedule.could_be_halved = True
            if not self._halved:
                break
            self._store(between)

    def _taken_in_turn(self, sweep: Sweep, roots: Sequence[Node]) -> int:
        """Bytes of the maps that a pass stores or frees as it goes on, whichever are more: so many may lie between its
        parts without more being stored at once."""
        targets, order = [self._maps.target(root) for root in roots], sweep.way.order
        at_once = sweep.way.device.type != "cpu" and any(target.whole for target in targets)  # such a map is one tensor
        new = 0 if at_once else sum(self._placement.bytes_of(target) for target in targets)
        freed = [target for target in self._maps.freed_after(order, set(order)) if not target.offloaded]
        return max(new, sum(map(self._placement.bytes_of, freed)))

    def _cut_for_bands(self, roots: Sequence[Node]) -> None:
        """Where ranks would compute many rows at the edges of their bands twice, store what lies between beforehand."""
        order = self._maps.steps_to(roots)
        worth = self._tuning.worth_an_exchange
        between = cut_for(order, roots, self._ranks, worth) if order else None
        if between is None and order and self._worth_a_byte:
            between = cut_to_send_less(order, roots, self._ranks, worth, self._worth_a_byte, self._in_bands)
        if between is not None and self._maps.recomputed_everywhere.isdisjoint(between):
            self._store(between)

    def _in_bands(self, node: Node) -> bool:
        """Whether a map that is stored, or would be, comes in bands."""
        if node.tensor is not None and node not in self._maps.stored:
            return False
        target = self._maps.stored.get(node) or self._maps.target(node)
        return not target.whole and not target.everywhere

    # Passes

    def _sweep_of(self, targets: Sequence[Target]) -> Sweep:
        dims = {target.node: target.dim for target in targets if self._maps.is_there(target.node)}
        return self._sweep([target.node for target in targets], dims)

    def _sweep(self, roots: Sequence[Node], dims: Optional[dict[Node, int]] = None) -> Sweep:
        """The one to `roots` from what is stored by now. dims: of roots that are stored themselves."""
        maps = self._maps
        key = maps.state, len(self._placement.offloaded), tuple(roots), tuple((dims or {}).items())
        if key not in self._sweeps:
            self._sweeps[key] = self._sweep_along(self._ways.way(roots, maps.stored, maps.state, dims))
        return self._sweeps[key]

    def _sweep_behind(self, first: Sequence[Node], roots: Sequence[Node]) -> Sweep:
        """The one to `roots`, were those `first` stored."""
        maps = self._maps
        return self._sweep_along(self._ways.way(roots, {*maps.stored, *first}, self._ways.after(maps.state, first)))

    def _sweep_along(self, way: Way) -> Sweep:
        ranks = 1 if self._maps.everywhere.issuperset(way.roots) else self._ranks
        return Sweep(way, self._tuning, self._budget, self._placement.offloaded, ranks, self._spare)

    def _add_pass(self, targets: list[Target]) -> None:
        """Count a pass, with all reductions that it can gather on the way."""
        maps = self._maps
        targets = with_reductions(targets, self._sweep_of(targets).way.order, maps)
        sweep = self._sweep_of(targets)
        everywhere = maps.everywhere.issuperset(target.node for target in targets)
        for target in targets:
            target.everywhere = everywhere
        new = [target for target in targets if target.stored and not maps.is_there(target.node)]
        reductions = [node for target in targets for node in target.reductions]
        for target in (*new, *(Target(node, whole=True, result=node in maps.results) for node in reductions)):
            maps.store(target)
        freed = maps.freed(new)
        read = {source for node in sweep.way.order for source in node.inputs}
        read.update(target.node for target in targets if not target.stored)
        shrinking = [node for node in freed if node in read and not maps.stored[node].whole]
        lines = self._placement.place(new, reductions, [maps.stored[node] for node in shrinking], sweep)
        self._release(freed)
        self._append(sweep.as_pass(targets, shrinking, freed, lines, everywhere), sweep)

    def _append(self, one_pass: Pass, sweep: Sweep) -> None:
        way = sweep.way
        self.schedule.steps.append(one_pass)
        self.schedule.work += way.work
        strips = -(-way.height // max(sweep.strip_rows, 1))
        seconds = seconds_of(way.order, strips, {node: way.shared[node] for node in way.recomputed})
        self.schedule.seconds += seconds * (self._ranks if one_pass.everywhere else 1)

    def _release(self, freed: Sequence[Node]) -> None:
        for node in freed:
            self._placement.release(self._maps.stored[node])
