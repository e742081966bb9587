"""A convolution with half of the multiplications along the rows: Winograd's F(4, 3).

Four output rows of a kernel of three rows are made of six products instead of twelve (Lavin and Gray 2015, "Fast
algorithms for convolutional neural networks", 4.3), each a convolution whose kernel is one row high. They are the
values of polynomials at 0, A, -A, B, -B and infinity. With the usual 1 and 2 the last row is off by three times as much
as a convolution of float32 is, with these none is by more than one and a half times.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Sequence
from functools import cache
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


@cache
def least_channels() -> int:
    """Channels, in and out, from which it is faster on this processor: below, adding rows takes as long as multiplying.

    With AVX-512 most processors multiply twice as fast and add no faster: memory is what they wait for.
    """
    avx_512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return 512 if avx_512 and not is_zen_4(_processor()) else 64


def is_zen_4(processor: str) -> bool:
    """Whether a processor that has AVX-512 is AMD's Zen 4, which multiplies 256 bits at once all the same.

    processor: its lines of /proc/cpuinfo, or what `platform.processor` says on Windows. Source: AMD, "Software
    Optimization Guide for the AMD Zen4 Microarchitecture" (57647).
    """
    return "AuthenticAMD" in processor and re.search(r"\bfamily\s*:?\s*25\b", processor, re.IGNORECASE) is not None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return lines.read().partition("\n\n")[0]  # the first of them
    except OSError:
        return platform.processor()


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


_BLOCK_BYTES = 1 << 20
"""Of one of the products that are made at once: the dozen that are alive stay in a processor's cache."""


def convolve(input: Tensor, kernels: Sequence[Tensor], bias: Optional[Tensor], dim: int, convolve: Convolve) -> Tensor:
    """Every four output rows, along `dim`, of the convolution by the `kernels` of one weight.

    input: float32, two rows more than a multiple of `ROWS`. The result is in its order, channels first or last.
    """
    count = input.shape[dim] - 2
    outputs, channels = kernels[0].shape[:2]
    row_bytes = input.nbytes // input.shape[dim] * max(outputs, channels) // channels
    block = max(_BLOCK_BYTES, 2 * kernels[0].nbytes)  # a backend brings the kernels into its own order for each
    at_once = ROWS * max(block // max(row_bytes, 1), 1)
    result: Optional[Tensor] = None
    for first in range(0, count, at_once):
        rows = min(at_once, count - first)
        four = _Four(input.narrow(dim, first, rows + 2), kernels, dim, convolve)
        if result is None:
            result = empty_like(input, four.shape(count))
        four.write(result.narrow(dim, first, rows), bias)
    assert result is not None
    return result


class _Four:
    """Some groups of four output rows: the products for A, -A, B and -B, then what is made of them and the outer two.

    input: two rows more than are made of it.
    """

    def __init__(self, input: Tensor, kernels: Sequence[Tensor], dim: int, convolve: Convolve) -> None:
        self._kernels, self._dim, self._convolve = kernels, dim, convolve
        count = input.shape[dim] - 2
        self._rows = [input[(*self._before, slice(first, first + count, ROWS))] for first in range(PRODUCTS)]
        self._sum_a, self._difference_a = self._at(A, B, 1)
        self._sum_b, self._difference_b = self._at(B, A, 3)

    @property
    def _before(self) -> tuple[slice, ...]:
        return (slice(None),) * self._dim

    def shape(self, count: int) -> list[int]:
        """That of so many output rows."""
        sides = list(self._sum_a.shape)
        return [*sides[: self._dim], count, *sides[self._dim + 1 :]]

    def _at(self, number: float, other: float, first: int) -> tuple[Tensor, Tensor]:
        """Sum and difference of the products for a number and its opposite."""
        far = torch.sub(self._rows[4], self._rows[2], alpha=other * other)
        near = torch.sub(self._rows[3], self._rows[1], alpha=other * other)
        plus = self._convolve(torch.add(far, near, alpha=number), self._kernels[first], None)
        minus = self._convolve(far.sub_(near, alpha=number), self._kernels[first + 1], None)
        return plus + minus, plus.sub_(minus)

    def _outer(self, first: int, kernel: Tensor, bias: Optional[Tensor]) -> Tensor:
        """The product for zero or for infinity, of every other row."""
        values = torch.sub(self._rows[first + 4], self._rows[first + 2], alpha=A * A + B * B)
        return self._convolve(values.add_(self._rows[first], alpha=A * A * B * B), kernel, bias)

    def write(self, result: Tensor, bias: Optional[Tensor]) -> None:
        """The output rows."""
        out = [result[(*self._before, slice(place, None, ROWS))] for place in range(ROWS)]
        torch.add(self._difference_b, self._difference_a, alpha=1 / A, out=out[1])
        torch.add(self._sum_a, self._sum_b, alpha=B, out=out[2])
        if bias is not None:
            shift = bias.view(-1, *(1,) * (result.dim() - 2))
            out[1].add_(shift)
            out[2].add_(shift)
        of_zero = self._outer(0, self._kernels[0], bias)
        torch.add(of_zero.add_(self._sum_a, alpha=1 / (A * A)), self._sum_b, alpha=1 / B, out=out[0])
        of_infinity = self._outer(1, self._kernels[5], bias)
        torch.add(of_infinity.add_(self._difference_a, alpha=A), self._difference_b, alpha=B * B, out=out[3])


_UNLIKE = 16
"""How many times as large as another a row of four may be."""


def keeps_digits(result: Tensor, dim: int) -> bool:
    """Whether rows that were made together, along `dim`, are about as large as each other wherever one looks.

    They are added up before they are multiplied, so that the largest of them decides how exact all four are; with
    infinities none is.
    """
    sizes = torch.linalg.vector_norm(result, dim=1)  # over the channels; of their squares no map is made
    groups = sizes.unflatten(dim - 1, (-1, ROWS))
    largest, least = groups.amax(dim), groups.amin(dim)
    return bool((largest <= _UNLIKE * least).all() & largest.sum().isfinite())
