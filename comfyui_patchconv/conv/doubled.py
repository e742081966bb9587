"""Nearest 2x upsampling and a 3x3 convolution behind it, of the small map: a quarter of the multiplications.

The three rows of an upsampled map that an output row is made of show two small ones. With the kernel's rows t, m, b an
even output row is `t x[i-1] + (m + b) x[i] = (t + m + b) x[i] - t (x[i] - x[i-1])`, the odd one below it
`(t + m + b) x[i] + b (x[i+1] - x[i])`. So it is with columns: of a map, its differences downwards and to the right, and
the differences of these, nine products make the four output pixels of a small one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from .onednn import of_pixels

_BLOCK_BYTES = 8 << 20
"""Bytes of output that are made at once; the products that they are added up from take two and a half times that."""


def kernels(weight: Tensor) -> list[Tensor]:
    """Four 1x1 kernels: for a map `[N, C, H, W]`, its horizontal, its vertical, and its mixed differences.

    weight: `[O, C, 3, 3]`. The kernels, of one pixel, have O, 2 O, 2 O and 4 O outputs: for the even columns, then for
    the odd ones, of even rows and then of odd ones. Sums are made in float64.
    """
    of_map, *of_rows = ([part.to(weight.dtype) for part in _parts(row, 3)] for row in _parts(weight.double(), 2))
    along, both = of_map[1:], [part for row in of_rows for part in row[1:]]
    return [of_map[0], torch.cat(along), torch.cat([row[0] for row in of_rows]), torch.cat(both)]


def _parts(weight: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    before, at, behind = weight.split(1, dim)
    return before + at + behind, -before, behind


def convolve(input: Tensor, kernels: Sequence[Tensor], bias: Optional[Tensor]) -> Tensor:
    """Two output rows, `[N, O, 2 H, 2 W]`, for each row of `[N, C, H + 2, W]` but the first and the last.

    They are in the order of the input's, channels first or last.
    """
    rows, width, outputs = input.shape[2] - 2, input.shape[3], kernels[0].shape[0]
    result = empty_like(input, (input.shape[0], outputs, 2 * rows, 2 * width))
    at_once = max(_BLOCK_BYTES * rows // max(result.nbytes, 1), 1)
    for first in range(0, rows, at_once):
        last = min(first + at_once, rows)
        _convolve(input[:, :, first : last + 2], kernels, bias, result[:, :, 2 * first : 2 * last])
    return result


def _convolve(input: Tensor, kernels: Sequence[Tensor], bias: Optional[Tensor], result: Tensor) -> None:
    rows, width, outputs = input.shape[2] - 2, input.shape[3], kernels[0].shape[0]
    down = input[:, :, 1:] - input[:, :, :-1]
    here = input[:, :, 1:-1]
    of_map = of_pixels(here, kernels[0], bias)
    of_columns = of_pixels(_to_the_right(here), kernels[1])
    of_rows = of_pixels(down, kernels[2])
    of_both = of_pixels(_to_the_right(down), kernels[3])
    for y in (0, 1):
        row = of_map + of_rows[:, y * outputs : (y + 1) * outputs, y : rows + y]
        for x in (0, 1):
            place = 2 * y + x
            cross = of_both[:, place * outputs : (place + 1) * outputs, y : rows + y, x : width + x]
            column = of_columns[:, x * outputs : (x + 1) * outputs, :, x : width + x]
            torch.add(row, column + cross, out=result[:, :, y::2, x::2])


def _to_the_right(map: Tensor) -> Tensor:
    """Each pixel less the one to its left, and what lies outside, which is zero, less the last."""
    *sides, width = map.shape
    result = empty_like(map, (*sides, width + 1))
    torch.sub(map[..., 1:], map[..., :-1], out=result[..., 1:-1])
    result[..., 0] = map[..., 0]
    torch.neg(map[..., -1], out=result[..., -1])
    return result


def empty_like(map: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor of another shape whose channels lie first or last as those of a `map` do."""
    last = map.dim() == 4 and map.stride(1) == 1 < map.shape[1]
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=map.dtype, device=map.device, memory_format=order)
