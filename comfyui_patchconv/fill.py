"""`fill`: holes of an image filled from their borders. Users import it from here; what it does is in `conv/fill.py`."""

from .conv.fill import fill

__all__ = ["fill"]
