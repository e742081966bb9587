"""Mean and variance of groups of channels, gathered strip by strip."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, Optional

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether a device is sure to have it: Apple's and some of Intel's have not."""
    return device.type in ("cpu", "cuda", "meta")


def in_float64(tensor: Tensor) -> Tensor:
    """`tensor` in float64; on the CPU where its device may have none."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()


class Moments(NamedTuple):
    """Of groups of so many elements each: their mean, and the sum of squared differences to it."""

    elements: int
    mean: Tensor
    squares: Tensor

    def merged(self, other: Moments) -> Moments:
        """Those of the elements of both (Chan et al. 1979). An average of variances would lack the term between."""
        total, difference = self.elements + other.elements, other.mean - self.mean
        between = difference**2 * (self.elements * other.elements / total)
        mean = self.mean + difference * (other.elements / total)
        return Moments(total, mean, self.squares + other.squares + between)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


_BLOCK_BYTES = 1 << 18
"""Of pixels that are looked at twice while they are in the cache, for each thread. They are added up in float32: of
more of them the mean would be less exact."""


def _of_block(pixels: Tensor, by_differences: bool) -> tuple[Tensor, Tensor]:
    """Of each channel of `pixels`, `[P, C]`, mean and sum of squared differences to it, `[C]`."""
    pixels = _wide(pixels)
    if not by_differences:  # a third of the time: it makes no map of the differences
        mean, variance = torch.batch_norm_update_stats(pixels, None, None, 0.0)
        return mean, variance * len(pixels)
    near = pixels.mean(0)
    differences = pixels - near
    rest = differences.sum(0).double() / len(pixels)  # by which it is off, rounded as it is
    return near.double() + rest, differences.square_().sum(0).double() - rest**2 * len(pixels)


_FAR_FROM_ZERO = 4.0
"""Means of so many deviations: added up in float32 they are too far off for these."""

_VARIES_LITTLE = 100.0
"""Means of so many deviations: the CPU's kernel subtracts squares of them in float32 and has nothing left."""


def _of_channels(pixels: Tensor, by_differences: bool) -> tuple[Tensor, Tensor]:
    """Of each channel of `pixels`, `[N, P, C]`, mean and sum of squared differences to it, `[N, C]`."""
    at_once = max(_BLOCK_BYTES * torch.get_num_threads() // max(4 * pixels.shape[2], 1), 1)
    blocks = pixels.split(at_once, 1)
    moments = [_of_block(sample, by_differences) for block in blocks for sample in block]
    means, within = (torch.stack(each).double().view(len(blocks), *pixels.shape[::2]) for each in zip(*moments))
    counts = torch.tensor([block.shape[1] for block in blocks], dtype=torch.float64).view(-1, 1, 1)
    mean = (means * counts).sum(0) / pixels.shape[1]
    return mean, within.sum(0) + ((means - mean).square() * counts).sum(0)


_BYTES_OF_PARTS = 1 << 20
"""Of moments that wait until they are merged."""


class Statistics:
    """Mean and variance of each group of channels, strip by strip, merged in float64; see `Moments`.

    Shapes are `[N, groups]`. batch: N. numbers: of a state.
    """

    def __init__(self, groups: int, batch: int) -> None:
        self.groups, self.batch = groups, batch
        self.numbers = 1 + 2 * batch * groups
        self._merged: Optional[Moments] = None
        self._is_far = False  # from zero, a strip that there was
        self._parts: list[Tensor] = []  # moments that are not merged yet
        self._count_of_parts = 0

    def add(self, strip: Tensor) -> None:
        batch, channels = strip.shape[:2]
        count = strip.numel() // max(batch * self.groups, 1)
        if strip.device.type != "cpu":
            mean, scale = self._moments(_wide(strip).contiguous())
            squares = scale.square().reciprocal() * count
            self.add_moments(torch.stack((torch.full_like(mean, count), mean, squares))[:, None], strip.numel())
            return
        last = strip.dim() == 4 and strip.stride(1) == 1 < channels
        self._merge(count, *(self._of_pixels(strip) if last else self._of_rows(_wide(strip), count)))

    def add_moments(self, moments: Tensor, elements: int) -> None:
        """Of parts of a strip, whose moments are known: `[3, K, N, C]`, for each channel, or each group, of each of K
        parts how many elements there are, their mean, and the sum of squared differences to it.

        elements: in all parts. They are merged later, many at once: on a GPU each of the small operators that merge
        takes as long as a large one, and where it has no float64, the host waits for them.
        """
        if self._parts and self._parts[0].shape[2:] != moments.shape[2:]:
            self._merge_parts()
        self._parts.append(moments)
        self._count_of_parts += elements // (self.batch * self.groups)
        if sum(part.nbytes for part in self._parts) >= _BYTES_OF_PARTS:
            self._merge_parts()

    def _merge_parts(self) -> None:
        if not self._parts:
            return
        parts = in_float64(torch.cat(self._parts, 1))
        counts, means, squares = parts.view(3, parts.shape[1], self.batch, self.groups, -1)
        count, self._parts, self._count_of_parts = self._count_of_parts, [], 0
        mean = (counts * means).sum((0, -1)) / count
        apart = (means - mean[..., None]).square() * counts
        self._merge(count, mean, (squares + apart).sum((0, -1)))

    def state(self) -> Tensor:
        """`[numbers]` in float64, on the CPU: the count, the means, and the sums of squared differences to them."""
        self._merge_parts()
        if self._merged is None:
            return torch.zeros(self.numbers, dtype=torch.float64)
        count, mean, squares = self._merged
        return torch.cat(
            (torch.tensor([count], dtype=torch.float64), mean.reshape(-1).cpu(), squares.reshape(-1).cpu())
        )

    def merge(self, states: Sequence[Tensor], device: torch.device) -> None:
        """The statistics of what all these states are of, in this order, on `device` where that has float64."""
        self._merged = None
        self._parts, self._count_of_parts = [], 0
        for state in states:
            count, moments = int(state[0]), state[1:].view(2, self.batch, self.groups)
            if count:
                self._merge(count, *(moments.to(device) if has_float64(device) else moments))

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        more = Moments(count, mean, squares)
        self._merged = more if self._merged is None else self._merged.merged(more)

    def _of_rows(self, wide: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Mean, and sum of squared differences to it, of groups of `count` elements."""
        mean, scale = self._moments(wide.contiguous())
        if bool((mean.abs() * scale > _VARIES_LITTLE).any()):
            mean, scale = self._moments(wide.double().contiguous())
        return mean.double(), scale.double() ** -2 * count

    def _moments(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal deviation, `[N, groups]`."""
        batch, channels, *sides = wide.shape
        # Of the operators that give both moments the fastest by far, though it normalises into the bargain.
        _, mean, scale = torch.native_group_norm(wide, None, None, batch, channels, prod(sides), self.groups, 0.0)
        return mean, scale

    def _of_pixels(self, strip: Tensor) -> tuple[Tensor, Tensor]:
        """The same of an image whose channels lie last: of each channel first."""
        batch, channels = strip.shape[:2]
        pixels = strip.permute(0, 2, 3, 1).reshape(batch, -1, channels)
        mean, squares, far = self._of_groups(pixels, self._is_far)
        if far and not self._is_far:
            self._is_far = True
            mean, squares, _ = self._of_groups(pixels, True)
        return mean, squares

    def _of_groups(self, pixels: Tensor, by_differences: bool) -> tuple[Tensor, Tensor, bool]:
        """Mean, and sum of squared differences to it, of groups of `pixels`, `[N, P, C]`, and whether one is far from
        zero."""
        batch, count, _ = pixels.shape
        mean, within = (value.view(batch, self.groups, -1) for value in _of_channels(pixels, by_differences))
        whole = mean.mean(-1, keepdim=True)
        squares = within.sum(-1) + (mean - whole).square().sum(-1) * count
        largest = mean.square().amax(-1) * (count * mean.shape[-1])
        return whole.squeeze(-1), squares, bool((largest > _FAR_FROM_ZERO**2 * squares).any())

    @property
    def mean(self) -> Tensor:
        return self._all().mean

    @property
    def variance(self) -> Tensor:
        moments = self._all()
        return moments.squares / moments.elements

    def _all(self) -> Moments:
        self._merge_parts()
        assert self._merged is not None
        return self._merged
