"""The classes of a schedule: passes over maps, in order, and what they are expected to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Optional, Union

from ..graph.node import Node


@dataclass(frozen=True)
class Tuning:
    """How strips are sized, and when streaming is worth it. Users leave it as it is.

    strip_bytes: of all strips of the widest step that are alive at once; None for what suits the device. strip_share:
    which part of what suits the device strips take.
    allocator_bytes: what a plan counts for freed strips that an allocator keeps; None for what it may keep on the
    device. always: stream even where eager would take less memory, or far less time.
    worth_a_cut: a pass is split in two where that takes less than this share of its memory. worth_an_exchange:
    multiplications that a rank would do for rows of others, from which on ranks exchange these rows instead.
    worth_a_byte: multiplications that a rank does rather than have a byte sent; None for what suits the device.
    silent_seconds: after which a rank that nothing is heard of ends the call of all. suitable_bytes: instead of what
    was measured of the device (`suited`), where `strip_bytes` is None.
    """

    strip_bytes: Optional[int] = None
    strip_share: float = 1.0
    allocator_bytes: Optional[int] = None
    always: bool = False
    worth_a_cut: float = 0.8
    worth_an_exchange: int = 1 << 28
    worth_a_byte: Optional[int] = None
    silent_seconds: float = 60.0
    suitable_bytes: Optional[int] = None


USUAL = Tuning()

STRIPS_LEAVING = 2
"""Strips of an offloaded map that leave the device at once: one is copied while the device computes the next."""


@dataclass
class Target:
    """A map that a pass computes, or reads once more for a reduction, and what becomes of its rows.

    stored: they are kept. whole: in one tensor, else strip by strip. result: it outlives the schedule, and lies on its
    device whatever the budget. offloaded: it lies in host memory, or in a file where the device is the CPU. everywhere:
    of several ranks, each has all of its rows. reductions: what its rows are also given to.
    """

    node: Node
    stored: bool = True
    whole: bool = False
    result: bool = False
    offloaded: bool = False
    everywhere: bool = False
    reductions: list[Node] = field(default_factory=list)

    @property
    def dim(self) -> int:
        """Along which its rows lie."""
        wanted = next((dim for one in self.reductions for dim in one.dims if dim is not None), None)
        return wanted if wanted is not None else self.node.dim or 0

    @property
    def rows(self) -> int:
        return self.node.shape[self.dim] if self.node.shape else 1


@dataclass
class Pass:
    """One way through maps from top to bottom.

    order: the steps, in the program's order. height: rows of the tallest target. strip_rows: of these, how many come at
    once. recomputed: steps that are computed from stored maps for each strip rather than kept between strips. keeping:
    steps that keep their kernels. shrinking: stored maps that are freed row by row as they are read. freed: stored maps
    that are freed behind it. work: bytes of maps that it computes. line_bytes: of the line buffers on the device.
    offloaded_lines: the steps whose line buffers are offloaded, with their bytes. workspace: bytes beside stored maps.
    everywhere: of several ranks, each computes all rows, and sends none.
    """

    targets: list[Target]
    order: list[Node]
    device: Any
    height: int
    strip_rows: int
    recomputed: set[Node]
    keeping: list[Node]
    shrinking: list[Node]
    freed: list[Node]
    work: int
    line_bytes: int
    offloaded_lines: dict[Node, int]
    workspace: int
    everywhere: bool = False

    def renamed(self, name: Callable[[Any], Any]) -> Pass:
        """The same pass over other nodes."""
        targets = [
            replace(target, node=name(target.node), reductions=[name(node) for node in target.reductions])
            for target in self.targets
        ]
        lists = {key: [name(node) for node in getattr(self, key)] for key in ("order", "keeping", "shrinking", "freed")}
        recomputed = {name(node) for node in self.recomputed}
        lines = {name(node): size for node, size in self.offloaded_lines.items()}
        return replace(self, targets=targets, recomputed=recomputed, offloaded_lines=lines, **lists)


@dataclass
class Apply:
    """An operator applied to all of its inputs. freed: as of `Pass`. eagerly: it is the program's own. in_place: it has
    its result in the memory of the map that it was called to write to."""

    node: Node
    freed: list[Node]
    work: int
    eagerly: bool = False
    in_place: bool = False

    def renamed(self, name: Callable[[Any], Any]) -> Apply:
        """The same for another node."""
        return replace(self, node=name(self.node), freed=[name(node) for node in self.freed])


@dataclass
class InTurn:
    """Attention of a rank's queries to all keys and values, which lie in bands: pieces of these go from rank to rank.

    target: what it gives. keys, queries: how many of a band meet at once. freed, work: as of `Pass`.
    """

    target: Target
    keys: int
    queries: int
    freed: list[Node]
    work: int

    def renamed(self, name: Callable[[Any], Any]) -> InTurn:
        """The same for another node."""
        target = replace(self.target, node=name(self.target.node))
        return replace(self, target=target, freed=[name(node) for node in self.freed])


@dataclass
class Schedule:
    """What is done, and what that takes.

    peak: bytes of the device expected at once, beyond arguments and weights. stored: of these, of maps. offloaded:
    bytes of maps and line buffers that are offloaded. offloaded_at_once: of these, at one time. work: bytes of maps
    computed in all. seconds: reckoned, for comparison alone. recomputable_sizes: of maps that could be recomputed
    wherever they are read. could_be_halved: a pass has line buffers that weigh much, and could be parted.
    """

    steps: list[Union[Pass, Apply, InTurn]] = field(default_factory=list)
    peak: int = 0
    stored: int = 0
    offloaded: int = 0
    offloaded_at_once: int = 0
    work: int = 0
    seconds: float = 0.0
    recomputable_sizes: set[int] = field(default_factory=set)
    could_be_halved: bool = False

    def renamed(self, name: Callable[[Any], Any]) -> Schedule:
        """The same schedule for a graph that is alike. name: gives the other node for each."""
        return replace(self, steps=[step.renamed(name) for step in self.steps])
