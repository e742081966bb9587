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


class _Bar:
    """The host's bar: it appears after `delay` seconds, and moves every `interval` seconds at most."""

    def __init__(self, delay: float, interval: float) -> None:
        self.delay, self.interval = delay, interval
        self.start()

    def start(self) -> None:
        """Something begins, whatever became of what was before."""
        self._next = time.monotonic() + self.delay
        self._bar: Optional[Any] = None

    def _is_due(self) -> bool:
        """Whether to move it now. Raises the host's InterruptProcessingException when the user asks to stop."""
        throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.interval
        return True

    def _move(self, done: int, total: int) -> None:
        bar = self._bar = self._bar or ProgressBar(total)
        bar.update_absolute(done, total)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the settings and not how far it is: the host's bar leads to its server."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.start()


class Progress(_Bar):
    """Shows how far one pass through `convolutions` convolutions is; a `Tiling.on_strip`.

    A pass in which convolutions are called more than once (video in chunks, an image in tiles) grows by whole rounds.
    """

    def __init__(self, convolutions: int = 1, delay: float = 1.0, interval: float = 0.1) -> None:
        self.convolutions = convolutions
        super().__init__(delay, interval)

    def start(self) -> None:
        super().start()
        self._finished = 0

    def __call__(self, module: nn.Module, rows_done: int, rows: int) -> None:
        self._finished += rows_done >= rows
        if not self._is_due():
            return
        done = self._finished + (rows_done / rows if rows_done < rows else 0)
        rounds = -(-done // self.convolutions)
        self._move(int(done * _UNITS), int(max(rounds, 1)) * self.convolutions * _UNITS)


class StreamProgress(_Bar):
    """Shows how far a streamed call is; an `on_progress`."""

    def __init__(self, delay: float = 1.0, interval: float = 0.1) -> None:
        super().__init__(delay, interval)

    def __call__(self, done: int, work: int) -> None:
        if self._is_due() and work:
            self._move(min(done * _STEPS // work, _STEPS), _STEPS)
