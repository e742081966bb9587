"""What lies between convolutions, in as few passes over memory as may be: by one kernel of Triton's where there is a
GPU for it, else by PyTorch's operators, which overwrite what nothing reads any more."""

from .chains import Chain, chains_of
from .choice import VARIABLE
from .run import Kernels

__all__ = ["VARIABLE", "Chain", "Kernels", "chains_of"]
