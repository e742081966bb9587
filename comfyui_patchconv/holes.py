"""`with_holes`: any encoder on an image with holes. Users import it from here; what it does is in `conv/holes.py`."""

from .conv.holes import Holes, with_holes

__all__ = ["Holes", "with_holes"]
