"""Who of the ranks that make a call together is there, and what went wrong with whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any, Optional

from ..errors import SpreadError

_BEATS = 6
"""How often a rank says that it is there, within the time after which it is missed."""

_SAYING = 5.0
"""Seconds that a rank may take from beginning to say what went wrong until it has said it."""


class Watch:
    """One call. Each rank counts up a number of its own in `store` while the call lasts; the first one that fails says
    why, and all that wait are told.

    store: a `torch.distributed` store that all ranks reach, and that nobody else uses the names of. seconds: how long a
    rank may be silent.
    """

    def __init__(self, store: Any, rank: int, ranks: int, seconds: float) -> None:
        self._store, self._rank, self._ranks, self._seconds = store, rank, ranks, seconds
        now = time.monotonic()
        self._heard = {other: (0, now) for other in range(ranks) if other != rank}
        self._over = threading.Event()
        self._beat = threading.Thread(target=self._beats, name="patchconv spread", daemon=True)
        self._beat.start()

    def _beats(self) -> None:
        with suppress(Exception):  # a store that is gone: who waits will notice
            while True:
                self._store.add(f"beat {self._rank}", 1)
                if self._over.wait(self._seconds / _BEATS):
                    return

    def end(self) -> None:
        """The call is over for this rank: another one may still wait for a third, and shall not miss this one."""
        with suppress(Exception):
            self._store.add(f"ended {self._rank}", 1)
        self._over.set()
        self._beat.join(self._seconds)

    def forget(self) -> None:
        """No rank makes this call any more: what this one has in the store can go."""
        with suppress(Exception):  # not all stores can
            for name in ("beat", "ended"):
                self._store.delete_key(f"{name} {self._rank}")

    def look(self, awaited: Collection[int] = ()) -> None:
        """Raises SpreadError if a rank has failed, or has been silent for too long, also because it has ended the call,
        if it is one of those `awaited`: nothing more comes from it."""
        text = self.failure()
        if text is not None:
            raise SpreadError(text)
        now = time.monotonic()
        for other, (count, when) in self._heard.items():
            beats = self._read(f"beat {other}")
            if beats != count:
                self._heard[other] = beats, now
            elif now - when > self._seconds:
                ended = self._read(f"ended {other}")
                if not ended or other in awaited:
                    raise self.fail(self._gone_on(other) if ended else self._silent(other, beats))

    def _gone_on(self, other: int) -> str:
        return (
            f"rank {other} has ended a call in which rank {self._rank} waits for it: every rank has to make the same "
            "calls, and to ask for the same values."
        )

    def _silent(self, other: int, beats: int) -> str:
        then = "see what it said last, and start all ranks again."
        if beats:
            return f"rank {other} has not been heard of for {self._seconds:g} s: {then}"
        return f"rank {other} did not come to this call for {self._seconds:g} s: {then}"

    def failure(self) -> Optional[str]:
        """What the first rank that failed has said; None while there is none."""
        if not self._read("failures"):
            return None
        return self._store.get("failure").decode()

    def _said_meanwhile(self) -> Optional[str]:
        """The same, where a rank was about to say it."""
        end = time.monotonic() + _SAYING
        while time.monotonic() < end:
            text = self.failure()
            if text is not None:
                return text
            time.sleep(_SAYING / 100)
        return None

    def _read(self, name: str) -> int:
        try:
            return self._store.add(name, 0)
        except Exception as error:
            raise SpreadError(
                f"rank {self._rank} has lost the store of the process group, which the rank or the program that made "
                f"it has ended with ({type(error).__name__}): start all ranks again."
            ) from error

    def fail(self, text: str) -> SpreadError:
        """Tell all ranks what went wrong, unless one was told already; the error that says it."""
        with suppress(Exception):
            if self._store.add("first", 1) == 1:
                self._store.set("failure", text)
                self._store.add("failures", 1)
            else:
                text = self._said_meanwhile() or text
        return SpreadError(text)
