"""What streaming raises of its own."""

from __future__ import annotations


class CannotEstimateError(RuntimeError):
    """A program that looks at values, which an estimate does not have."""


class SpreadError(RuntimeError):
    """A call that several ranks make together, and that one of them cannot go on with; the text names that rank.

    The others' messages may still be on their way: further calls over the same group raise it again.
    """
