"""What a user chooses of the toggle."""

from __future__ import annotations

from dataclasses import dataclass

from ...conv.strip_sizes import DEFAULT_THRESHOLD
from ...units import MILLION
from ..devices.spread import ONE, check_choice
from ..modes import MODES
from ..numbers import check_number

_NUMBERS = {"splits": ("strips", 4096), "threshold": ("millions of elements", 100_000), "budget": ("GiB", 1024)}
"""Of each number its unit, and the most that it may be."""


@dataclass(frozen=True)
class Settings:
    """What a user chooses.

    mode: `"patch"` for each large convolution of the VAE in strips, `"stream"` for the whole VAE in strips, `"auto"`
        for whichever of these is needed at each decode, or neither. The U-Net's convolutions run in strips in any, and
        upscalers are streamed in any.
    vae, unet, upscalers: what to patch.
    splits: strips per convolution; 0 for automatic. For `"patch"` and `"auto"`, and for the U-Net in any mode.
    threshold: millions of input elements from which a convolution runs in strips. As splits.
    budget: GiB that `"auto"`, `"stream"` and upscalers stay within beside the weights; 0 for what is free.
    devices: that what is streamed is computed on; see `CHOICES`.

    Raises ValueError for anything else.
    """

    mode: str = "auto"
    vae: bool = True
    unet: bool = False
    splits: int = 0
    threshold: float = DEFAULT_THRESHOLD / MILLION
    budget: float = 0.0
    upscalers: bool = False
    devices: str = ONE

    def __post_init__(self) -> None:
        check_mode(self.mode)
        for name in ("vae", "unet", "upscalers"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: use True or False.")
        for name in _NUMBERS:
            check_setting(name, getattr(self, name))
        check_choice(self.devices)


def check_mode(mode: object) -> None:
    """Raise ValueError, in a sentence, for what is no mode."""
    if mode not in MODES:
        *others, last = map(repr, MODES)
        raise ValueError(f"mode is {mode!r}: use {', '.join(others)} or {last}.")


def check_setting(name: str, value: object) -> None:
    """Raise ValueError, in a sentence, for what the number `name` cannot be."""
    unit, most = _NUMBERS[name]
    check_number(name, value, unit, whole=name == "splits")
    if value > most:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}: use at most {most} {unit}.")
