"""Sizes of strips and the units that they are told in. Programs of users import them from here; they are defined in
`conv/strip_sizes.py`, `memory/sizes.py` and `units.py`."""

from .conv.strip_sizes import DEFAULT_THRESHOLD, MAX_ELEMENTS, legal_rows, strip_rows, working_set
from .memory.sizes import STRIP_BYTES
from .units import GIB, MILLION

__all__ = [
    "DEFAULT_THRESHOLD",
    "GIB",
    "MAX_ELEMENTS",
    "MILLION",
    "STRIP_BYTES",
    "legal_rows",
    "strip_rows",
    "working_set",
]
