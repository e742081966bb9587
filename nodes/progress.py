"""The host's interrupt and the host's progress bar, at the granularity of a strip."""

from __future__ import annotations

import time
from typing import Any, Optional

from comfy.model_management import (  # pyright: ignore[reportMissingImports]
    throw_exception_if_processing_interrupted,
)
from comfy.utils import ProgressBar  # pyright: ignore[reportMissingImports]
from torch import nn

_STEPS = 1000  # of the bar of a streamed call
_UNITS = 100  # of the bar per convolution: its values are whole numbers


def interruptible(module: nn.Module, rows_done: int, rows: int) -> None:
    """For a model under a sampler, which has a bar of its own: stop after any strip when the user asks to.

    A `Tiling.on_strip`. Raises the host's InterruptProcessingException.
    """
    throw_exception_if_processing_interrupted()


class Progress:
    """Shows how far one pass through `convolutions` convolutions is; a `Tiling.on_strip`.

    The bar appears once a pass has lasted `delay` seconds, and again every `interval` seconds at most. A pass in which
    convolutions are called more than once (video in chunks, an image in tiles) grows by whole rounds.
    Raises the host's InterruptProcessingException when the user asks to stop.
    """

    def __init__(self, convolutions: int = 1, delay: float = 1.0, interval: float = 0.1) -> None:
        self.convolutions, self.delay, self.interval = convolutions, delay, interval
        self.start()

    def start(self) -> None:
        """A pass begins, whatever became of the one before."""
        self._finished = 0
        self._next = time.monotonic() + self.delay
        self._bar: Optional[Any] = None

    def __call__(self, module: nn.Module, rows_done: int, rows: int) -> None:
        throw_exception_if_processing_interrupted()
        self._finished += rows_done >= rows
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self.interval
        done = self._finished + (rows_done / rows if rows_done < rows else 0)
        rounds = -(-done // self.convolutions)
        total = int(max(rounds, 1)) * self.convolutions * _UNITS
        bar = self._bar = self._bar or ProgressBar(total)
        bar.update_absolute(int(done * _UNITS), total)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the settings and not the pass: the host's bar leads to its server."""
        return {"convolutions": self.convolutions, "delay": self.delay, "interval": self.interval}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


class StreamProgress:
    """Shows how far a streamed call is; an `on_progress`. The bar appears once it has lasted `delay` seconds.

    Raises the host's InterruptProcessingException when the user asks to stop.
    """

    def __init__(self, delay: float = 1.0, interval: float = 0.1) -> None:
        self.delay, self.interval = delay, interval
        self.start()

    def start(self) -> None:
        """A call begins, whatever became of the one before."""
        self._next = time.monotonic() + self.delay
        self._bar: Optional[Any] = None

    def __call__(self, done: int, work: int) -> None:
        throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if now < self._next or not work:
            return
        self._next = now + self.interval
        bar = self._bar = self._bar or ProgressBar(_STEPS)
        bar.update_absolute(min(done * _STEPS // work, _STEPS), _STEPS)

    def __getstate__(self) -> dict[str, Any]:
        """As for `Progress`."""
        return {"delay": self.delay, "interval": self.interval}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)
