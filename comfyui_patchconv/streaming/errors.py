"""What streaming raises of its own."""

from __future__ import annotations


class CannotEstimateError(RuntimeError):
    """A program that looks at values, which an estimate does not have."""
