"""What a VAE needs of the device, for the host to make room for and no more."""

from __future__ import annotations

MARGIN = 1.1
"""Of what a host makes room by, over what was counted."""

OF_FREE = 0.8
"""Share of the free memory that an automatic budget takes: the rest is for what a count does not see."""
