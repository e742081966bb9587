"""The time there is: what still fits into it, by what the cases so far have taken."""

from __future__ import annotations

import time

LEAST_SECONDS = 60.0
"""What any case may take, as long as there is time: a first one loads libraries."""


class Clock:
    """Ends `minutes` after it was made."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._expected = self._taken = 0.0

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    @property
    def pace(self) -> float:
        """How much longer cases take than was expected of them; with few of them, nearly 1."""
        return min(max((self._taken + 10) / (self._expected + 10), 0.25), 20.0)

    def fits(self, seconds: float) -> bool:
        """Whether a case that should take so long would end in time."""
        return seconds * self.pace <= self.left

    def limit(self, seconds: float) -> float:
        """Seconds after which such a case is given up."""
        return max(min(max(4 * seconds * self.pace, LEAST_SECONDS), self.left), 1.0)

    def took(self, expected: float, seconds: float) -> None:
        """A case is over."""
        self._expected, self._taken = self._expected + expected, self._taken + seconds
