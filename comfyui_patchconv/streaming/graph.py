"""Computations on feature maps that have not been carried out yet, row by row.

A `Node` is a feature map `[N, C, H, W]` or `[N, C, D, H, W]`: stored, or a step that can compute any of its rows from
rows of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import Optional
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import Axis, padded_row
from .attention import attend
from .rows import Rows, Statistics, in_float64
from .run import Run

Piece = Callable[[Sequence[Tensor]], Tensor]


class Step:
    """How rows of a map come from rows of its inputs.

    workspace: bytes that it takes while it computes any number of rows, beside those and what it computes them from.
    weight_bytes: bytes that are read for any number of rows. least_rows: below which a device is not busy.
    moves: see `RowLocal`.
    """

    workspace = 0
    weight_bytes = 0
    least_rows = 1
    moves = False

    def needs(self, first: int, last: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """For each input, of `sizes` rows, the rows that output rows `[first, last)` read: none beyond its edges."""
        return [(first, last)] * len(sizes)

    def compute(self, first: int, last: int, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Output rows `[first, last)` from the rows of `needs`."""
        raise NotImplementedError


class RowLocal(Step):
    """An operator that treats each row by itself: `function` of the same rows of every input.

    moves: it arranges values and computes none, so its rows are had anew from its inputs rather than kept.
    """

    def __init__(self, function: Piece, moves: bool = False) -> None:
        self.function, self.moves = function, moves

    def compute(self, first: int, last: int, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        return self.function(pieces)


class Blank(Step):
    """Rows of a map that nobody has written to yet, as `torch.empty` has them."""

    moves = True

    def __init__(self, like: Tensor, device: torch.device) -> None:
        self.like, self.device = like, device

    def compute(self, first: int, last: int, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        shape = (*self.like.shape[:-2], last - first, self.like.shape[-1])
        return torch.empty(shape, dtype=self.like.dtype, device=self.device)


class Narrow(RowLocal):
    """Some of a map's channels or frames: `count` of them from `first` on, along `dim`."""

    def __init__(self, dim: int, first: int, count: int) -> None:
        super().__init__(lambda pieces: pieces[0].narrow(dim, first, count), moves=True)
        self.dim, self.first = dim, first


class Join(RowLocal):
    """Maps one behind the other along `dim`, which is none of rows or columns, on the device of the result."""

    def __init__(self, dim: int, device: torch.device) -> None:
        super().__init__(lambda pieces: torch.cat([piece.to(device) for piece in pieces], dim), moves=True)
        self.dim = dim


class Convolve(Step):
    """A convolution or average with zero padding; `call` runs it on a piece whose rows are padded already."""

    def __init__(self, axis: Axis, call: Piece, weight_bytes: int = 0) -> None:
        self.axis, self.call, self.weight_bytes = axis, call, weight_bytes

    def needs(self, first: int, last: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
        return [_clipped(*self.axis.reach(first, last), sizes[0])]

    def compute(self, first: int, last: int, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        window = self.axis.window(first, last, sizes[0])
        piece = pieces[0].narrow(-2, 0, len(window.rows))
        if window.before or window.after:
            piece = F.pad(piece, (0, 0, window.before, window.after))
        return self.call([piece])


class ConvolveTransposed(Step):
    """A transposed convolution: input row i adds to the output rows `i * stride - before + dilation * t`, t < kernel.

    `call` runs it on a piece without padding along the rows. axis: of the convolution that it is the transpose of.
    """

    def __init__(self, axis: Axis, call: Piece, weight_bytes: int) -> None:
        self.axis, self.call, self.weight_bytes = axis, call, weight_bytes

    def needs(self, first: int, last: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
        axis = self.axis
        low, high = first + axis.before, last + axis.before
        # Where rows lie between those of two inputs, which no input reaches, both of these are read.
        start = min(-((axis.span - 1 - low) // axis.stride), low // axis.stride)
        return [_clipped(start, (high - 1) // axis.stride + 1 + (axis.stride > axis.span), sizes[0])]

    def compute(self, first: int, last: int, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        ((low, _),) = self.needs(first, last, sizes)
        return self.call(pieces).narrow(-2, first - low * self.axis.stride + self.axis.before, last - first)


class Resample(Step):
    """Each `down` input rows become `up` output rows: upsampling, pixel shuffle, which need no other rows.

    halo: how many rows beside them `call` reads all the same, as smooth upsampling does; `down` is 1 then. nearest: the
    factors of every side, first side first, where it is nearest upsampling.
    """

    def __init__(self, up: int, down: int, call: Piece, halo: int = 0, nearest: tuple[float, ...] = ()) -> None:
        self.up, self.down, self.call, self.halo, self.nearest = up, down, call, halo, nearest

    def needs(self, first: int, last: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
        low, high = first // self.up * self.down, ((last - 1) // self.up + 1) * self.down
        return [_clipped(low - self.halo, high + self.halo, sizes[0])]

    def compute(self, first: int, last: int, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        ((low, _),) = self.needs(first, last, sizes)
        return self.call(pieces).narrow(-2, first - low // self.down * self.up, last - first)


class Normalise(Step):
    """Group normalisation: with statistics of the whole map known, one multiply-add per channel."""

    def __init__(self, groups: int, weight: Optional[Tensor], bias: Optional[Tensor], eps: float) -> None:
        self.groups, self.weight, self.bias, self.eps = groups, weight, bias, eps
        self.prepared = False
        self._line: Optional[tuple[Tensor, Tensor]] = None

    def prepare(self, node: Node) -> None:
        """Take the statistics of the input, `node`; in a dry run there are none."""
        self.prepared = True
        if node.run.dry:
            return
        statistics, channels, dims = node.statistics[self.groups], node.shape[1], len(node.shape)
        scale = (statistics.variance + self.eps).rsqrt()
        shift = -statistics.mean * scale
        scale, shift = (value.repeat_interleave(channels // self.groups, 1) for value in (scale, shift))
        if self.weight is not None:
            scale, shift = scale * in_float64(self.weight), shift * in_float64(self.weight)
        if self.bias is not None:
            shift = shift + in_float64(self.bias)
        wide = torch.promote_types(node.dtype, torch.float32)
        scale, shift = (value.to(wide).reshape(*value.shape, *(1,) * (dims - 2)) for value in (scale, shift))
        scale, shift = scale.to(node.device), shift.to(node.device)
        self._line = scale, shift

    def compute(self, first: int, last: int, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        assert self._line is not None
        scale, shift = self._line
        return torch.addcmul(shift, pieces[0].to(scale.dtype), scale).to(pieces[0].dtype)


class Attend(Step):
    """Scaled dot-product attention between all pixels: any rows of the queries with all keys and values.

    Inputs are queries, keys and values `[B, C, H, W]` of `heads` heads; once prepared, the queries alone.
    """

    def __init__(self, heads: int, scale: Optional[float]) -> None:
        self.heads, self.scale = heads, scale
        self.prepared = False
        self._others: list[Rows] = []

    def prepare(self, *others: Rows) -> None:
        """Take keys and values, `[B, pixels, C]` each."""
        self.prepared = True
        self._others = list(others)

    def compute(self, first: int, last: int, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        (piece,) = pieces
        queries = self._split(piece.flatten(2).transpose(1, 2).contiguous())
        keys, values = (self._split(tokens.whole()) for tokens in self._others)
        tokens = attend(queries, keys, values, self.scale)
        return tokens.transpose(2, 3).reshape(piece.shape[0], -1, *piece.shape[2:])

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


class UpsampledConvolve(Step):
    """Nearest 2x upsampling and a 3x3 convolution with padding 1 behind it, as four 2x2 convolutions of the small map.

    Each output pixel sees at most 2x2 different small pixels; which of the kernel's rows and columns fall on the same
    one depends on whether it is even or odd. 2.25 times fewer multiplications, and no upsampled map.
    `call(piece, kernel)` convolves without bias, with a padding of 1 at the left and the right. kernels: what
    `summed_kernels` makes of the weight.
    """

    def __init__(
        self, kernels: list[list[Tensor]], bias: Optional[Tensor], call: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.kernels = kernels
        self.weight_bytes = 4 * self.kernels[0][0].nbytes
        self.bias, self.call = bias, call

    def needs(self, first: int, last: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
        return [_clipped(first // 2 - 1, (last - 1) // 2 + 2, sizes[0])]

    def compute(self, first: int, last: int, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        low, high = first // 2, (last - 1) // 2 + 1
        piece, edges = pieces[0], (0, 0, int(low == 0), int(high == sizes[0]))
        piece = F.pad(piece, edges) if any(edges) else piece
        rows, width = high - low, piece.shape[-1]
        output: Optional[Tensor] = None
        for y in (0, 1):
            for x in (0, 1):
                part = self.call(piece.narrow(-2, y, rows + 1), self.kernels[y][x])
                if output is None:
                    output = part.new_empty((*part.shape[:-2], 2 * rows, 2 * width))
                output[..., y::2, x::2] = part[..., x : x + width]
        assert output is not None
        if self.bias is not None:
            output += self.bias.view(-1, 1, 1)
        return output.narrow(-2, first - 2 * low, last - first)


def summed_kernels(weight: Tensor) -> list[list[Tensor]]:
    """The four 2x2 kernels of a 3x3 kernel: `[odd row][odd column]` of the output."""
    return [[_summed(weight, y, x) for x in (0, 1)] for y in (0, 1)]


def _summed(weight: Tensor, odd_row: int, odd_column: int) -> Tensor:
    """The 2x2 kernel that a 3x3 kernel is for output pixels of odd or even places, summed in float64 part by part."""
    rows, columns = (((0, 1), (1, 3)) if not odd else ((0, 2), (2, 3)) for odd in (odd_row, odd_column))
    kernel = weight.new_empty((*weight.shape[:2], 2, 2))
    for part, whole in zip(kernel.split(64), weight.split(64)):
        wide = in_float64(whole)
        for y, (top, bottom) in enumerate(rows):
            for x, (left, right) in enumerate(columns):
                part[..., y, x] = wide[..., top:bottom, left:right].sum((-2, -1)).to(weight.dtype)
    return kernel


class Pad(Step):
    """Padding with `before` rows at the top and `after` below, in any mode but circular.

    `call` pads a piece on its other sides. mode: `constant` (with `value`), `reflect` or `replicate`.
    """

    moves = True

    def __init__(self, before: int, after: int, mode: str, value: float, call: Piece) -> None:
        self.before, self.after, self.mode, self.value, self.call = before, after, mode, value, call

    def needs(self, first: int, last: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
        low, high = first - self.before, last - self.before
        if self.mode == "reflect":  # the rows at either end are read backwards
            low = 0 if low < self.before else min(low, sizes[0] - 1 - self.after)
            high = max(high, self.before + 1)
        return [_clipped(low, high, sizes[0])]

    def compute(self, first: int, last: int, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        size, ((start, _),) = sizes[0], self.needs(first, last, sizes)
        low, high = first - self.before, last - self.before
        if self.mode == "constant":
            inside = max(min(high, size) - max(low, 0), 0)
            above, below = min(high, 0) - min(low, 0), max(high, size) - max(low, size)
            piece = F.pad(pieces[0].narrow(-2, 0, inside), (0, 0, above, below), value=self.value)
        else:
            rows = [padded_row(row, size, self.mode) - start for row in range(low, high)]
            piece = pieces[0].index_select(-2, torch.tensor(rows, device=pieces[0].device))
        return self.call([piece])


class Wrap(Step):
    """Circular padding: before the first row come the last `before` rows, after the last one the first `after`.

    `call` pads a piece on its other sides. The rows at either end are taken from the stored map beforehand, so that it
    is read from top to bottom all the same.
    """

    def __init__(self, before: int, after: int, call: Piece) -> None:
        self.before, self.after, self.call = before, after, call
        self.prepared = False
        self._ends: list[Tensor] = []

    def prepare(self, node: Node) -> None:
        """Take the rows at either end of the input, `node`, which is stored; in a dry run there are none."""
        self.prepared = True
        if not node.run.dry:
            assert node.rows is not None
            height = node.height
            ends = ((height - self.before, height), (0, self.after))
            self._ends = [node.rows.read(low, high).clone() for low, high in ends if low < high]

    def needs(self, first: int, last: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
        return [_clipped(first - self.before, last - self.before, sizes[0])]

    def compute(self, first: int, last: int, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        size, low, high = sizes[0], first - self.before, last - self.before
        parts = []
        if low < 0:
            parts.append(self._ends[0].narrow(-2, first, min(high, 0) - low))
        if max(low, 0) < min(high, size):
            parts.append(pieces[0])
        if high > size:
            start = max(low, size)
            parts.append(self._ends[-1].narrow(-2, start - size, high - start))
        return self.call([parts[0] if len(parts) == 1 else torch.cat(parts, -2)])


def _clipped(low: int, high: int, size: int) -> tuple[int, int]:
    """The rows of `[low, high)` that exist; one row of the image where none of them does."""
    low = min(max(low, 0), size - 1)
    return low, max(min(high, size), low + 1)


_serials = count()


class Node:
    """A feature map: `rows` once it is stored, else `step` and `inputs`.

    users: live tensors and nodes that refer to it; it decides when a stored map may be given up row by row. readers:
    the nodes among them, as long as others refer to these. serial: a number that is higher than those of all nodes
    before it.
    """

    def __init__(
        self,
        run: Run,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        step: Optional[Step] = None,
        inputs: Sequence[Node] = (),
        rows: Optional[Rows] = None,
    ) -> None:
        self.run, self.shape, self.dtype, self.device = run, tuple(shape), dtype, device
        self.step, self.rows, self.serial = step, rows, next(_serials)
        self.inputs: tuple[Node, ...] = tuple(inputs)
        self.statistics: dict[int, Statistics] = {}
        self.users = 0
        self.readers: WeakSet[Node] = WeakSet()
        for node in self.inputs:
            node.users += 1
            node.readers.add(self)

    @classmethod
    def of(cls, tensor: Tensor, run: Run, counted: bool = True, of_map: bool = True) -> Node:
        """A stored node of a tensor that is there already; see `Rows.of`."""
        rows = Rows.of(tensor, run, counted, of_map=of_map)
        return cls(run, tensor.shape, tensor.dtype, tensor.device, rows=rows)

    def then(self, step: Step, shape: Sequence[int], dtype: Optional[torch.dtype] = None) -> Node:
        """What `step` makes of this map alone."""
        return Node(self.run, shape, dtype or self.dtype, self.device, step, [self])

    def __del__(self) -> None:
        self.let_go()

    def store(self, rows: Rows) -> None:
        """From now on the map is `rows`: it needs its inputs no longer."""
        self.let_go()
        self.step, self.rows = None, rows

    def let_go(self, first: int = 0) -> None:
        """Need the inputs from number `first` on no longer."""
        for node in self.inputs[first:]:
            node.users -= 1
        self.inputs = self.inputs[:first]

    @property
    def height(self) -> int:
        return self.shape[-2]

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.shape).numel() // max(self.height, 1) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        return self.row_bytes * self.height

    @property
    def sizes(self) -> list[int]:
        return [node.height for node in self.inputs]
