"""Stored feature maps, as a run of strips, and statistics gathered while they are written."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


class Rows:
    """A feature map as strips of rows, which are added in order and can be given up in order."""

    def __init__(self) -> None:
        self._strips: list[tuple[int, Tensor]] = []
        self.end = 0

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        rows = cls()
        rows._strips, rows.end = [(0, tensor)], tensor.shape[-2]
        return rows

    def append(self, strip: Tensor) -> None:
        if strip.untyped_storage().nbytes() > strip.numel() * strip.element_size():
            strip = strip.clone()  # a part would keep the whole that it was cut from
        self._strips.append((self.end, strip))
        self.end += strip.shape[-2]

    def read(self, first: int, last: int) -> Tensor:
        """Rows `[first, last)`: a view where one strip has them all."""
        parts = [
            strip.narrow(-2, max(first - start, 0), min(last, start + strip.shape[-2]) - max(first, start))
            for start, strip in self._strips
            if start < last and start + strip.shape[-2] > first
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def give_up(self, before: int) -> None:
        """Free the strips that lie wholly above row `before`."""
        while self._strips and self._strips[0][0] + self._strips[0][1].shape[-2] <= before:
            del self._strips[0]

    def whole(self) -> Tensor:
        """The whole map as one tensor, which then is all that is stored."""
        if len(self._strips) != 1:
            first = self._strips[0][1]
            shape = (*first.shape[:-2], self.end, first.shape[-1])
            tensor = torch.empty(shape, dtype=first.dtype, device=first.device)
            for start, strip in self._strips:
                tensor.narrow(-2, start, strip.shape[-2]).copy_(strip)
            self._strips = [(0, tensor)]
        return self._strips[0][1]


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
        values = wide.reshape(strip.shape[0], self.groups, -1)
        count = values.shape[-1]
        variance, mean = torch.var_mean(values, -1, correction=0)
        mean, squares = mean.double(), variance.double() * count
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = count, mean, squares
            return
        total, difference = self.count + count, mean - self._mean
        self._mean = self._mean + difference * (count / total)
        self._squares = self._squares + squares + difference**2 * (self.count * count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        assert self._mean is not None
        return self._mean

    @property
    def variance(self) -> Tensor:
        assert self._squares is not None
        return self._squares / self.count
