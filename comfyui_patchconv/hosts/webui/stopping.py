"""Ends a decode, an encode or an upscale within a strip when the user asks the WebUI to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..halves import HALVES

Asked = Callable[[str], bool]
"""Whether the user wants a part, `"decoder"`, `"encoder"` or `"upscaler"`, to stop."""


class Stopped(BaseException):
    """Ends what was asked to. As the host's own, no error that anyone should handle."""


class Stops:
    """Decides whether a decode, an encode or an upscale ends because the user asked for it.

    What was asked before it began has ended the sampling, and the WebUI shows how far that came: such a decode runs to
    its end. It ends at once, though, where the one before it, of the same batch, was stopped. Previews and upscales,
    which are only on the way to what is shown, always end.
    """

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._stopped = False
        self._here = threading.local()

    @property
    def previewing(self) -> bool:
        """Whether this thread makes a live preview."""
        return getattr(self._here, "previewing", False)

    @contextmanager
    def preview(self) -> Iterator[None]:
        """Make a live preview, in this thread."""
        self._here.previewing = True
        try:
            yield
        finally:
            self._here.previewing = False

    @contextmanager
    def caught(self, part: str) -> Iterator[None]:
        """Let `check` raise, in this thread: whoever calls this goes on without the result."""
        asked = self._asked(part)
        if not asked and not self.previewing:
            self._stopped = False
        self._here.part, self._here.asked_before = part, asked
        try:
            yield
        finally:
            del self._here.part

    def check(self) -> None:
        """Raise Stopped if the work of this thread is to end, and may."""
        part = getattr(self._here, "part", None)
        if part is None or not self._asked(part):
            return
        if self.previewing or part not in HALVES:
            raise Stopped
        if self._stopped or not self._here.asked_before:
            self._stopped = True
            raise Stopped
