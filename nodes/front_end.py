"""Tells the front end things of our own, over the host's channel."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, Optional


class Messenger:
    """Tells the front end what `event` is about: of many states in a row the newest, `interval` seconds apart at least.

    The last one always gets through. It goes to the page that queued what is running, as the host's progress does.
    """

    def __init__(self, event: str, interval: float = 0.25) -> None:
        self.event, self.interval = event, interval
        self._lock = threading.Lock()
        self._next = 0.0
        self._pending: Optional[tuple[Any, str]] = None

    def tell(self, data: Any) -> None:
        """Tell `data`, which JSON can hold. Nothing happens without a server, or without a page that listens."""
        client = getattr(_server(), "client_id", None)
        if client is None:
            return
        with self._lock:
            pending, self._pending = self._pending is not None, (data, client)
            seconds = self._next - time.monotonic()
            if seconds <= 0 and not pending:
                self._send()
            elif not pending:
                timer = threading.Timer(seconds, self._send_late)
                timer.daemon = True
                timer.start()

    def _send_late(self) -> None:
        with self._lock:
            self._send()

    def _send(self) -> None:
        if self._pending is not None:
            _server().send_sync(self.event, *self._pending)
            self._next, self._pending = time.monotonic() + self.interval, None


def _server() -> Any:
    """Find the host's server; None where ComfyUI is used as a library."""
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)
