"""What makes a computation run plain."""

from __future__ import annotations


class CannotStreamError(RuntimeError):
    """A write that maps which wait would see, or would have to: the computation has to run plain."""
