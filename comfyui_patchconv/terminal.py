"""Whether somebody looks on."""

from __future__ import annotations

import sys


def watched() -> bool:
    """Whether progress is shown: stderr is a terminal. There may be no stderr at all, as under `pythonw`."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
