"""Which input rows a strip of a convolution's output needs. Integers only.

"Row" means a position along the axis that is cut: height for 2-D and 3-D convolutions, length for 1-D.
All formulas follow from one: output row `o` reads input rows `o * stride - before + dilation * t`, `0 <= t < kernel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain


@dataclass(frozen=True)
class Window:
    """The input rows of one output strip.

    rows: input rows to read, in order. A `range` is a slice of the input; a tuple has to be gathered.
    before, after: rows of zeros to add in front of and behind them.
    skip: output rows of the result that come before the strip and are dropped.
    """

    rows: range | tuple[int, ...]
    before: int = 0
    after: int = 0
    skip: int = 0


@dataclass(frozen=True)
class Axis:
    """A convolution along one axis: kernel, stride and dilation in rows, and the padding at either end."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        if min(self.kernel, self.stride, self.dilation) < 1 or min(self.before, self.after) < 0:
            raise ValueError(
                f"kernel {self.kernel}, stride {self.stride} and dilation {self.dilation} must be at least 1 and "
                f"padding ({self.before}, {self.after}) at least 0."
            )

    @classmethod
    def of(cls, kernel: int, stride: int, dilation: int, padding: int | str | Sequence[int]) -> Axis:
        """An axis from a convolution's own arguments.

        padding: a number for both ends, a pair for each, `"valid"`, or `"same"`, which for an even span gives the odd
        row to the end, as PyTorch does. Raises ValueError for another string, and for `"same"` with a stride.
        """
        if padding == "valid":
            return cls(kernel, stride, dilation)
        if padding == "same":
            if stride != 1:
                raise ValueError(f"padding 'same' needs stride 1, not {stride}.")
            total = dilation * (kernel - 1)
            return cls(kernel, stride, dilation, total // 2, total - total // 2)
        if isinstance(padding, str):
            raise ValueError(f"padding {padding!r} is unknown: use a number, 'same' or 'valid'.")
        before, after = (padding, padding) if isinstance(padding, int) else padding
        return cls(kernel, stride, dilation, before, after)

    @property
    def span(self) -> int:
        """Input rows between the first and the last that one output row reads, both included."""
        return self.dilation * (self.kernel - 1) + 1

    def output_size(self, size: int) -> int:
        """Output rows for `size` input rows; 0 where the kernel does not fit."""
        return max(0, (size + self.before + self.after - self.span) // self.stride + 1)

    def reach(self, first: int, last: int) -> tuple[int, int]:
        """Input rows `[low, high)` of output rows `[first, last)`; padding counts as rows below 0 and past the end."""
        low = first * self.stride - self.before
        return low, low + (last - 1 - first) * self.stride + self.span

    def window(self, first: int, last: int, size: int, mode: str = "zeros") -> Window:
        """The rows that output rows `[first, last)` of an input of `size` rows need, and the zeros around them.

        mode: `zeros`, `reflect`, `replicate` or `circular`, as in `torch.nn.Conv2d`'s `padding_mode`.
        """
        low, high = self.reach(first, last)
        if mode != "zeros" and (low < 0 or high > size):
            return Window(tuple(padded_row(row, size, mode) for row in range(low, high)))
        start, stop = (min(max(edge, 0), size) for edge in (low, high))
        before = min(high, 0) - min(low, 0)
        after = max(high, size) - max(low, size)
        return Window(range(start, stop), before, after)

    def opaque_window(self, first: int, last: int, size: int) -> Window:
        """The rows that `window` gives, for a convolution that pads its input itself, in a way that is not known.

        Away from the image's edges the strip gets spare rows, so that whatever is padded on only reaches output rows
        that are dropped. At an edge it gets the rows at both ends of the image and nothing in between: a short image
        whose padding, of whatever mode, is that of the long one.
        """
        padding = self.before + self.after
        low, high = first * self.stride - padding, (last - 1) * self.stride + self.span  # however it is shared out
        edge = 2 * padding + 1  # rows enough for reflect and circular padding at either end
        spare = -(-padding // self.stride)
        start = (first - spare) * self.stride
        if start >= 0 and max(high, start + edge) <= size:
            return Window(range(start, max(high, start + edge)), skip=spare)
        at_bottom = high > size
        if at_bottom:
            tail = min(low, size - edge)
            head = edge + (tail - edge) % self.stride
        else:
            head = max(high, edge)
            tail = size - edge - (size - edge - head) % self.stride
        if head >= tail:
            return Window(range(size), skip=first)
        skip = first - (tail - head) // self.stride if at_bottom else first
        return Window(tuple(chain(range(head), range(tail, size))), skip=skip)

    @property
    def opaque_rows(self) -> int:
        """Input rows at most that `opaque_window` gives beyond the stride's share of each output row."""
        return self.span + 5 * (self.before + self.after) + 2 * self.stride + 2


def padded_row(row: int, size: int, mode: str) -> int:
    """The input row that `padding_mode` puts at `row`, which may lie outside `[0, size)`."""
    if mode == "replicate":
        return min(max(row, 0), size - 1)
    if mode == "circular":
        return row % size
    if mode == "reflect":
        return -row if row < 0 else row if row < size else 2 * (size - 1) - row
    raise ValueError(f"padding_mode {mode!r} is unknown: use 'zeros', 'reflect', 'replicate' or 'circular'.")


def strips(size: int, rows: int) -> Iterator[tuple[int, int]]:
    """`[first, last)` of strips of `rows` rows that cover `size` rows; only the last one may be shorter.

    Equal strips, because some backends search a kernel for each new shape. Raises ValueError for fewer than 1 row.
    """
    _check_rows(rows)
    return ((first, min(first + rows, size)) for first in range(0, size, rows))


def equal_strips(size: int, rows: int) -> list[tuple[int, int]]:
    """The strips of `strips`, but all of `rows` rows: the last one starts earlier and overlaps its neighbour."""
    _check_rows(rows)
    return [(min(first, max(size - rows, 0)), min(first + rows, size)) for first in range(0, size, rows)]


def _check_rows(rows: int) -> None:
    if rows < 1:
        raise ValueError(f"strips of {rows} rows are impossible: use at least 1.")
