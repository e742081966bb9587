"""Which maps are stored at a point of the plan, who is still to read them, and which nothing reads any more."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..graph.node import Node
from .schedule import Target
from .way import Ways


class Lifetimes:
    """The maps on the way to `roots`, each from when it is stored until nothing reads it any more.

    keep: maps that the program may still ask for behind this schedule. order: the steps of the way. readers: those
    that read a map. stored: how those are stored that are by now. recomputed_everywhere: the maps that are not stored,
    but recomputed wherever they are read. everywhere: the maps that every rank is to compute whole. in_turn: the
    attentions whose keys and values need not be whole. state: which maps are stored, by the name that `ways` has for
    it.
    """

    def __init__(self, roots: Sequence[Node], keep: Sequence[Node], ways: Ways) -> None:
        self.ways, self.state = ways, 0
        self.order = ways.steps_to(roots, (), self.state)
        self.results, self.kept = {*roots}, {*keep}
        self.readers: dict[Node, list[Node]] = {}
        for node in self.order:
            for source in dict.fromkeys(node.inputs):
                self.readers.setdefault(source, []).append(node)
        self.stored: dict[Node, Target] = {}
        self.recomputed_everywhere: set[Node] = set()
        self.everywhere: set[Node] = set()
        self.in_turn: set[Node] = set()
        self._to_read = {node: len(readers) for node, readers in self.readers.items()}
        self._done: set[Node] = set()
        self._unread: dict[Node, None] = {}

    def is_there(self, node: Node) -> bool:
        """Whether a map is stored, or was before this schedule."""
        return node.tensor is not None or node in self.stored

    def outlives(self, node: Node) -> bool:
        """Whether a map is wanted behind this schedule."""
        return node in self.results or node in self.kept

    def steps_to(self, nodes: Sequence[Node]) -> list[Node]:
        """The steps that lead to `nodes` from what is stored by now."""
        return self.ways.steps_to(nodes, self.stored, self.state)

    def store(self, target: Target) -> None:
        """A map is stored from now on. Steps that only such maps read are done with: nobody will compute them again."""
        self.stored[target.node] = target
        self.state = self.ways.after(self.state, [target.node])
        stack = [] if target.node in self._done else [target.node]
        if not self._to_read.get(target.node):
            self._unread[target.node] = None
        while stack:
            node = stack.pop()
            self._done.add(node)
            for source in dict.fromkeys(node.inputs):
                self._to_read[source] -= 1
                if self._to_read[source]:
                    continue
                if source in self.stored:
                    self._unread[source] = None
                elif source.tensor is None and not self.outlives(source):
                    stack.append(source)

    def freed(self, new: Sequence[Target] = ()) -> list[Node]:
        """The stored maps that nothing will read behind this step, each told once. new: maps that this pass has just
        stored: they are not freed yet, even if nothing reads them."""
        fresh = {target.node for target in new}
        freed = [node for node in self._unread if node not in fresh]
        for node in freed:
            del self._unread[node]
        return [node for node in freed if not self.outlives(node)]

    def freed_after(self, steps: Sequence[Node], inside: Collection[Node]) -> list[Target]:
        """The stored maps that `steps` read, and that nothing will read once the steps `inside` are done."""
        stored = self.stored
        return [
            stored[source]
            for source in dict.fromkeys(source for node in steps for source in node.inputs if source in stored)
            if not self.outlives(source) and all(one in stored or one in inside for one in self.readers.get(source, ()))
        ]

    def bytes_freed_after(self, steps: Sequence[Node], inside: Collection[Node]) -> int:
        """Bytes of these maps, as one process has them."""
        return sum(target.node.bytes for target in self.freed_after(steps, inside))

    def target(self, node: Node) -> Target:
        """How `node` is to be stored: strip by strip where all who read it do so along its rows, else in one tensor."""
        whole = (self.outlives(node) and not node.in_bands) or node.dim is None
        for reader in self.readers.get(node, ()):
            for source, dim in zip(reader.inputs, reader.dims):
                whole = whole or (source is node and dim != node.dim and reader not in self.in_turn)
        return Target(node, whole=whole, result=node in self.results, everywhere=node in self.everywhere)

    def origin(self, node: Node) -> Node:
        """What to store for `node`: the map that it shows a part of, where others read that too; else itself."""
        origin = node
        while origin not in self.results and (source := origin.shows) is not None and None not in origin.dims:
            if self.is_there(source) or source in self.recomputed_everywhere:
                return node
            origin = source
            others = [reader for reader in self.readers.get(origin, ()) if reader not in self.stored]
            if len(others) > 1 or origin in self.kept:
                return origin
        return node
