"""How rows of a tensor come from rows of others: the steps that operators are recorded as.

Each knows, in integers, which input rows some output rows are made of (`needs`), and makes them (`compute`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm, prod
from typing import Optional, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ...conv.halo import Axis
from ...conv.onednn import channels_together
from .node import Span, Step

Pieces = Sequence[Tensor]


def rows_of(values: Tensor, dim: int, first: int, last: int) -> Tensor:
    """Rows `[first, last)` along `dim`: the tensor itself where these are all."""
    return values if (first, last) == (0, values.shape[dim]) else values.narrow(dim, first, last - first)


class RowLocal(Step):
    """An operator that treats each row by itself: `function(pieces, first, last)` of the same rows of every input.

    count: how many inputs are read row by row.
    """

    def __init__(
        self, function: Callable[[Pieces, int, int], Tensor], count: int, *, cheap: bool = False, moves: bool = False
    ) -> None:
        self.function, self.count, self.cheap, self.moves = function, count, cheap or moves, moves

    def needs(self, first: int, last: int) -> Sequence[Span]:
        return ((first, last),) * self.count

    def compute(self, first: int, last: int, pieces: Pieces) -> Tensor:
        return self.function(pieces, first, last)


class Cast(RowLocal):
    """Another type or device. widens: the values are what they were, in more bytes."""

    samples = (True,)

    def __init__(self, function: Callable[[Pieces, int, int], Tensor], widens: bool) -> None:
        super().__init__(function, 1, cheap=True)
        self.widens = widens


class ScaleAndShift(RowLocal):
    """Each channel times its factor, and what is added to it: a norm whose statistics are known.

    Its second input, read whole, is `[4, N·C]`: rows of what is subtracted first (0 but on a CPU), of 1, the factors,
    and what is added.
    """

    samples = True, True

    def __init__(self, function: Callable[[Pieces, int, int], Tensor]) -> None:
        super().__init__(function, 1, cheap=True)


class Whole(Step):
    """An operator of which nothing is known but its result's shape: `function` of all of its inputs at once."""

    takes_all = True

    def __init__(self, function: Callable[[Pieces], Tensor]) -> None:
        self.function = function

    def needs(self, first: int, last: int) -> Sequence[Span]:
        return ()

    def compute(self, first: int, last: int, pieces: Pieces) -> Tensor:
        return self.function(pieces)


class Accumulator(Protocol):
    """Gathers a reduction, rows by rows. numbers: how many `state` has, whatever the rows were."""

    numbers: int

    def add(self, piece: Tensor) -> None:
        """The next rows, or any others."""
        ...

    def state(self) -> Tensor:
        """What it has gathered, `[numbers]` of 8 bytes each on the CPU; the first is 0 while that is nothing."""
        ...

    def merge(self, states: Sequence[Tensor]) -> None:
        """Have gathered what those have whose states these are, in this order, and nothing else."""
        ...

    def result(self, like: Tensor) -> None:
        """Write the result to `like`."""
        ...


class Reduce(Step):
    """What comes of all rows and takes little room itself: statistics, means over the image. `start()` gathers it.

    moments: it gathers the moments of the rows as they are. part: the same of an input of so many samples, and the
    shape of its result; None where samples are mixed.
    """

    reduces = True

    def __init__(
        self, start: Callable[[], Accumulator], moments: bool = False,
        part: Optional[Callable[[int], tuple[Reduce, tuple[int, ...]]]] = None,
    ) -> None:  # fmt: skip
        self.start, self.moments, self.part = start, moments, part
        self.samples = None if part is None else (True,)

    def needs(self, first: int, last: int) -> Sequence[Span]:
        return ((first, last),)


class Convolve(Step):
    """A convolution or a pool along `axis`, whose rows lie along `dim`.

    `call` gets its input's rows, padded already, and what else it reads.
    """

    def __init__(
        self, axis: Axis, rows: int, dim: int, call: Callable[[Pieces], Tensor], *, weight_bytes: int = 0,
        work: int = 1, fill: float = 0.0,
    ) -> None:  # fmt: skip
        self.axis, self.rows, self.dim, self.call, self.fill = axis, rows, dim, call, fill
        self.weight_bytes, self.work, self.overlap = weight_bytes, work, max(axis.span - axis.stride, 0)
        self.block = channels_together() if weight_bytes else 1
        self.pads = sum(self.edges(0, axis.output_size(rows)))

    def needs(self, first: int, last: int) -> Sequence[Span]:
        low, high = self.axis.reach(first, last)
        low = min(max(low, 0), self.rows)
        return ((low, min(max(high, low), self.rows)),)

    def edges(self, first: int, last: int) -> tuple[int, int]:
        """How many rows of padding lie above and below the input rows of output rows `[first, last)`."""
        low, high = self.axis.reach(first, last)
        return min(high, 0) - min(low, 0), max(high, self.rows) - max(low, self.rows)

    def compute(self, first: int, last: int, pieces: Pieces) -> Tensor:
        return self.call([padded(pieces[0], self.dim, *self.edges(first, last), self.fill), *pieces[1:]])


def padded(piece: Tensor, dim: int, above: int, below: int, value: float = 0.0) -> Tensor:
    """`piece` with so many rows of `value` before and behind it."""
    if not above and not below:
        return piece
    return F.pad(piece, (0, 0) * (piece.dim() - 1 - dim) + (above, below), value=value)


class ConvolveTransposed(Step):
    """A transposed convolution: input row i adds to the output rows `i * stride - before + dilation * t`, t < kernel.

    `call` runs it on a piece without padding along the rows. axis: of the convolution that it is the transpose of.
    """

    def __init__(
        self, axis: Axis, rows: int, dim: int, call: Callable[[Pieces], Tensor], *, weight_bytes: int, work: int
    ) -> None:
        self.axis, self.rows, self.dim, self.call = axis, rows, dim, call
        self.weight_bytes, self.work, self.block = weight_bytes, work, channels_together()

    def needs(self, first: int, last: int) -> Sequence[Span]:
        axis = self.axis
        low, high = first + axis.before, last + axis.before
        # Where rows lie between those of two inputs, which no input reaches, both of these are read.
        start = min(-((axis.span - 1 - low) // axis.stride), low // axis.stride)
        stop = (high - 1) // axis.stride + 1 + (axis.stride > axis.span)
        start = min(max(start, 0), max(self.rows - 1, 0))
        return ((start, max(min(stop, self.rows), start + 1)),)

    def compute(self, first: int, last: int, pieces: Pieces) -> Tensor:
        ((low, _),) = self.needs(first, last)
        return self.call(pieces).narrow(self.dim, first - low * self.axis.stride + self.axis.before, last - first)


class Resample(Step):
    """Each `down` input rows become `up` output rows: upsampling, pixel shuffle, which need no other rows.

    halo: how many rows beside them `call` reads all the same, as smooth upsampling does; `down` is 1 then. repeats: see
    `Step`.
    """

    def __init__(
        self, up: int, down: int, rows: int, dim: int, call: Callable[[Tensor], Tensor], *, halo: int = 0,
        cheap: bool = False, repeats: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.up, self.down, self.rows, self.dim, self.call = up, down, rows, dim, call
        self.halo, self.cheap, self.repeats = halo, cheap, tuple(repeats)

    def needs(self, first: int, last: int) -> Sequence[Span]:
        if first >= last:
            return ((0, 0),)
        low, high = first // self.up * self.down, ((last - 1) // self.up + 1) * self.down
        return ((max(low - self.halo, 0), min(high + self.halo, self.rows)),)

    def compute(self, first: int, last: int, pieces: Pieces) -> Tensor:
        ((low, _),) = self.needs(first, last)
        start = first - low // self.down * self.up
        return rows_of(self.call(pieces[0]), self.dim, start, start + last - first)


class Windows(Step):
    """Each output row is made of a window of input rows, whose first and last are in proportion: an adaptive pool.

    rows, made: of the input and of the output. pool: makes one row of a window. work: see `Step`.
    """

    def __init__(self, rows: int, made: int, dim: int, pool: Callable[[Tensor], Tensor], work: int) -> None:
        self.rows, self.made, self.dim, self.pool, self.work = rows, made, dim, pool, work

    def needs(self, first: int, last: int) -> Sequence[Span]:
        return ((first * self.rows // self.made, -(-last * self.rows // self.made)) if first < last else (0, 0),)

    def compute(self, first: int, last: int, pieces: Pieces) -> Tensor:
        ((offset, _),) = self.needs(first, last)
        windows = [self.needs(row, row + 1)[0] for row in range(first, last)]
        made = [self.pool(rows_of(pieces[0], self.dim, low - offset, high - offset)) for low, high in windows]
        return torch.cat(made, self.dim)


class Regroup(Step):
    """Dimensions split and merged: what `reshape` does, where rows of one side are rows of the other.

    One input row has `inner_in` elements to one output row's `inner_out` in the dimensions that take part.
    from_dim, to_dim: where the rows lie. shape: the result's.
    """

    cheap = moves = True
    samples = (True,)

    def __init__(self, from_dim: int, to_dim: int, inner_in: int, inner_out: int, shape: Sequence[int]) -> None:
        unit = lcm(inner_in, inner_out)
        self.unit_in, self.unit_out = unit // inner_in, unit // inner_out
        self.from_dim, self.to_dim, self.shape = from_dim, to_dim, list(shape)

    def needs(self, first: int, last: int) -> Sequence[Span]:
        return ((first // self.unit_out * self.unit_in, -(-last // self.unit_out) * self.unit_in),)

    def compute(self, first: int, last: int, pieces: Pieces) -> Tensor:
        low, high = first // self.unit_out * self.unit_out, -(-last // self.unit_out) * self.unit_out
        shape = [*self.shape[: self.to_dim], high - low, *self.shape[self.to_dim + 1 :]]
        return rows_of(pieces[0].reshape(shape), self.to_dim, first - low, last - low)

    @classmethod
    def between(cls, shape: Sequence[int], dim: int, to: Sequence[int]) -> Optional[Regroup]:
        """From rows along `dim` of a tensor of `shape` to one of shape `to`; None where no rows go with its rows."""
        if prod(shape) == 0 or prod(shape) != prod(to):
            return None
        before, after = prod(shape[:dim]), prod(shape[dim + 1 :])
        for place in range(len(to)):
            if prod(to[:place]) == before and to[place] > 1:
                inner = prod(to[place + 1 :])
                step = cls(dim, place, after, inner, to)
                if step.unit_out <= to[place] and to[place] % step.unit_out == 0 and shape[dim] % step.unit_in == 0:
                    return step
                return None
        return None


class Pick(Step):
    """Every `stride`-th row from row `start` on."""

    cheap = moves = True
    samples = (True,)

    def __init__(self, start: int, stride: int, dim: int) -> None:
        self.start, self.stride, self.dim = start, stride, dim

    def needs(self, first: int, last: int) -> Sequence[Span]:
        low = self.start + first * self.stride
        return ((low, low + (last - 1 - first) * self.stride + 1 if last > first else low),)

    def compute(self, first: int, last: int, pieces: Pieces) -> Tensor:
        if self.stride == 1:
            return pieces[0]
        return pieces[0][(slice(None),) * self.dim + (slice(None, None, self.stride),)]


class Overlay(Step):
    """A tensor of which every `stride`-th of the rows from `start` to `stop` is replaced by those of another.

    The second input has those rows; where `single` it has no such dimension, but is one row, read whole.
    """

    cheap = True
    samples = True, True

    def __init__(self, start: int, stop: int, stride: int, dim: int, single: bool = False) -> None:
        self.start, self.stop, self.stride, self.dim, self.single = start, stop, stride, dim, single

    def _rows(self, first: int, last: int) -> Span:
        """Of the other, the rows that lie within output rows `[first, last)`."""
        count = -(-(self.stop - self.start) // self.stride)
        low = min(max(-((self.start - first) // self.stride), 0), count)
        return low, min(max(-((self.start - last) // self.stride), low), count)

    def needs(self, first: int, last: int) -> Sequence[Span]:
        return ((first, last),) if self.single else ((first, last), self._rows(first, last))

    def compute(self, first: int, last: int, pieces: Pieces) -> Tensor:
        low, high = self._rows(first, last)
        if low == high:
            return pieces[0]
        result = pieces[0].clone()
        start = self.start + low * self.stride - first
        rows = slice(start, start + (high - 1 - low) * self.stride + 1, self.stride)
        part = result[(slice(None),) * self.dim + (rows,)]
        part.copy_(pieces[1].unsqueeze(self.dim) if self.single else pieces[1])
        return result


class Join(Step):
    """Tensors one below the other, along the rows. sizes: rows of each."""

    cheap = moves = True

    def __init__(self, sizes: Sequence[int], dim: int) -> None:
        self.sizes, self.dim = list(sizes), dim

    def needs(self, first: int, last: int) -> Sequence[Span]:
        spans, begin = [], 0
        for size in self.sizes:
            low = min(max(first - begin, 0), size)
            spans.append((low, min(max(last - begin, low), size)))
            begin += size
        return spans

    def compute(self, first: int, last: int, pieces: Pieces) -> Tensor:
        there = [piece for piece in pieces if piece.shape[self.dim]]
        return there[0] if len(there) == 1 else torch.cat(there or [pieces[0]], self.dim)


class Pad(Step):
    """Padding with `before` rows at the top and `after` below, in any mode but circular, along `dim`.

    `call` pads a piece on its other sides. mode: `constant` (with `value`), `reflect` or `replicate`. Negative padding
    cuts rows off.
    """

    moves = cheap = True

    def __init__(
        self, before: int, after: int, mode: str, value: float, rows: int, dim: int, call: Callable[[Tensor], Tensor]
    ) -> None:
        self.before, self.after, self.mode, self.value = before, after, mode, value
        self.rows, self.dim, self.call = rows, dim, call

    def needs(self, first: int, last: int) -> Sequence[Span]:
        low, high = first - self.before, last - self.before
        if self.mode == "reflect":  # the rows at either end are read backwards
            low = 0 if low < self.before else min(low, self.rows - 1 - self.after)
            high = max(high, self.before + 1)
        if self.mode != "constant":
            low, high = min(low, self.rows - 1), max(high, 1)
        low = min(max(low, 0), self.rows)
        return ((low, max(min(high, self.rows), low)),)

    def compute(self, first: int, last: int, pieces: Pieces) -> Tensor:
        ((start, _),) = self.needs(first, last)
        low, high = first - self.before, last - self.before
        if self.mode == "constant":
            above, below = min(high, 0) - min(low, 0), max(high, self.rows) - max(low, self.rows)
            return self.call(padded(pieces[0], self.dim, above, below, self.value))
        if low >= 0 and high <= self.rows:
            return self.call(pieces[0].narrow(self.dim, low - start, high - low))
        # Counted on the device: rows that come there from the host would have it wait.
        rows, bottom = torch.arange(low, high, device=pieces[0].device), self.rows - 1
        rows = rows.clamp(0, bottom) if self.mode == "replicate" else bottom - (bottom - rows.abs()).abs()
        return self.call(pieces[0].index_select(self.dim, rows - start))
