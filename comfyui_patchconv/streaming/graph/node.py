"""A recorded computation as a graph. Integers only: what a plan needs to know, and nothing that computes.

"Row" means a position along the one dimension in which a tensor comes in strips: the height of an image, the length of
a sound, the pixels of a token matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import count
from math import prod
from operator import attrgetter
from typing import Any, Optional, Protocol

Span = tuple[int, int]
"""Rows `[first, last)`."""


class Step:
    """How a tensor comes from others. What computes is in `steps`.

    cheap: recomputing it costs about what reading its result costs. moves: it arranges values and computes none.
    takes_all: it needs all of its inputs and gives all of its result at once. reduces: it takes rows and gives its
    result after the last. workspace: bytes that it takes, whatever the rows, beside those and what it computes them
    from. weight_bytes: bytes that are read for any number of rows. least_rows: below which a device is not busy.
    widened: how many times the bytes of its result it computes in. copies: of its input's rows, that it makes.
    bytes_beside: of what the program's own operator makes beside its result, as a pool of largest values their places.
    rows_together: so many rows at once take less work than one by one. work: multiplications for each element of the
    result. kernel_bytes: of what makes it faster, if it is kept from strip to strip. overlap: rows of its input that a
    row of its result and the one behind it both read. repeats: how many times in a row it gives each value of its only
    input, along each dimension, as nearest upsampling does, which is as cheap to make anew as to keep; () where it does
    anything else. samples: of each input, whether some samples of the result, which lie along the first dimension, are
    made of the same samples of it, however many; of the others all is read. None where samples are mixed, or that is
    not known. in_turn: it is attention, of its first input to its second and third, and these can come in pieces.
    block: channels that a CPU's backend has side by side in what it copies, in whole blocks. pads: rows of
    padding that it puts around its input, where all of them come at once.
    """

    name = ""
    cheap = moves = takes_all = reduces = in_turn = False
    workspace = weight_bytes = kernel_bytes = overlap = copies = bytes_beside = pads = 0
    least_rows = rows_together = widened = block = 1
    work = 1
    repeats: Sequence[int] = ()
    samples: Optional[Sequence[bool]] = None

    def needs(self, first: int, last: int) -> Sequence[Span]:
        """For each input that is read row by row, in order, the rows that output rows `[first, last)` are made of."""
        raise NotImplementedError

    def compute(self, first: int, last: int, pieces: Sequence[Any]) -> Any:
        """Output rows `[first, last)`. pieces: of each input the rows of `needs`, or all of one that is read whole."""
        raise NotImplementedError

    def begin(self) -> None:
        """Until `end` there is room for `kernel_bytes`."""

    def end(self) -> None:
        """All that was wanted is computed: what was kept for it is freed."""


class Eager(Protocol):
    """An operator as the program called it. args, kwargs: its tensors are nodes, or held. written: the node in whose
    memory it has its result, as operators have that write to their argument; None where it takes memory for it."""

    args: Any
    kwargs: dict[str, Any]
    written: Optional[Node]

    def inputs(self) -> Sequence[Node]:
        """The nodes among its arguments."""
        ...

    def compute(self, pieces: Sequence[Any], in_place: bool = False) -> Any:
        """What it gives for the values of these. in_place: those of `written` are lost."""
        ...


_serials = count()


class Node:
    """A tensor of the program: stored once `tensor` is there, else what `step` makes of `inputs`.

    dims: for each input, the dimension along which it is read row by row; None where it is read whole.
    dim: along which it comes in rows itself; None where it comes whole. eager: what gives all of it at once, as the
    program has it; None where `step` does that. home: memory that is there already, to which its rows may be written as
    they are computed; None for memory of its own. serial: the place in the program. strides: those of eager's result.
    in_bands: of several ranks, each is to have its band of it in the end, and none the whole.
    """

    __slots__ = (
        "__weakref__", "bytes", "device", "dim", "dims", "dtype", "eager", "home", "in_bands", "inputs", "itemsize",
        "row_bytes", "rows", "serial", "shape", "step", "strides", "tensor",
    )  # fmt: skip

    def __init__(
        self,
        step: Optional[Step],
        inputs: Sequence[Node],
        dims: Sequence[Optional[int]],
        *,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: Any,
        device: Any,
        itemsize: int,
        dim: Optional[int],
    ) -> None:
        self.step = step
        self.inputs: tuple[Node, ...] = tuple(inputs)
        self.dims: tuple[Optional[int], ...] = tuple(dims)
        self.shape, self.strides, self.dtype, self.device = tuple(shape), tuple(strides), dtype, device
        self.itemsize, self.dim, self.serial = itemsize, dim, next(_serials)
        self.bytes = prod(self.shape) * itemsize
        self.rows = self.shape[dim] if dim is not None else 1
        self.row_bytes = self.bytes // self.rows if self.rows else 0
        self.tensor: Any = None
        self.home: Any = None
        self.eager: Optional[Eager] = None
        self.in_bands = False

    @property
    def flexible(self) -> bool:
        """Whether rows of it can be read along any dimension: it is stored, or comes whole."""
        return self.tensor is not None or self.dim is None

    @property
    def by_rows(self) -> list[tuple[Node, int]]:
        """The inputs that are read row by row, and along which dimension."""
        return [(node, dim) for node, dim in zip(self.inputs, self.dims) if dim is not None]

    @property
    def shows(self) -> Optional[Node]:
        """The map that it is a part of, as that lies in memory, such as some frames of it; None for no map's."""
        return self.inputs[0] if self.step is not None and self.step.moves and len(self.inputs) == 1 else None

    def store(self, tensor: Any) -> None:
        """From now on it is `tensor`, and needs its inputs no longer."""
        self.tensor, self.step, self.eager, self.inputs, self.dims = tensor, None, None, (), ()


def dense_strides(shape: Sequence[int], strides: Sequence[int]) -> Optional[list[int]]:
    """Strides in the same order without gaps; None where places share memory."""
    if any(stride == 0 and side > 1 for stride, side in zip(strides, shape)):
        return None
    dense, size = list(strides), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (strides[dim], -dim)):
        if shape[dim] > 1:
            dense[dim] = size
            size *= shape[dim]
    return dense


def in_order(tensor: Any, strides: Sequence[int]) -> bool:
    """Whether places of a tensor follow each other in memory as `strides` have them, gaps left out of account."""
    wanted, own = (dense_strides(tensor.shape, one) for one in (strides, tensor.stride()))
    if wanted is None or own is None:
        return True
    return all(one == other or side <= 1 for one, other, side in zip(wanted, own, tensor.shape))


def ancestors(roots: Iterable[Node], stored: Collection[Node] = ()) -> list[Node]:
    """The nodes that are not stored and lead to `roots`, these included, in the program's order. stored: those that a
    plan has stored by then."""
    stack = [node for node in roots if node.tensor is None and node not in stored]
    found = set(stack)
    while stack:
        for source in stack.pop().inputs:
            if source not in found and source.tensor is None and source not in stored:
                found.add(source)
                stack.append(source)
    return sorted(found, key=attrgetter("serial"))
