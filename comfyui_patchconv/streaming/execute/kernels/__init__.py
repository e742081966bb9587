"""What lies between convolutions, in one pass over memory: by one kernel of Triton's, where there is a GPU for it."""

from .chains import Chain, chains_of
from .choice import VARIABLE
from .run import Kernels

__all__ = ["VARIABLE", "Chain", "Kernels", "chains_of"]
