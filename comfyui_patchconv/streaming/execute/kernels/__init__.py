"""What lies between convolutions, in one pass over memory: by one kernel of Triton's or comfy-kitchen's, where there
is a GPU for it."""

from .chains import Chain
from .choice import VARIABLE
from .run import Kernels

__all__ = ["VARIABLE", "Chain", "Kernels"]
