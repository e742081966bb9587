"""Reads the toggle's settings from a script's arguments and an image's parameters, and writes them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional

from .settings import Settings

TITLE = "Patch Conv"
NAMES = ("enabled", "mode", "vae", "unet", "splits", "threshold", "budget")
"""The arguments, in this order, or in a dictionary by these names."""

DEFAULTS: dict[str, Any] = {"enabled": False, **{name: getattr(Settings, name) for name in NAMES[1:]}}
_PARTS = {"vae": "VAE", "unet": "U-Net"}
_NUMBERS = ("splits", "threshold", "budget")


def settings_of(
    args: Sequence[Any], changes: Mapping[str, Any], defaults: Mapping[str, Any] = DEFAULTS
) -> Optional[Settings]:
    """Read the settings that arguments ask for; None where they ask for nothing.

    args: values in the order of `NAMES`, or first of all a dictionary, of which `defaults` fill in what is left out.
    changes: values by name that count before those. Raises ValueError for an unknown name or a wrong value.
    """
    named = {**defaults, **args[0]} if args and isinstance(args[0], Mapping) else dict(zip(NAMES, args))
    values: dict[str, Any] = {**named, **changes}
    unknown = [name for name in values if name not in NAMES]
    if unknown:
        raise ValueError(f"there is no argument {unknown[0]!r}: use {', '.join(NAMES)}.")
    enabled = values.pop("enabled", False)
    if not isinstance(enabled, bool):
        raise ValueError(f"enabled is {enabled!r}: use True or False.")
    settings = Settings(**values)
    return settings if enabled and (settings.vae or settings.unet) else None


def to_infotext(settings: Settings) -> dict[str, Any]:
    """Name what an image's parameters say: mode and parts, and numbers that are not the default."""
    parts = " + ".join(label for name, label in _PARTS.items() if getattr(settings, name))
    numbers = {name: getattr(settings, name) for name in _NUMBERS}
    changed = {f"{TITLE} {name}": value for name, value in numbers.items() if value != DEFAULTS[name]}
    return {TITLE: settings.mode, f"{TITLE} parts": parts, **changed}


def infotext_names() -> list[str]:
    """List every name that `to_infotext` may write."""
    return [TITLE, f"{TITLE} parts", *(f"{TITLE} {name}" for name in _NUMBERS)]


def from_infotext(name: str, parameters: Mapping[str, str]) -> Any:
    """Read the value of the argument `name` from the parameters of an image.

    None for an image that was made without Patch Conv: it looks the same with it, so whoever has it on may keep it.
    """
    if TITLE not in parameters:
        return None
    if name in _PARTS:
        return _PARTS[name] in parameters.get(f"{TITLE} parts", "").split(" + ")
    if name in _NUMBERS:
        return type(DEFAULTS[name])(float(parameters.get(f"{TITLE} {name}", DEFAULTS[name])))
    return True if name == "enabled" else parameters[TITLE]
