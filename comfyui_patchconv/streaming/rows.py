"""Stored feature maps, as a run of strips, and statistics gathered while they are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Optional, Union

import torch
from torch import Tensor

from .buffers import GIVES_BACK, FileBuffer, HostBuffer, buffer_for, is_borrowed
from .run import Run


class Rows:
    """A feature map as strips of rows, which are added in order and can be given up in order.

    elsewhere: keep them in host memory, or in a file where the device is the CPU. What lies on the device counts as
    held by `run`, the rest as kept aside. strip_rows: how many a strip has. In a dry run strips are numbers, but for
    what was evaluated whole.
    """

    def __init__(
        self,
        run: Run,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        elsewhere: bool = False,
        strip_rows: int = 0,
    ) -> None:
        self.run, self.shape, self.dtype, self.device, self.elsewhere = run, tuple(shape), dtype, device, elsewhere
        self.end, self._counted, self._in_strips, self._of_map = 0, True, True, True
        self._strips: list[tuple[int, int, Optional[Tensor]]] = []  # first row, rows, values
        self._strip_rows = strip_rows
        self._buffer: Optional[Union[HostBuffer, FileBuffer]] = None

    @classmethod
    def of(cls, tensor: Tensor, run: Run, counted: bool = True, elsewhere: bool = False, of_map: bool = True) -> Rows:
        """A tensor that is there already, in a file if `elsewhere`; one of the caller's is not counted, nor one that
        counts as a plain tensor, not `of_map`."""
        rows = cls(run, tensor.shape, tensor.dtype, tensor.device, elsewhere)
        rows._counted, rows._in_strips, rows._of_map = counted, False, of_map
        rows._fill(tensor.shape[-2], tensor)
        return rows

    def __del__(self) -> None:
        self.give_up(self.end)

    @property
    def row_bytes(self) -> int:
        return torch.Size(self.shape).numel() // max(self.shape[-2], 1) * self.dtype.itemsize

    @property
    def is_complete(self) -> bool:
        """Whether all rows are there."""
        return sum(rows for _, rows, _ in self._strips) == self.shape[-2]

    @property
    def bytes_held(self) -> int:
        """Bytes that it takes on the device."""
        return 0 if self.elsewhere else self._bytes()

    @property
    def strip_bytes(self) -> int:
        """Bytes that a strip takes on the device when it comes to be read; 0 where it need not come."""
        return self._strip_rows * self.row_bytes if self.elsewhere and self.device.type != "cpu" else 0

    @property
    def bytes_that_go(self) -> tuple[int, int]:
        """Bytes on the device and elsewhere that it gives up row by row; a map in one tensor goes as a whole."""
        size = self._bytes() if self._in_strips else 0
        if not self.elsewhere:
            return size, 0
        return 0, size if self.device.type != "cpu" or GIVES_BACK else 0

    def _bytes(self) -> int:
        return sum(rows for _, rows, _ in self._strips) * self.row_bytes if self._counted else 0

    def append(self, strip: Tensor) -> None:
        rows = strip.shape[-2]
        if self.elsewhere:
            if self._buffer is None:
                self._buffer = buffer_for(self.device, self.row_bytes * self.shape[-2])
            strip = self._buffer.keep(strip)
        elif is_borrowed(strip):
            strip = strip.clone()
        self._strips.append((self.end, rows, strip))
        self.end += rows
        self._count(rows)

    @property
    def tensor(self) -> Optional[Tensor]:
        """The one tensor that has all rows; None where there are several, or none."""
        return self._strips[0][2] if len(self._strips) == 1 else None

    def pretend(self) -> None:
        """In a dry run: all rows are there."""
        self._fill(self.shape[-2], None)

    def read(self, first: int, last: int) -> Tensor:
        """Rows `[first, last)`, on the device: a view where one strip has them all."""
        parts, buffer = [], self._buffer
        if buffer is not None:
            buffer.forget(first)
        for start, rows, strip in self._strips:
            if start + rows <= first:
                continue
            assert strip is not None
            if start >= last:
                if buffer is not None:
                    buffer.expect(start, strip, self.device)
                break
            if buffer is not None:
                strip = buffer.bring(start, strip, self.device)
            parts.append(strip.narrow(-2, max(first - start, 0), min(last, start + rows) - max(first, start)))
        if buffer is not None and last >= self.end:
            buffer.forget(self.end)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def give_up(self, before: int) -> None:
        """Free the strips that lie wholly above row `before`."""
        while self._strips and sum(self._strips[0][:2]) <= before:
            _, rows, strip = self._strips.pop(0)
            self._count(-rows)
            if self.run.dry and self._of_map and strip is not None:
                self.run.of_maps -= Counter([strip.untyped_storage()._cdata])
            if self._buffer is not None and strip is not None:
                self._buffer.discard(strip)

    def whole(self) -> Tensor:
        """The whole map as one tensor, which then is all that is stored; in a dry run one without values."""
        if self.tensor is None or self._buffer is not None:
            self.run.note(self._bytes(), 0, 0)
            tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            if self._buffer is not None:
                self._buffer.settle()
            for start, rows, strip in self._strips:
                if strip is not None:
                    tensor.narrow(-2, start, rows).copy_(strip)
            self.give_up(self.end)
            self._buffer, self.elsewhere, self._counted, self._in_strips = None, False, True, False
            self._fill(self.end, tensor)
        assert self.tensor is not None
        return self.tensor

    def _fill(self, rows: int, values: Optional[Tensor]) -> None:
        self._strips = [(0, rows, values)]
        self.end = rows
        self._count(rows)
        if self.run.dry and self._of_map and values is not None:
            self.run.of_maps[values.untyped_storage()._cdata] += 1

    def _count(self, rows: int) -> None:
        size = rows * self.row_bytes if self._counted else 0
        if self.elsewhere:
            self.run.aside += size
        else:
            self.run.held += size


def in_float64(tensor: Tensor) -> Tensor:
    """`tensor` in float64; on the CPU where its device may have none, as Apple's and some of Intel's."""
    return tensor.double() if tensor.device.type in ("cpu", "cuda", "meta") else tensor.cpu().double()


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
        # Of the operators that give both moments the fastest by far, though it normalises into the bargain.
        _, mean, scale = torch.native_group_norm(wide.contiguous(), None, None, batch, channels, each, self.groups, 0.0)
        mean, squares = in_float64(mean), in_float64(scale) ** -2 * count
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
