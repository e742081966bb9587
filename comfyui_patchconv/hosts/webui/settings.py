"""What a user chooses of the toggle."""

from __future__ import annotations

from dataclasses import dataclass

from ...conv.strip_sizes import DEFAULT_THRESHOLD
from ...units import MILLION
from ..modes import MODES
from ..numbers import check_number


@dataclass(frozen=True)
class Settings:
    """What a user chooses.

    mode: `"patch"` for each large convolution of the VAE in strips, `"stream"` for the whole VAE in strips. The U-Net's
        convolutions run in strips in either.
    vae, unet: what to patch.
    splits: strips per convolution; 0 for automatic. For `"patch"`, and for the U-Net in either mode.
    threshold: millions of input elements from which a convolution runs in strips. As splits.
    budget: GiB that `"stream"` stays within beside the weights; 0 for what is free.

    Raises ValueError for anything else.
    """

    mode: str = "patch"
    vae: bool = True
    unet: bool = False
    splits: int = 0
    threshold: float = DEFAULT_THRESHOLD / MILLION
    budget: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}: use {' or '.join(map(repr, MODES))}.")
        for name in ("vae", "unet"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: use True or False.")
        for name, unit in (("splits", "strips"), ("threshold", "millions of elements"), ("budget", "GiB")):
            check_number(name, getattr(self, name), unit, whole=name == "splits")
