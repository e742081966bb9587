"""Mean and variance of groups of channels, gathered strip by strip."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def in_float64(tensor: Tensor) -> Tensor:
    """`tensor` in float64; on the CPU where its device may have none, as Apple's and some of Intel's."""
    return tensor.double() if tensor.device.type in ("cpu", "cuda", "meta") else tensor.cpu().double()


_VARIES_LITTLE = 100.0
"""Means of so many deviations: the CPU's kernel subtracts squares of them in float32 and has nothing left."""


class Statistics:
    """Mean and variance of each group of channels, strip by strip, merged in float64 (Chan et al. 1979).

    Shapes are `[N, groups]`. The pooled variance keeps the term between strips, which an average of variances lacks.
    """

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.count = 0
        self._mean: Optional[Tensor] = None
        self._squares: Optional[Tensor] = None

    def add(self, strip: Tensor) -> None:
        wide = strip if strip.dtype == torch.float64 else strip.float()
        batch, channels = strip.shape[:2]
        each = strip.numel() // max(batch * channels, 1)
        count = each * (channels // self.groups)
        mean, scale = self._moments(wide.contiguous(), each)
        if wide.device.type == "cpu" and bool((mean.abs() * scale > _VARIES_LITTLE).any()):
            mean, scale = self._moments(wide.double().contiguous(), each)
        mean, squares = in_float64(mean), in_float64(scale) ** -2 * count
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = count, mean, squares
            return
        total, difference = self.count + count, mean - self._mean
        self._mean = self._mean + difference * (count / total)
        self._squares = self._squares + squares + difference**2 * (self.count * count / total)
        self.count = total

    def _moments(self, wide: Tensor, each: int) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal deviation, `[N, groups]`, of a strip with `each` pixels for each channel."""
        batch, channels = wide.shape[:2]
        # Of the operators that give both moments the fastest by far, though it normalises into the bargain.
        _, mean, scale = torch.native_group_norm(wide, None, None, batch, channels, each, self.groups, 0.0)
        return mean, scale

    @property
    def mean(self) -> Tensor:
        assert self._mean is not None
        return self._mean

    @property
    def variance(self) -> Tensor:
        assert self._squares is not None
        return self._squares / self.count
