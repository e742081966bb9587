"""Decides what is stored, and where: what a normalisation or an operator needs whole, what the plan says, no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Optional

import torch
from torch import Tensor

from ..geometry import strips
from .buffers import FileBuffer
from .graph import Attend, Convolve, Node, Normalise, RowLocal, Wrap
from .rows import Rows, Statistics
from .sweep import Sweep, producers_first, rows_that_suit

Part = Callable[[Tensor, int, int], Tensor]


def whole(node: Node) -> Tensor:
    """The map of `node` as one tensor."""
    if node.rows is None:
        _prepare(node)
        node.store(_into_tensors([(node, node.shape, _rows_of)])[0])
    assert node.rows is not None
    return node.rows.whole()


def finish(nodes: Sequence[Node]) -> None:
    """Store what a whole computation results in, each map as one tensor on the device, all in one pass."""
    nodes = [node for node in dict.fromkeys(nodes) if node.rows is None]
    for node in nodes:
        _prepare(node)
    nodes = [node for node in nodes if node.rows is None]
    for device in dict.fromkeys(node.device for node in nodes):
        together = [node for node in nodes if node.device == device]
        results = _into_tensors([(node, node.shape, _rows_of) for node in together], results=True)
        for node, rows in zip(together, results):
            node.store(rows)


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
    statistics = Statistics(groups)
    if node.rows is None:
        if _leave_unstored(node):
            Sweep([node], keep=True).run([statistics.add])
        else:
            _store([node, *_beside(node, above)], statistics)
    elif not node.run.dry:
        for first, last in strips(node.height, rows_that_suit(node, node.row_bytes)):
            statistics.add(node.rows.read(first, last))
    node.statistics[groups] = statistics


def _store(nodes: list[Node], statistics: Optional[Statistics] = None) -> None:
    """Store `nodes`, all in one pass; `statistics` are those of the first."""
    sweep = Sweep(nodes)
    stored = [
        Rows(node.run, node.shape, node.dtype, node.device, elsewhere)
        for node, elsewhere in zip(nodes, sweep.places([node.bytes for node in nodes]))
    ]

    def keep(strip: Tensor) -> None:
        if statistics is not None:
            statistics.add(strip)
        stored[0].append(strip)

    sweep.run([keep, *(rows.append for rows in stored[1:])])
    for node, rows in zip(nodes, stored):
        if node.run.dry:
            rows.pretend()
        node.store(rows)


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
    return _into_tensors([(node, (batch, height * width, channels), part)])[0]


_SAME = RowLocal(lambda pieces: pieces[0])


def _rows_of(tensor: Tensor, first: int, last: int) -> Tensor:
    return tensor.narrow(-2, first, last - first)


def _into_tensors(targets: list[tuple[Node, tuple[int, ...], Part]], results: bool = False) -> list[Rows]:
    """Each node evaluated into one new tensor of a shape; `part(tensor, first, last)` is where its rows go.

    results: these are the results of the computation, which lie on the device whatever the budget.
    """
    nodes = [node for node, _, _ in targets]
    sweep = Sweep(nodes)
    places = sweep.places([node.bytes for node in nodes], movable=not results and nodes[0].device.type == "cpu")
    tensors = []
    for (node, shape, _), elsewhere in zip(targets, places):
        if elsewhere and not node.run.dry:
            tensor = FileBuffer(node.bytes).empty(shape, node.dtype)
        else:
            tensor = torch.empty(shape, dtype=node.dtype, device=node.device)
        tensors.append(tensor)
    sweep.run([_Writer(tensor, part) for tensor, (_, _, part) in zip(tensors, targets)])
    return [Rows.of(tensor, nodes[0].run, elsewhere=elsewhere) for tensor, elsewhere in zip(tensors, places)]


class _Writer:
    """A sink that writes rows into a tensor."""

    def __init__(self, tensor: Tensor, part: Part) -> None:
        self._tensor, self._part, self._first = tensor, part, 0

    def __call__(self, strip: Tensor) -> None:
        last = self._first + strip.shape[-2]
        self._part(self._tensor, self._first, last).copy_(strip)
        self._first = last
