"""Stand-ins for a VAE's decoder or encoder in a host, which stream it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor

from ..streaming import USUAL, OnProgress, Streamed, Tuning, joins
from .calls import device_of
from .clones import Wrapper
from .devices.spread import Spread
from .memory_estimates import OF_FREE, StreamEstimate


class Switch:
    """Says whether stand-ins that share it do anything."""

    def __init__(self, on: bool) -> None:
        self.on = on

    @contextmanager
    def set_to(self, on: bool) -> Iterator[None]:
        """Set it within the block."""
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before


class StreamedForward(Wrapper):
    """Stands in for `forward`, the decoder's or encoder's, or `decode` or `encode` where a VAE has no such part.

    budget: bytes, or 0 for the most of what is free when a decode or encode begins. free: asked for the bytes that are
    free on a device. on_progress: see `OnProgress`. on_call: called when one more call is about to be streamed.
    on_miss: called with the bytes that a call was expected to take, where these are more than the budget. switch: while
    it is off nothing is streamed. on_ran: called after each call with whether it did as eager does, for strips would
    be no help. group: processes to stream over; None for this one. tuning: see `Tuning`. spread: devices to stream over
    in worker processes; None for this one.
    """

    def __init__(
        self, forward: Callable[..., Any], budget: int, free: Callable[[torch.device], int],
        on_progress: Optional[OnProgress] = None, on_call: Optional[Callable[[], None]] = None,
        on_miss: Optional[Callable[[int], None]] = None, switch: Optional[Switch] = None,
        on_ran: Optional[Callable[[bool], None]] = None, group: Any = None, tuning: Tuning = USUAL,
        spread: Optional[Spread] = None,
    ) -> None:  # fmt: skip
        self.forward, self.budget, self.free = forward, budget, free
        self.on_progress, self.on_call, self.on_miss, self.on_ran = on_progress, on_call, on_miss, on_ran
        self.switch, self.spread = switch or Switch(True), spread
        self._streamed = Streamed(on_progress=on_progress, tuning=tuning, group=group)
        self._streamed.least = not budget  # as the host was told

    def start(self) -> None:
        """Begin a decode or encode, here or on a clone for another device: it may take what is free now."""
        self._streamed.budget = self._streamed.last = None
        if self.spread is not None:
            self.spread.start()

    @property
    def eager(self) -> int:
        """Bytes that the maps of the last call since `start` need at once without us; 0 where it was not streamed."""
        last = self._streamed.last
        return 0 if last is None else last.eager_peak

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.switch.on or joins(args, kwargs):
            return self.forward(*args, **kwargs)
        device = device_of(args, kwargs)
        if self._streamed.budget is None:
            self._streamed.budget = self.budget or int(OF_FREE * self.free(device)) or 1
        if self.on_call is not None:
            self.on_call()
        if self.spread is None:
            result = self._streamed.call(self.forward, args, kwargs)
        else:
            result = self.spread.call(self._streamed, self.forward, args, kwargs, device, shared=not self.budget)
        last = self._streamed.last
        if self.budget and self.on_miss is not None and last is not None and last.peak > self.budget:
            self.on_miss(last.peak)
        if self.on_ran is not None:
            self.on_ran(self._streamed.ran_eagerly)
        return result


class StreamedAtOnce(StreamedForward):
    """Stands in for `decode` or `encode` of a VAE of which `part` is streamed: streams all of it where `estimate` says
    that this takes less."""

    def __init__(self, forward: Callable[..., Any], part: StreamedForward, estimate: StreamEstimate) -> None:
        notes = part.on_progress, part.on_call, part.on_miss, part.switch, part.on_ran
        super().__init__(forward, part.budget, part.free, *notes, spread=part.spread)
        self.estimate = estimate
        estimate.starts = (*estimate.starts, self.start)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.switch.on:
            return self.forward(*args, **kwargs)
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)  # no buffer to write into, no options
        if not alone or not self.estimate.at_once(args[0]):
            return self.forward(*args, **kwargs)
        return super().__call__(*args)
