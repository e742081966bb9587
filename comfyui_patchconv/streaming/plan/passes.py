"""Which passes there are, and what each of them stores: decided one after the other, as a run would need them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Optional

from ..graph.node import Node
from .bands import cut_for
from .cost import seconds_of
from .schedule import Apply, Pass, Schedule, Target, Tuning
from .sweep import Sweep
from .way import Way, Ways


class Passes:
    """Plans the way to `roots`: what a step needs whole, or statistics of, is stored or gathered in a pass beforehand.

    keep: maps on the way that the program may still ask for behind this schedule. budget: bytes to stay within; None
    for no limit.
    recomputed_from: maps of so many bytes that are cheap to recompute from a smaller one are recomputed wherever they
    are read; None for never. held: bytes that lie on the device already. ranks: how many processes do it together: each
    stores a band of a map's rows, unless it is stored whole. spare: see `Sweep`.
    """

    def __init__(
        self, roots: Sequence[Node], keep: Sequence[Node], tuning: Tuning, budget: Optional[int],
        recomputed_from: Optional[int] = None, held: int = 0, ways: Optional[Ways] = None, ranks: int = 1,
        spare: Optional[int] = None,
    ) -> None:  # fmt: skip
        self.schedule = Schedule()
        self._roots, self._tuning, self._budget, self._recomputed_from = list(roots), tuning, budget, recomputed_from
        self._held, self._offloaded_bytes, self._ranks, self._spare = held, 0, ranks, spare
        self._ways, self._state = ways or Ways(), 0
        self._way = self._ways.steps_to(roots, (), self._state)
        self._final, self._outer = {*roots}, {*keep}
        self._readers: dict[Node, list[Node]] = {}
        for node in self._way:
            for source in dict.fromkeys(node.inputs):
                self._readers.setdefault(source, []).append(node)
        self._stored: dict[Node, Target] = {}
        self._left: set[Node] = set()
        self._offloaded: set[Node] = set()
        self._known_sweeps: dict[Any, Sweep] = {}
        self._readers_left = {node: len(readers) for node, readers in self._readers.items()}
        self._settled: set[Node] = set()
        self._unread: dict[Node, None] = {}

    def plan(self, below: Optional[float] = None) -> Optional[Schedule]:
        """Decide on everything. below: bytes; None is returned as soon as the peak is known to be no lower."""
        parts = self._parts()
        for node in self._way:
            if below is not None and self.schedule.peak >= below:
                return None
            if node not in self._stored:
                self._prepare(node)
            if node in parts and node not in self._stored:
                self._store_part(node)
        rest = [root for root in self._roots if root not in self._stored]
        for device in dict.fromkeys(root.device for root in rest):
            self._store([root for root in rest if root.device == device and root not in self._stored])
        return None if below is not None and self.schedule.peak >= below else self.schedule

    # What a step needs beforehand

    def _is_there(self, node: Node) -> bool:
        return node.tensor is not None or node in self._stored

    def _prepare(self, node: Node) -> None:
        """Have what `node` needs before any of its rows can be computed, and what comes whole."""
        step = node.step
        assert step is not None
        whole = [
            source
            for source, dim in zip(node.inputs, node.dims)
            if not self._is_there(source) and (dim is None or dim != source.dim or step.takes_all)
        ]
        if whole:
            self._store(list(dict.fromkeys(whole)), whole=True)
        if step.takes_all:
            self._apply(node)
        elif step.reduces:
            self._gather(node)

    def _apply(self, node: Node) -> None:
        self._note(node.bytes, 0, 0)
        self._held += node.bytes
        self._settle(Target(node, whole=True, result=node in self._final))
        freed = self._free()
        for one in freed:
            self._release(one)
        self.schedule.steps.append(Apply(node, freed, node.bytes))
        self.schedule.work += node.bytes
        self.schedule.seconds += seconds_of([node])

    def _gather(self, reduction: Node) -> None:
        """Have a reduction's result: its input is stored in the same pass, unless it is cheap to recompute."""
        ((source, dim),) = reduction.by_rows
        if self._is_there(source):
            self._run_pass([Target(source, stored=False, reductions=self._reductions_of(source, dim))])
        elif self._leave_unstored(source):
            self._run_pass([Target(source, stored=False, reductions=[reduction])])
        elif self._is_made_for(reduction, source):
            self._pass_to([Target(source, stored=False, reductions=[reduction])])
        else:
            self._store([source])
        if reduction not in self._stored:  # its input was stored with the map that it is a part of
            self._run_pass([Target(source, stored=False, reductions=[reduction])])

    def _is_made_for(self, reduction: Node, source: Node) -> bool:
        """Whether a reduction's input arranges what it reads of several maps, and nothing else reads it."""
        assert source.step is not None
        alone = self._readers[source] == [reduction] and source not in self._final and source not in self._outer
        ready = all(self._is_there(one) or dim == one.dim for one, dim in zip(source.inputs, source.dims))
        return source.step.moves and len(source.inputs) > 1 and alone and ready

    def _leave_unstored(self, node: Node) -> bool:
        """Whether `node` is cheap to recompute and the plan has it recomputed wherever it is read.

        Cheap is what a few steps make of a map of half its size or less. That one is stored then.
        """
        source = node
        while 2 * source.bytes > node.bytes:
            rows = source.by_rows
            if len(rows) != 1 or len(source.inputs) != 1 or source.step is None or source.step.takes_all:
                return False
            source = rows[0][0]
            if self._is_there(source):
                break
        if 2 * source.bytes > node.bytes:
            return False
        self.schedule.recomputable.add(node.bytes)
        if self._recomputed_from is None or node.bytes < self._recomputed_from:
            return False
        if not self._is_there(source):
            self._store([source])
        self._left.add(node)
        return True

    # Storing

    def _store(self, nodes: Sequence[Node], whole: bool = False) -> None:
        """Store maps in one pass, and what else of that pass later steps read."""
        origins = list(dict.fromkeys(self._origin(node, nodes) for node in nodes)) if not whole else list(nodes)
        origins = [node for node in origins if not self._is_there(node)]
        if not origins:
            return
        self._pass_to([self._target(node) for node in origins])
        if whole:
            rest = [node for node in nodes if not self._is_there(node)]
            if rest:
                self._store(rest, whole=True)

    def _pass_to(self, targets: list[Target]) -> None:
        """One pass to targets and to what else of it later steps read, or two where that takes less."""
        nodes = [target.node for target in targets]
        self._cut(nodes)
        if self._ranks > 1:
            self._cut_for_bands(nodes)
        self._run_pass(targets + [self._target(node) for node in self._kept_for_later(nodes)])

    def _origin(self, node: Node, nodes: Sequence[Node]) -> Node:
        """What to store for `node`: the map that it shows a part of, where others read that too; else itself."""
        origin = node
        while (
            origin not in self._final
            and origin.step is not None
            and origin.step.moves
            and len(origin.inputs) == 1
            and None not in origin.dims
        ):
            (source,) = origin.inputs
            if self._is_there(source) or source in self._left:
                return node
            origin = source
            others = [reader for reader in self._readers.get(origin, ()) if reader not in self._stored]
            if len(others) > 1 or origin in self._outer:
                return origin
        return node

    def _target(self, node: Node) -> Target:
        """How `node` is stored: strip by strip where all who read it do so along its rows, else in one tensor."""
        readers = self._readers.get(node, ())
        whole = node in self._final or node in self._outer or node.dim is None
        for reader in readers:
            for source, dim in zip(reader.inputs, reader.dims):
                whole = whole or (source is node and dim != node.dim)
        return Target(node, whole=whole, result=node in self._final)

    def _kept_for_later(self, targets: Sequence[Node]) -> list[Node]:
        """Maps on the way to `targets` that steps outside this pass read, too, and that are not cheap to recompute."""
        order = self._steps_to(targets)
        inside, kept = set(order), dict.fromkeys(targets)
        freeable: Optional[int] = None
        found: list[Node] = []
        for node in order:
            readers = self._readers.get(node, ())
            if node in kept or (len(readers) == 1 and readers[0] in inside and node not in self._outer):
                continue
            outside = [reader for reader in readers if reader not in inside and reader not in self._stored]
            if node in self._outer and node.tensor is None:
                outside = outside or [node]
            if not outside:
                continue
            if node in self._left:
                found += self._made_of_left(node, outside, inside, kept)
                continue
            parts = [reader for reader in outside if self._is_part(reader)]
            smaller = parts == outside and sum(part.bytes for part in parts) <= node.bytes
            wanted = parts if smaller and node not in self._outer else [node]
            size = sum(one.bytes for one in wanted)
            if self._is_cheap(node, kept):
                if freeable is None:
                    freeable = self._freed_after(order, inside)
                if freeable < 2 * size or self._freed_after(self._steps_to([node]), inside) < 2 * size:
                    continue
            for one in wanted:
                if one not in kept:
                    kept[one] = None
                    found.append(one)
        return found

    def _made_of_left(
        self, node: Node, outside: Sequence[Node], inside: Collection[Node], kept: dict[Node, None]
    ) -> list[Node]:
        """What later steps make of a map that is not stored, where it takes less room: stored while that is there."""
        found = []
        for reader in outside:
            step = reader.step
            if step is None or step.takes_all or step.reduces or reader.bytes >= node.bytes or reader in kept:
                continue
            ready = all(
                self._is_there(source) or (source in inside and dim == source.dim)
                for source, dim in zip(reader.inputs, reader.dims)
            )
            if ready:
                kept[reader] = None
                found.append(reader)
        return found

    def _is_part(self, node: Node) -> bool:
        if node.step is None or not node.step.moves or len(node.inputs) != 1:
            return False
        ((source, dim),) = zip(node.inputs, node.dims)
        return dim == source.dim

    def _is_cheap(self, node: Node, kept: Collection[Node]) -> bool:
        """Whether few and cheap steps make `node` of what is stored."""
        stack, seen = [node], 0
        while stack:
            one = stack.pop()
            if self._is_there(one) or one in kept or one in self._left:
                continue
            seen += 1
            if one.step is None or not (one.step.cheap or one.step.work <= 1) or one.step.takes_all or seen > 12:
                return False
            stack.extend(source for source in one.inputs)
        return True

    def _parts(self) -> set[Node]:
        """What roots are put together of, as of a video's chunks."""
        found: set[Node] = set()
        stack = list(self._roots)
        while stack:
            node = stack.pop()
            while node.step is not None and node.step.cheap and len(node.inputs) == 1:
                node = node.inputs[0]
            if node.step is not None and node.step.moves and len(node.inputs) > 1:
                new = [part for part in node.inputs if part.tensor is None and part not in found]
                found.update(new)
                stack += new
        return found

    def _store_part(self, part: Node) -> None:
        """Store a part of a root now where that frees more than it takes, with what the next part will read."""
        steps = self._steps_to([part])
        freed = self._freed_after(steps, set(steps))
        if 2 * part.bytes <= freed:
            kept = sum(node.bytes for node in self._kept_for_later([part]))
            if part.bytes + kept <= freed:
                self._store([part])

    def _freed_after(self, steps: Sequence[Node], inside: Collection[Node]) -> int:
        """Bytes of the stored maps that `steps` read, and that nothing will read once the steps `inside` are done."""
        stored = self._stored
        return sum(
            source.bytes
            for source in {source for node in steps for source in node.inputs if source in stored}
            if source not in self._final
            and source not in self._outer
            and all(one in stored or one in inside for one in self._readers.get(source, ()))
        )

    def _cut(self, roots: Sequence[Node]) -> None:
        """Where a pass takes less as two, because small maps with large weights want large strips and large maps small
        ones, store what lies between beforehand."""
        sweep = self._sweep(roots)
        if len({node.rows for node in sweep.way.order}) < 2:
            return
        wanted = [*roots, *self._kept_for_later(roots)]
        best, cut = self._tuning.worth_a_cut * self._sweep(wanted).workspace, None
        for frontier in sweep.way.frontiers:
            size = sum(self._bytes_here(self._target(node)) for node in frontier)
            if size < best and not any(node in self._left for node in frontier):
                first = [*frontier, *self._kept_for_later(frontier)]
                behind = [node for node in wanted if node not in first]
                peak = max(self._sweep(first).workspace, size + self._sweep_behind(first, behind).workspace)
                if peak < best:
                    best, cut = peak, frontier
        if cut is not None:
            self._store([node for node in cut if not self._is_there(node)])

    def _cut_for_bands(self, roots: Sequence[Node]) -> None:
        """Where ranks would compute many rows at the edges of their bands twice, store what lies between beforehand."""
        order = self._steps_to(roots)
        between = cut_for(order, roots, self._ranks) if order else None
        if between is not None and not any(node in self._left for node in between):
            self._store(between)

    def _steps_to(self, nodes: Sequence[Node]) -> list[Node]:
        """The steps that lead to `nodes` from what is stored by now."""
        return self._ways.steps_to(nodes, self._stored, self._state)

    def _sweep_of(self, targets: Sequence[Target]) -> Sweep:
        dims = {target.node: target.dim for target in targets if self._is_there(target.node)}
        return self._sweep([target.node for target in targets], dims)

    def _sweep(self, roots: Sequence[Node], dims: Optional[dict[Node, int]] = None) -> Sweep:
        key = tuple(roots), tuple((dims or {}).items())
        if key not in self._known_sweeps:
            way = self._ways.way(roots, self._stored, self._state, dims)
            self._known_sweeps[key] = self._sweep_along(way)
        return self._known_sweeps[key]

    def _sweep_behind(self, first: Sequence[Node], roots: Sequence[Node]) -> Sweep:
        """The one to `roots`, were those `first` stored."""
        way = self._ways.way(roots, {*self._stored, *first}, self._ways.after(self._state, first))
        return self._sweep_along(way)

    def _sweep_along(self, way: Way) -> Sweep:
        return Sweep(way, self._tuning, self._budget, self._offloaded, self._ranks, self._spare)

    # Passes

    def _reductions_of(self, node: Node, dim: Optional[int]) -> list[Node]:
        """The reductions that are still wanted of a map, and that take its rows along `dim`."""
        return [
            reader
            for reader in self._readers.get(node, ())
            if reader.step is not None
            and reader.step.reduces
            and reader not in self._stored
            and any(source is node and along == dim for source, along in reader.by_rows)
        ]

    def _run_pass(self, targets: list[Target]) -> None:
        """Count a pass, with all reductions that it can gather on the way."""
        targets = self._with_reductions(targets)
        sweep = self._sweep_of(targets)
        stored = [target for target in targets if target.stored and not self._is_there(target.node)]
        reductions = [node for target in targets for node in target.reductions]
        for target in stored:
            self._settle(target)
        for node in reductions:
            self._settle(Target(node, whole=True, result=node in self._final))
        freed = self._free(stored)
        read = {source for node in sweep.way.order for source in node.inputs} | {
            target.node for target in targets if not target.stored
        }
        shrinking = [node for node in freed if node in read and not self._stored[node].whole]
        self._held += sum(node.bytes for node in reductions)
        away = self._place(stored, sweep, shrinking)
        for node in freed:
            self._release(node)
        strips = -(-sweep.way.height // max(sweep.strip_rows, 1))
        self.schedule.steps.append(
            Pass(
                targets=targets,
                order=sweep.way.order,
                device=sweep.way.device,
                height=sweep.way.height,
                strip_rows=sweep.strip_rows,
                recomputed=sweep.way.recomputed,
                keeping=sweep.keeping,
                shrinking=shrinking,
                freed=freed,
                work=sweep.way.work,
                line_bytes=sweep.line_bytes - sum(away.values()),
                away=away,
                workspace=sweep.workspace - sweep.bytes_saved(away),
            )
        )
        self.schedule.work += sweep.way.work
        twice = {node: sweep.way.shared[node] for node in sweep.way.recomputed}
        self.schedule.seconds += seconds_of(sweep.way.order, strips, twice)

    def _with_reductions(self, targets: Sequence[Target]) -> list[Target]:
        """Targets, and the other maps that their pass computes and a reduction is still to read."""
        known = {target.node for target in targets}
        sweep = self._sweep_of(targets)
        for target in targets:
            more = [] if self._is_there(target.node) else self._reductions_of(target.node, target.node.dim)
            target.reductions = list(dict.fromkeys([*target.reductions, *more]))
        found = list(targets)
        for node in sweep.way.order:
            wanted = self._reductions_of(node, node.dim) if node not in known else []
            if wanted and node not in self._left:
                found.append(Target(node, stored=False, reductions=wanted))
        return found + self._parts_to_reduce(found, sweep)

    def _parts_to_reduce(self, targets: Sequence[Target], sweep: Sweep) -> list[Target]:
        """Parts of this pass's maps, such as some frames each, of which reductions are wanted: gathered in it too."""
        inside = {*sweep.way.order, *(target.node for target in targets)}
        known = {target.node for target in targets}
        found: dict[Node, Target] = {}
        stack = list(inside)
        while stack:
            node = stack.pop()
            for reader in self._readers.get(node, ()):
                if self._is_part(reader) and reader not in found and reader not in known and not self._is_there(reader):
                    wanted = self._reductions_of(reader, reader.dim)
                    if wanted:
                        found[reader] = Target(reader, stored=False, reductions=wanted)
                    if reader not in inside:
                        inside.add(reader)
                        stack.append(reader)
        return sorted(found.values(), key=lambda target: target.node.serial)

    def _settle(self, target: Target) -> None:
        """Mark a map as stored. Steps that only such maps read are settled too: nobody will compute them again."""
        self._stored[target.node] = target
        self._state = self._ways.after(self._state, [target.node])
        self._known_sweeps.clear()
        stack = [] if target.node in self._settled else [target.node]
        if not self._readers_left.get(target.node):
            self._unread[target.node] = None
        while stack:
            node = stack.pop()
            self._settled.add(node)
            for source in dict.fromkeys(node.inputs):
                self._readers_left[source] -= 1
                if self._readers_left[source]:
                    continue
                if source in self._stored:
                    self._unread[source] = None
                elif source.tensor is None and source not in self._final and source not in self._outer:
                    stack.append(source)

    def _free(self, keep: Sequence[Target] = ()) -> list[Node]:
        """The stored maps that nothing will read behind this step; `keep` are new ones, for which the next one asks."""
        fresh = {target.node for target in keep}
        freed = [node for node in self._unread if node not in fresh]
        for node in freed:
            del self._unread[node]
        return [node for node in freed if node not in self._final and node not in self._outer]

    def _release(self, node: Node) -> None:
        target = self._stored[node]
        if target.offloaded:
            self._offloaded_bytes -= self._bytes_here(target)
        else:
            self._held -= self._bytes_here(target)

    def _bytes_here(self, target: Target) -> int:
        """Bytes that a process stores of a map, at most."""
        node = target.node
        if node.home is not None:
            return 0
        return node.bytes if target.whole else -(-node.rows // self._ranks) * node.row_bytes

    def _place(self, targets: Sequence[Target], sweep: Sweep, shrinking: Sequence[Node]) -> dict[Node, int]:
        """Decide for each new map whether it has to be offloaded. Gives the line buffers that have to be as well, by
        their steps: for want of room beside maps that have to stay. They come and go with every strip."""
        cpu = sweep.way.device.type == "cpu"
        shrinks = [self._stored[node] for node in shrinking]
        freed = sum(self._bytes_here(target) for target in shrinks if not target.offloaded)
        given_back = sum(self._bytes_here(target) for target in shrinks if target.offloaded)
        growth = offloaded = 0
        held = self._held + sweep.workspace
        for target in targets:
            size = self._bytes_here(target)
            movable = not target.result and (cpu or not target.whole) and target.node.device == sweep.way.device
            given = freed if cpu or not target.whole else 0  # what is one tensor takes its memory at once, but on a CPU
            target.offloaded = movable and size > 0 and not _fits(self._budget, held, given, size)
            if target.offloaded:
                self._offloaded.add(target.node)
                self._known_sweeps.clear()
                self.schedule.offloaded += size
                offloaded += size
            else:
                held += size
                growth += size
        over = 0 if self._budget is None else self._held + max(growth - freed, 0) + sweep.workspace - self._budget
        away = sweep.lines_away(over) if over > 0 else {}
        self.schedule.offloaded += sum(away.values())
        beside = offloaded - given_back + sum(away.values())
        self._note(growth - freed, beside, sweep.workspace - sweep.bytes_saved(away))
        self._held += growth
        self._offloaded_bytes += offloaded
        return away

    def _note(self, growth: int, offloaded: int, workspace: int) -> None:
        """What is held grows by `growth` bytes now, what is offloaded by `offloaded`, and `workspace` bytes are in
        use beside both."""
        stored = self._held + max(growth, 0)
        self.schedule.stored = max(self.schedule.stored, stored)
        self.schedule.peak = max(self.schedule.peak, stored + workspace)
        self.schedule.offloaded_at_once = max(
            self.schedule.offloaded_at_once, self._offloaded_bytes + max(offloaded, 0)
        )


def _fits(budget: Optional[int], held: int, freed: int, new: int) -> bool:
    """Whether `new` bytes can be added to `held` within `budget`, while `freed` of those are freed at the same pace."""
    return budget is None or held + max(new - freed, 0) <= budget
