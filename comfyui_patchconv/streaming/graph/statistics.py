"""Mean and variance of groups of channels, gathered strip by strip."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Optional

import torch
from torch import Tensor


def in_float64(tensor: Tensor) -> Tensor:
    """`tensor` in float64; on the CPU where its device may have none, as Apple's and some of Intel's."""
    return tensor.double() if tensor.device.type in ("cpu", "cuda", "meta") else tensor.cpu().double()


_BLOCK_BYTES = 1 << 20
"""Of pixels that are looked at twice while they are in the cache, for each thread."""


def _of_block(pixels: Tensor) -> tuple[int, Tensor, Tensor]:
    """Of pixels `[N, P, C]` their number, and of each channel mean and sum of squared differences to it, `[N, C]`."""
    count = pixels.shape[1]
    near = (pixels.sum(1, keepdim=True) / count).to(pixels.dtype)
    differences = pixels - near
    rest = differences.sum(1).double() / count  # by which it is off, rounded as it is
    return count, near.squeeze(1).double() + rest, differences.square_().sum(1).double() - rest**2 * count


_VARIES_LITTLE = 100.0
"""Means of so many deviations: the CPU's kernel subtracts squares of them in float32 and has nothing left."""


class Statistics:
    """Mean and variance of each group of channels, strip by strip, merged in float64 (Chan et al. 1979).

    Shapes are `[N, groups]`. The pooled variance keeps the term between strips, which an average of variances lacks.
    batch: N. numbers: of a state.
    """

    def __init__(self, groups: int, batch: int) -> None:
        self.groups, self.batch = groups, batch
        self.numbers = 1 + 2 * batch * groups
        self.count = 0
        self._mean: Optional[Tensor] = None
        self._squares: Optional[Tensor] = None

    def add(self, strip: Tensor) -> None:
        wide = strip if strip.dtype == torch.float64 else strip.float()
        batch, channels = strip.shape[:2]
        count = strip.numel() // max(batch * self.groups, 1)
        last = wide.dim() == 4 and wide.stride(1) == 1 < channels and wide.device.type == "cpu"
        self._merge(count, *(self._of_pixels(wide) if last else self._of_rows(wide, count)))

    def state(self) -> Tensor:
        """`[numbers]` in float64, on the CPU: the count, the means, and the sums of squared differences to them."""
        if self._mean is None or self._squares is None:
            return torch.zeros(self.numbers, dtype=torch.float64)
        count = torch.tensor([self.count], dtype=torch.float64)
        return torch.cat((count, self._mean.reshape(-1).cpu(), self._squares.reshape(-1).cpu()))

    def merge(self, states: Sequence[Tensor], device: torch.device) -> None:
        """The statistics of what all these states are of, in this order, on `device` where that has float64."""
        self.count, self._mean, self._squares = 0, None, None
        for state in states:
            count, moments = int(state[0]), state[1:].view(2, self.batch, self.groups)
            if count:
                self._merge(count, *(moments.to(device) if device.type in ("cpu", "cuda") else moments))

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = count, mean, squares
            return
        total, difference = self.count + count, mean - self._mean
        self._mean = self._mean + difference * (count / total)
        self._squares = self._squares + squares + difference**2 * (self.count * count / total)
        self.count = total

    def _of_rows(self, wide: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Mean, and sum of squared differences to it, of groups of `count` elements."""
        mean, scale = self._moments(wide.contiguous())
        if wide.device.type == "cpu" and bool((mean.abs() * scale > _VARIES_LITTLE).any()):
            mean, scale = self._moments(wide.double().contiguous())
        return in_float64(mean), in_float64(scale) ** -2 * count

    def _moments(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal deviation, `[N, groups]`."""
        batch, channels, *sides = wide.shape
        # Of the operators that give both moments the fastest by far, though it normalises into the bargain.
        _, mean, scale = torch.native_group_norm(wide, None, None, batch, channels, prod(sides), self.groups, 0.0)
        return mean, scale

    def _of_pixels(self, wide: Tensor) -> tuple[Tensor, Tensor]:
        """The same of an image whose channels lie last: of each channel first, by differences to its mean."""
        batch, channels = wide.shape[:2]
        pixels = wide.permute(0, 2, 3, 1).reshape(batch, -1, channels)
        count = pixels.shape[1]
        at_once = max(_BLOCK_BYTES * torch.get_num_threads() // max(pixels[:, :1].nbytes, 1), 1)
        blocks = [_of_block(block) for block in pixels.split(at_once, 1)]
        each, mean, within = zip(*blocks)
        counts = torch.tensor(each, dtype=torch.float64).view(-1, 1, 1)
        means = torch.stack(mean)
        mean = (means * counts).sum(0) / count
        within = torch.stack(within).sum(0) + ((means - mean).square() * counts).sum(0)
        mean, within = mean.view(batch, self.groups, -1), within.view(batch, self.groups, -1)
        whole = mean.mean(-1, keepdim=True)
        return whole.squeeze(-1), within.sum(-1) + (mean - whole).square().sum(-1) * count

    @property
    def mean(self) -> Tensor:
        assert self._mean is not None
        return self._mean

    @property
    def variance(self) -> Tensor:
        assert self._squares is not None
        return self._squares / self.count
