"""Copies between a device and its host, which run beside the device's other work where it can do both at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ...memory.errors import is_out_of_memory
from ..plan.schedule import STRIPS_LEAVING


class Arrival(Protocol):
    """Tells when a copy is done."""

    def synchronize(self) -> None:
        """Wait for it."""


class Copies(Protocol):
    """How strips get from a device to its host and back."""

    def room(self, like: Tensor) -> Tensor:
        """An empty tensor as `like`, which is dense, in memory of the host."""
        ...

    def start(self, target: Tensor, source: Tensor) -> Arrival:
        """Copy `source` to `target`, one of which is on the device, after the work that this thread gave it so far.

        Until it is done, neither may be written to, and the one on the device has to be kept; torch does not use memory
        of the host's again before that.
        """
        ...

    def await_on_device(self, arrival: Arrival) -> None:
        """Have the work that this thread gives the device from now on wait for a copy; the host goes on."""


class Leaving:
    """Tensors on their way from a device to its host, in order: each keeps its memory until it is known to be there."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._tensors: deque[tuple[Tensor, Tensor, Arrival]] = deque()

    def make_way(self) -> None:
        """Wait until one more may leave: before it takes memory of its own."""
        self.wait(STRIPS_LEAVING - 1)

    def add(self, target: Tensor, source: Tensor) -> None:
        """Have `source`, which nothing may write to any more, copied to `target`, which lies on the host."""
        self._tensors.append((target, source, self._copies.start(target, source)))

    def has(self, target: Tensor) -> bool:
        """Whether something may still be on its way to `target`."""
        return any(one is target for one, _, _ in self._tensors)

    def wait(self, but_for: int = 0) -> None:
        """Wait until no more than so many are leaving."""
        while len(self._tensors) > but_for:
            self._tensors[0][2].synchronize()
            self._tensors.popleft()


def if_there_is_room(start: Callable[[], object]) -> None:
    """Have something come that will be wanted next, unless memory runs out: then it comes when it is wanted."""
    try:
        start()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise


class SideStreams:
    """Copies of CUDA's, from and to page-locked memory, each way on a stream of its own, in order with what is on the
    stream that is current when they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def room(self, like: Tensor) -> Tensor:
        with suppress(RuntimeError):  # systems lock a part of their memory at most
            return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, pin_memory=True)
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)

    def start(self, target: Tensor, source: Tensor) -> Arrival:
        lane = self._out if target.device.type == "cpu" else self._back
        lane.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(lane):
            target.copy_(source, non_blocking=True)
            return lane.record_event()

    def await_on_device(self, arrival: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(arrival)


class OneAfterTheOther:
    """Copies that are done when they have been started."""

    def room(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)

    def start(self, target: Tensor, source: Tensor) -> OneAfterTheOther:
        target.copy_(source)
        return self

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def await_on_device(self, arrival: Arrival) -> None:
        """Nothing to wait for."""


@cache
def copies_of(device: torch.device) -> Copies:
    """The best way that there is for `device`, one for all maps."""
    return SideStreams(device) if device.type == "cuda" else OneAfterTheOther()
