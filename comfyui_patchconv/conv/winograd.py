"""A convolution with half of the multiplications along the rows: Winograd's F(4, 3).

Four output rows of a kernel of three rows are made of six products instead of twelve (Lavin and Gray 2015, "Fast
algorithms for convolutional neural networks", 4.3), each a convolution whose kernel is one row high. They are the
values of polynomials at 0, A, -A, B, -B and infinity. With the usual 1 and 2 the last row is off by three times as much
as a convolution of float32 is, with these none is by more than one and a half times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

from .doubled import empty_like

ROWS = 4
"""Output rows that are made together."""

PRODUCTS = 6
"""What they are made of."""

A, B = 11 / 16, 3 / 2
"""Numbers whose squares float32 has, too: what is multiplied by them is rounded once."""

Convolve = Callable[[Tensor, Tensor, Optional[Tensor]], Tensor]
"""Convolves a tensor by a kernel and adds a bias, without padding along the rows."""


def kernels(weight: Tensor, dim: int) -> list[Tensor]:
    """The six kernels of one row, in float32, of a `weight` of three rows along `dim`.

    Those of A and -A are multiplied by A², those of B and -B by B: `convolve` has less to multiply then.
    """
    top, middle, bottom = (row.float().contiguous() for row in weight.split(1, dim))
    made = [top / (A * A * B * B)]
    for at, other, factor in ((A, B, A * A), (B, A, B)):
        scale = factor / (2 * at * at * (at * at - other * other))
        even, odd = torch.add(top, bottom, alpha=at * at).mul_(scale), middle * (at * scale)
        made += [even + odd, even.sub_(odd)]
    return [*made, bottom]


def convolve(input: Tensor, kernels: Sequence[Tensor], bias: Optional[Tensor], dim: int, convolve: Convolve) -> Tensor:
    """Every four output rows, along `dim`, of the convolution by the `kernels` of one weight.

    input: float32, two rows more than a multiple of `ROWS`. The result is in its order, channels first or last.
    """
    count = input.shape[dim] - 2
    before = (slice(None),) * dim
    rows = [input[(*before, slice(first, first + count, ROWS))] for first in range(PRODUCTS)]

    def at(number: float, other: float, first: int) -> tuple[Tensor, Tensor]:
        """Sum and difference of the products for a number and its opposite."""
        far = torch.sub(rows[4], rows[2], alpha=other * other)
        near = torch.sub(rows[3], rows[1], alpha=other * other)
        plus = convolve(torch.add(far, near, alpha=number), kernels[first], None)
        minus = convolve(far.sub_(near, alpha=number), kernels[first + 1], None)
        return plus + minus, plus.sub_(minus)

    def outer(first: int, kernel: Tensor) -> Tensor:
        """The product for zero or for infinity, of every other row."""
        values = torch.sub(rows[first + 4], rows[first + 2], alpha=A * A + B * B)
        return convolve(values.add_(rows[first], alpha=A * A * B * B), kernel, bias)

    sum_a, difference_a = at(A, B, 1)
    sum_b, difference_b = at(B, A, 3)
    result = empty_like(input, [*sum_a.shape[:dim], count, *sum_a.shape[dim + 1 :]])
    out = [result[(*before, slice(place, None, ROWS))] for place in range(ROWS)]
    torch.add(difference_b, difference_a, alpha=1 / A, out=out[1])
    torch.add(sum_a, sum_b, alpha=B, out=out[2])
    if bias is not None:
        shift = bias.view(-1, *(1,) * (input.dim() - 2))
        out[1].add_(shift)
        out[2].add_(shift)
    torch.add(outer(0, kernels[0]).add_(sum_a, alpha=1 / (A * A)), sum_b, alpha=1 / B, out=out[0])
    torch.add(outer(1, kernels[5]).add_(difference_a, alpha=A), difference_b, alpha=B * B, out=out[3])
    return result


_UNLIKE = 16
"""How many times as large as another a row of four may be."""


def keeps_digits(result: Tensor, dim: int) -> bool:
    """Whether rows that were made together, along `dim`, are about as large as each other wherever one looks.

    They are added up before they are multiplied, so that the largest of them decides how exact all four are; with
    infinities none is.
    """
    sizes = (result * result).sum(1)  # over the channels
    four = sizes.unflatten(dim - 1, (-1, ROWS))
    largest, least = four.amax(dim), four.amin(dim)
    return bool((largest <= _UNLIKE**2 * least).all() & largest.sum().isfinite())
