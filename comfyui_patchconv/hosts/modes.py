"""How a VAE can run."""

from typing import Literal

MODES = ("auto", "patch", "stream")
"""What users choose between: the way that fits, each large convolution in strips, or all of a decoder or encoder."""

RunMode = Literal["eager", "patch", "stream"]
"""How a call runs."""
