"""How a VAE can run."""

from typing import Literal

MODES = ("patch", "stream")
"""What users choose between: each large convolution in strips, or all of a decoder or encoder."""

AUTO_MODES = ("auto", *MODES)
"""The same where the way that fits can be chosen by itself."""

Way = Literal["eager", "patch", "stream"]
"""How a call runs."""
