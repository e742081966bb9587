"""Decides what is stored, and where: what a normalisation or an operator needs whole, what the plan says, no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from ..geometry import strips
from .buffers import FileBuffer
from .graph import Attend, Convolve, Join, Narrow, Node, Normalise, RowLocal, Wrap
from .rows import Rows, Statistics
from .sweep import Sweep, producers_first, rows_that_suit

Part = Callable[[Tensor, int, int], Tensor]


def whole(node: Node) -> Tensor:
    """The map of `node` as one tensor."""
    if node.rows is None:
        _prepare(node)
        node.store(_into_tensors([_Target(node, node.shape, _rows_of)])[0])
    assert node.rows is not None
    return node.rows.whole()


def finish(nodes: Sequence[Node], written: Sequence[tuple[Tensor, Node]] = ()) -> None:
    """Store what a whole computation results in, each map as one tensor, and give each tensor of `written` the values
    of its map, all in one pass."""
    pieces = [piece for tensor, node in written for piece in _pieces(tensor, node)]
    roots = [*nodes, *(node for _, node in pieces)]
    for node in roots:
        if node.rows is None:
            _store_parts(node)
            _prepare(node)
    read = {_storage(source.rows.tensor) for source in _stored(roots) if source.rows and source.rows.tensor is not None}
    # What the pass itself reads is written to after it.
    can_be = [node.rows is None and _storage(tensor) not in read for tensor, node in pieces]
    at_once = [piece for piece, can in zip(pieces, can_be) if can]
    later = [piece for piece, can in zip(pieces, can_be) if not can]
    nodes = [node for node in dict.fromkeys([*nodes, *(node for _, node in later)]) if node.rows is None]
    targets = [_Target(node, node.shape, _rows_of) for node in nodes]
    targets += [_Target(node.then(_SAME, node.shape), node.shape, _rows_of, tensor) for tensor, node in at_once]
    if targets:
        for node, rows in zip(nodes, _into_tensors(targets, results=True)):
            node.store(rows)
    for tensor, node in later:
        assert node.rows is not None
        with torch.inference_mode(tensor.is_inference()):
            tensor.copy_(node.rows.whole())


def _pieces(tensor: Tensor, node: Node) -> list[tuple[Tensor, Node]]:
    """The parts of `tensor` that have to change for it to be `node`, and what each has to be."""
    if isinstance(node.step, Join):
        dim, sizes = node.step.dim, [source.shape[node.step.dim] for source in node.inputs]
        parts = zip(tensor.split(sizes, dim), node.inputs)
        return [piece for part, source in parts for piece in _pieces(part, source)]
    if isinstance(node.step, Narrow) and node.inputs[0].rows is not None:
        stored, step = node.inputs[0].rows.tensor, node.step
        same = stored is not None and stored.narrow(step.dim, step.first, node.shape[step.dim])
        if isinstance(same, Tensor) and (_storage(same), same.storage_offset(), same.shape, same.stride()) == (
            _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
        ):  # fmt: skip
            return []
    return [(tensor, node)]


def _stored(roots: Sequence[Node]) -> set[Node]:
    """The stored maps that `roots` are computed from, or are."""
    return {source for node in producers_first(list(roots)) for source in node.inputs if source.rows is not None} | {
        node for node in roots if node.rows is not None
    }


def _storage(tensor: Optional[Tensor]) -> int:
    return 0 if tensor is None else tensor.untyped_storage()._cdata


def _prepare(root: Node) -> None:
    """Give every step on the way to `root` what it needs beforehand: a normalisation its statistics, attention its keys
    and values, circular padding the rows at either end."""
    while True:
        # No list of the steps may outlive this line: what it holds would count as in use.
        node = next((one for one in producers_first([root]) if not _is_prepared(one)), None)
        if node is None:
            return
        if isinstance(node.step, Normalise):
            _gather(node.inputs[0], node.step.groups, root)
            node.step.prepare(node.inputs[0])
        elif isinstance(node.step, Wrap):
            if node.inputs[0].rows is None:
                _store([node.inputs[0]])
            node.step.prepare(node.inputs[0])
        elif isinstance(node.step, Attend):
            _store_origins(_attention_to_prepare(root))
            node.step.prepare(*(_all_tokens(source) for source in node.inputs[1:]))
            node.let_go(1)


def _attention_to_prepare(root: Node) -> list[list[Node]]:
    """On the way to `root`, the inputs of each attention that needs nothing else prepared."""
    waiting: set[Node] = set()
    found = []
    for node in producers_first([root]):
        behind = any(source in waiting for source in node.inputs)
        if behind or not _is_prepared(node):
            waiting.add(node)
        if isinstance(node.step, Attend) and not node.step.prepared and not behind:
            found.append(list(node.inputs))
    return found


def expect_reads(nodes: Sequence[Node]) -> None:
    """These maps are about to be read one after the other."""
    for node in nodes:
        if node.rows is None:
            _prepare(node)
    _store_origins([nodes])


def _store_origins(groups: Iterable[Sequence[Node]]) -> None:
    """For each group of maps that are read one after the other, store the one map that all of them are cheap to have
    from, in one pass; queries, keys and values would have all before them computed three times otherwise."""
    origins = dict.fromkeys(origin for origin in map(_origin, groups) if origin is not None)
    for device in dict.fromkeys(node.device for node in origins):
        _store([node for node in origins if node.device == device])


def _origin(nodes: Sequence[Node]) -> Optional[Node]:
    """The last map that all ways to `nodes` lead through, where what follows it needs no other rows; None where stored
    maps are as near."""
    front, origin = {node for node in nodes if node.rows is None}, None
    while front:
        if len(front) == 1:
            (origin,) = front
        node = max(front, key=lambda node: node.serial)
        step = node.step
        if not (isinstance(step, (RowLocal, Normalise)) or (isinstance(step, Convolve) and step.axis.span == 1)):
            return origin
        front.remove(node)
        front.update(source for source in node.inputs if source.rows is None)
    return None


def _is_prepared(node: Node) -> bool:
    return getattr(node.step, "prepared", True)


def _gather(node: Node, groups: int, above: Node) -> None:
    """Statistics of `groups` groups of channels of `node`, which is stored with that, unless the plan says otherwise.

    above: the node whose evaluation this is a part of. What else in it reads the same unstored maps, and is smaller,
    is stored too.
    """
    if groups in node.statistics:
        return
    origin, shared = _arranged_from(node)
    if shared:
        _gather_parts(origin, above)
        return
    statistics = Statistics(groups)
    if node.rows is None:
        if _leave_unstored(node):
            _pass_over([node], keep=True).run([statistics.add])
        else:
            _store([node, *_beside(node, above)], {node: statistics})
    elif not node.run.dry:
        for first, last in strips(node.height, rows_that_suit(node.height, node.row_bytes, node.device)):
            statistics.add(node.rows.read(first, last))
    node.statistics[groups] = statistics


_WORTH_A_CUT = 0.8
"""A computation in two passes has to take less than this share of what one takes beside stored maps."""


def _pass_over(roots: list[Node], keep: bool = False) -> Sweep:
    """A pass that computes `roots`; maps on the way are stored beforehand where that takes less memory.

    Steps with large weights and small maps, as an encoder's last ones, want large strips, steps with large maps want
    small ones: where both are on the way, the maps between them are stored.
    """
    sweep = Sweep(roots, keep)
    best, cut = _WORTH_A_CUT * sweep.workspace, None
    for frontier in sweep.frontiers():
        size = sum(node.bytes for node in frontier)
        if size < best:
            peak = max(Sweep(frontier).workspace, size + Sweep(roots, keep, stored=frontier).workspace)
            if peak < best:
                best, cut = peak, frontier
    if cut is None:
        return sweep
    _store(cut)
    return _pass_over(roots, keep)


def _arranged_from(node: Node) -> tuple[Node, bool]:
    """The map whose values `node` arranges anew, itself perhaps, and whether something else reads what it does."""
    shared = False
    while node.rows is None and node.step is not None and node.step.moves and len(node.inputs) == 1:
        (node,) = node.inputs
        shared |= node.users > 1
    return node, shared


def _gather_parts(origin: Node, above: Node) -> None:
    """Statistics of all parts of `origin`, such as some frames each, that are normalised on the way to `above`, in one
    pass; it is stored with that."""
    parts: dict[Node, Statistics] = {}
    for node in producers_first([above]):
        if isinstance(node.step, Normalise) and not node.step.prepared:
            (part,) = node.inputs
            known = part in parts or node.step.groups in part.statistics
            if not known and _arranged_from(part) == (origin, True):
                parts[part] = part.statistics.setdefault(node.step.groups, Statistics(node.step.groups))
    if origin.rows is None:
        _store([origin], parts)
    else:
        Sweep(list(parts), keep=True).run([statistics.add for statistics in parts.values()])


def _store(nodes: list[Node], statistics: Optional[dict[Node, Statistics]] = None) -> None:
    """Store `nodes`, all in one pass, in which `statistics` are gathered of these and of other nodes."""
    statistics, nodes = statistics or {}, [*nodes, *_kept_for_later(nodes)]
    others = [node for node in statistics if node not in nodes]
    sweep = _pass_over([*nodes, *others])
    stored = [
        Rows(node.run, node.shape, node.dtype, node.device, elsewhere, sweep.rows_in_strip(node))
        for node, elsewhere in zip(nodes, sweep.places([node.bytes for node in nodes]))
    ]

    def keep(node: Node, rows: Rows) -> Callable[[Tensor], None]:
        def sink(strip: Tensor) -> None:
            if node in statistics:
                statistics[node].add(strip)
            rows.append(strip)

        return sink

    sweep.run([*map(keep, nodes, stored), *(statistics[node].add for node in others)])
    for node, rows in zip(nodes, stored):
        if node.run.dry:
            rows.pretend()
        node.store(rows)


def _store_parts(root: Node) -> None:
    """Where `root` is put together of parts, as of a video's chunks: store those, one after the other, that let larger
    maps go with that."""
    while root.rows is None and isinstance(root.step, RowLocal) and len(root.inputs) == 1:
        (root,) = root.inputs
    if root.rows is not None or root.step is None or not root.step.moves or len(root.inputs) < 2:
        return
    for part in dict.fromkeys(root.inputs):
        if part.rows is None:
            _store_parts(part)
            _prepare(part)
            steps = producers_first([part])
            for source in _stored([part]):
                normalised = bool(source.statistics) and 2 * part.bytes <= source.bytes
                if normalised and source.users == sum(step.inputs.count(source) for step in steps):
                    _store([part])
                    break


def _kept_for_later(nodes: Sequence[Node]) -> list[Node]:
    """Frames of the steps that lead to `nodes` that later steps read: a video's last ones, which the next chunk wants.

    Stored with `nodes` they let the maps go that they are computed from, and are not computed again.
    """
    order = producers_first(list(nodes))
    inside = set(order)
    found = []
    for node in dict.fromkeys(reader for step in order for reader in step.readers if reader not in inside):
        frames = len(node.shape) == 5 and isinstance(node.step, Narrow) and node.step.dim == 2
        if frames and any(node.bytes <= 1.25 * source.bytes for source in _stored([node])):
            found.append(node)
    return sorted(found, key=lambda node: node.serial)


def _leave_unstored(node: Node) -> bool:
    """Whether `node` is cheap to have again and the plan has it computed wherever it is read.

    Cheap is what a few steps make of a map of half its size or less. That one is stored then.
    """
    source = node
    while 2 * source.bytes > node.bytes:
        if len(source.inputs) != 1 or isinstance(source.step, (Normalise, Attend)):
            return False
        source = source.inputs[0]
    if not node.run.leaves_unstored(node.bytes):
        return False
    if source.rows is None:
        _store([source])
    return True


def _beside(node: Node, above: Node) -> list[Node]:
    """What on the way to `above` reads an unstored map that `node` is computed from, and takes less room than that."""
    if node.run.plan.unstored_from is None:
        return []
    own = producers_first([node])
    unstored = [one for one in own if one.statistics]
    return [
        one
        for one in producers_first([above])
        if one is not above
        and one not in own
        and any(source in unstored and one.bytes < source.bytes for source in one.inputs)
        and all(_is_prepared(step) for step in producers_first([one]))
    ]


def _all_tokens(node: Node) -> Rows:
    """A map `[B, C, H, W]` as `[B, pixels, C]`."""
    batch, channels, height, width = node.shape

    def part(tensor: Tensor, first: int, last: int) -> Tensor:
        rows = tensor.narrow(1, first * width, (last - first) * width)
        return rows.transpose(1, 2).unflatten(2, (last - first, width))

    if node.rows is not None:
        node = node.then(_SAME, node.shape)
    return _into_tensors([_Target(node, (batch, height * width, channels), part)])[0]


_SAME = RowLocal(lambda pieces: pieces[0])


def _rows_of(tensor: Tensor, first: int, last: int) -> Tensor:
    return tensor.narrow(-2, first, last - first)


@dataclass(frozen=True)
class _Target:
    """Where a node goes: into a tensor of a shape, a new one unless it is given; `part(tensor, first, last)` is where
    its rows go there."""

    node: Node
    shape: tuple[int, ...]
    part: Part
    tensor: Optional[Tensor] = None


def _into_tensors(targets: list[_Target], results: bool = False) -> list[Rows]:
    """Each node evaluated into one tensor, those that are new first.

    results: these are the results of the computation, which lie on their device whatever the budget.
    """
    run = targets[0].node.run
    sweep = _pass_over([target.node for target in targets])
    new = [target for target in targets if target.tensor is None]
    sizes = [target.node.bytes if target.node.device == sweep.device else 0 for target in new]
    places = sweep.places(sizes, movable=not results and sweep.device.type == "cpu", in_strips=False)
    tensors = []
    for target, elsewhere in zip(new, places):
        node = target.node
        if elsewhere and not run.dry:
            tensor = FileBuffer(node.bytes).empty(target.shape, node.dtype)
        else:
            tensor = torch.empty(target.shape, dtype=node.dtype, device=node.device)
        tensors.append(tensor)
    given = [target.tensor for target in targets if target.tensor is not None]
    sweep.run([_Writer(tensor, target.part) for tensor, target in zip([*tensors, *given], targets)])
    return [
        Rows.of(tensor, run, counted=tensor.device == sweep.device, elsewhere=elsewhere)
        for tensor, elsewhere in zip(tensors, places)
    ]


class _Writer:
    """A sink that writes rows into a tensor."""

    def __init__(self, tensor: Tensor, part: Part) -> None:
        self._tensor, self._part, self._first = tensor, part, 0

    def __call__(self, strip: Tensor) -> None:
        last = self._first + strip.shape[-2]
        with torch.inference_mode(self._tensor.is_inference()):
            self._part(self._tensor, self._first, last).copy_(strip)
        self._first = last
