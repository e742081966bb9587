"""The work of one part of a model in a run: measured, shown in the host's bar, and stopped where that is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Optional

import torch

from ...memory.recorder import Recorder
from ..figures import Figures
from .host import Host
from .stopping import Stops


class Work:
    """Adds calls to `figures`. host: shows how far one is; None where none does. words: what it shows beside that."""

    def __init__(self, figures: Figures, stops: Stops, host: Optional[Host], words: str) -> None:
        self._figures, self._stops, self._host, self._words = figures, stops, host, words
        self._show: Optional[Callable[[float], None]] = None

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Within the block runs one call on `device`."""
        recorder = Recorder(device, own_peak=False)  # the WebUI reads the allocator's peak itself
        with self._shown():
            try:
                with recorder:
                    yield
            finally:
                self._figures.add(recorder)

    def on_progress(self, done: int, work: int) -> None:
        """Show how far the call is, and stop it if that is asked; an `OnProgress`."""
        self._stops.check()
        if self._show is not None and work:
            self._show(min(done / work, 1.0))

    @contextmanager
    def _shown(self) -> Iterator[None]:
        if self._host is None:
            yield
            return
        with self._host.shown(self._words) as self._show:
            yield
