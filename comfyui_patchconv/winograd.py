"""A convolution with half of the multiplications along the rows: Winograd's F(4, 3).

Four output rows of a kernel of three rows are made of six products instead of twelve (Lavin and Gray 2015, "Fast
algorithms for convolutional neural networks", 4.3), each a convolution whose kernel is one row high.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

ROWS = 4
"""Output rows that are made together."""

PRODUCTS = 6
"""What they are made of."""

Convolve = Callable[[Tensor, Tensor, Optional[Tensor]], Tensor]
"""Convolves a tensor by a kernel and adds a bias, without padding along the rows."""


def kernels(weight: Tensor, dim: int) -> list[Tensor]:
    """The six kernels of one row, in float32, of a `weight` of three rows along `dim`."""
    top, middle, bottom = (row.float().contiguous() for row in weight.split(1, dim))
    ends = top + bottom
    even = (top / 4).add_(bottom).div_(6)
    odd = middle / 12
    return [top / 4, (ends + middle).div_(-6), ends.sub_(middle).div_(-6), even + odd, even.sub_(odd), bottom]


def convolve(input: Tensor, kernels: Sequence[Tensor], bias: Optional[Tensor], dim: int, convolve: Convolve) -> Tensor:
    """Every four output rows, along `dim`, of the convolution by the `kernels` of one weight.

    input: float32, two rows more than a multiple of `ROWS`.
    """
    count = input.shape[dim] - 2
    before = (slice(None),) * dim
    rows = [input[(*before, slice(first, first + count, ROWS))] for first in range(PRODUCTS)]
    far, near = torch.sub(rows[4], rows[2], alpha=4), torch.sub(rows[3], rows[1], alpha=4)
    mixed = far + near
    first = convolve(mixed, kernels[1], bias)  # every row has this product in it once
    second = convolve(torch.sub(far, near, out=mixed), kernels[2], None)
    sides = [*first.shape[:dim], count, *first.shape[dim + 1 :]]
    result = torch.empty(sides, dtype=first.dtype, device=first.device)
    out = [result[(*before, slice(place, None, ROWS))] for place in range(ROWS)]
    even, odd = first + second, first.sub_(second)

    torch.sub(rows[4], rows[2], out=far)
    torch.sub(rows[3], rows[1], out=near)
    first = convolve(torch.add(far, near, alpha=2, out=mixed), kernels[3], None)
    second = convolve(torch.sub(far, near, alpha=2, out=mixed), kernels[4], None)
    total, difference = first + second, first.sub_(second)
    torch.add(odd, difference, alpha=2, out=out[1])
    torch.add(even, total, alpha=4, out=out[2])

    torch.sub(rows[4], rows[2], alpha=5, out=mixed).add_(rows[0], alpha=4)
    torch.add(even.add_(total), convolve(mixed, kernels[0], None), out=out[0])
    torch.sub(rows[5], rows[3], alpha=5, out=mixed).add_(rows[1], alpha=4)
    torch.add(odd.add_(difference, alpha=8), convolve(mixed, kernels[5], None), out=out[3])
    return result
