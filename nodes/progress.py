"""Shows progress in the host's bar and stops at the host's interrupt, strip by strip."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Optional

from comfy.model_management import (  # pyright: ignore[reportMissingImports]
    throw_exception_if_processing_interrupted,
)
from comfy.utils import ProgressBar  # pyright: ignore[reportMissingImports]
from torch import nn

from ..comfyui_patchconv.hosts.figures import strips_of

_STEPS = 1000  # of the bar of a streamed call
_UNITS = 100  # of the bar per convolution: its values are whole numbers


class _Watch:
    """Stops the work after any strip when the user asks to, and counts strips.

    strips: since the start; of the convolution that was cut into most, or of all that is streamed.
    """

    def __init__(self) -> None:
        self._then: Optional[Callable[[], None]] = None
        self.start()

    def start(self) -> None:
        """Begin anew, whatever became of what was before."""
        self.strips = 0

    def then(self, call: Callable[[], None]) -> None:
        """Call this after each strip."""
        self._then = call

    def _look(self) -> None:
        """Look around after a strip. Raises the host's InterruptProcessingException when the user asks to stop."""
        throw_exception_if_processing_interrupted()
        if self._then is not None:
            self._then()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the settings and not how far it is: the host's bar leads to its server."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._then = None
        self.start()


class StripWatch(_Watch):
    """Watches a model under a sampler, which has a bar of its own; a `Tiling.on_strip`."""

    def __call__(self, module: nn.Module, rows_done: int, rows: int) -> None:
        self.strips = max(self.strips, strips_of(rows_done, rows))
        self._look()


class _Bar(_Watch):
    """Moves the host's bar: it appears after `delay` seconds, and moves every `interval` seconds at most."""

    def __init__(self, delay: float, interval: float) -> None:
        self.delay, self.interval = delay, interval
        super().__init__()

    def start(self) -> None:
        super().start()
        self._next = time.monotonic() + self.delay
        self._bar: Optional[Any] = None

    def _is_due(self) -> bool:
        """Tell whether to move it now. Raises as `_look` does."""
        self._look()
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.interval
        return True

    def _move(self, done: int, total: int) -> None:
        bar = self._bar = self._bar or ProgressBar(total)
        bar.update_absolute(done, total)


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
        self.strips = max(self.strips, strips_of(rows_done, rows))
        self._finished += rows_done >= rows
        if not self._is_due():
            return
        done = self._finished + (rows_done / rows if rows_done < rows else 0)
        rounds = -(-done // self.convolutions)
        self._move(int(done * _UNITS), int(max(rounds, 1)) * self.convolutions * _UNITS)


class StreamProgress(_Bar):
    """Shows how far the streamed calls of a decode or encode are; an `on_progress` of each."""

    def __init__(self, delay: float = 1.0, interval: float = 0.1) -> None:
        super().__init__(delay, interval)

    def start(self) -> None:
        super().start()
        self._expected = self._before = self._done = 0

    def expect(self, work: int) -> None:
        """Expect this work of all calls until the next start, in the units of `__call__`; 0 where it is not known."""
        self._expected = work

    def next_call(self) -> None:
        """Begin another call: a chunk of a video, or the next image of a batch."""
        self._before, self._done = self._before + self._done, 0

    def __call__(self, done: int, work: int) -> None:
        self.strips += 1
        self._done = done
        if self._is_due() and work:
            done, work = (self._before + done, self._expected) if self._expected else (done, work)
            self._move(min(done * _STEPS // work, _STEPS), _STEPS)


class AnyProgress(StreamProgress):
    """Shows how far a decode or encode is that may be streamed or run its convolutions in strips."""

    def on_strip(self, module: nn.Module, rows_done: int, rows: int) -> None:
        """See `Tiling.on_strip`: counts the strips of the convolution that is cut into most. It has no bar."""
        self.strips = max(self.strips, strips_of(rows_done, rows))
        self._look()
