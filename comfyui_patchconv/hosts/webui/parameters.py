"""Reads the toggle's settings from a script's arguments and an image's parameters, and writes them there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

from .settings import Settings, check_mode, check_setting

TITLE = "Patch Conv"
NAMES = ("enabled", "mode", "vae", "unet", "splits", "threshold", "budget", "upscalers")
"""The arguments, in this order, or in a dictionary by these names."""

MACHINES = ("devices",)
"""What a dictionary may name besides. It tells nothing of the picture, which is the same, but of the machine: so it is
set once for all runs, and is no control of a run, nor among a picture's parameters."""

DEFAULTS: dict[str, Any] = {"enabled": False, **{name: getattr(Settings, name) for name in (*NAMES[1:], *MACHINES)}}
_PARTS = {"vae": "VAE", "unet": "U-Net", "upscalers": "Upscalers"}
_NUMBERS = ("splits", "threshold", "budget")
_HEEDED = {"auto": _NUMBERS, "patch": ("splits", "threshold"), "stream": ("budget",)}
"""The numbers that count for a VAE, by mode."""

_SWITCHES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def settings_of(
    args: Sequence[Any], changes: Mapping[str, Any], defaults: Mapping[str, Any] = DEFAULTS
) -> Optional[Settings]:
    """Read the settings that arguments ask for; None where they do not ask for Patch Conv.

    args: values in the order of `NAMES`, or first of all a dictionary, of which `defaults` fill in what is left out.
        What comes behind them has to be empty. Of `MACHINES` they count for both.
    changes: values by name that count before those. Raises ValueError for an unknown name or a wrong value, and where
        nothing is to be patched.
    """
    if any(value not in (None, "") for value in args[len(NAMES) :]):
        raise ValueError(f"there are more than {len(NAMES)} arguments: use {', '.join(NAMES)}.")
    named = {**defaults, **args[0]} if args and isinstance(args[0], Mapping) else _in_order(args)
    values: dict[str, Any] = {**{name: defaults[name] for name in MACHINES}, **named, **changes}
    names = (*NAMES, *MACHINES)
    unknown = [name for name in values if name not in names]
    if unknown:
        raise ValueError(f"there is no argument {unknown[0]!r}: use {', '.join(names)}.")
    if not _switch("enabled", values.pop("enabled", False)):
        return None
    switches = {name: _switch(name, values[name]) for name in _PARTS if name in values}
    mode, devices = _mode(values.get("mode", DEFAULTS["mode"])), _choice(values["devices"])
    settings = Settings(**{**values, **switches, "mode": mode, "devices": devices})
    if not any(getattr(settings, name) for name in _PARTS):
        raise ValueError(f"neither {' nor '.join(_PARTS.values())} is chosen, so nothing will be patched.")
    return settings


def _in_order(args: Sequence[Any]) -> dict[str, Any]:
    """Name arguments by their place."""
    named: dict[str, Any] = dict(zip(NAMES, args))
    if named.get("upscalers") in (None, ""):  # an empty one stood there before there were upscalers
        named.pop("upscalers", None)
    return named


def _switch(name: str, value: object) -> bool:
    """Read on or off; JSON and plots have it in more than one form."""
    meant = _SWITCHES.get(str(value).strip().lower())
    if meant is None:
        raise ValueError(f"{name} is {value!r}: use True or False.")
    return meant


def _mode(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _choice(value: Any) -> Any:
    """Read a choice of devices; JSON may have a number of them."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _mode(value)


def heeded(mode: str, vae: bool, unet: bool, upscalers: bool) -> set[str]:
    """Name the numbers that count when these parts run in this mode."""
    names = set(_HEEDED.get(mode, ())) if vae else set()
    if unet:
        names.update(_HEEDED["patch"])
    if upscalers:
        names.update(_HEEDED["stream"])
    return names


def to_infotext(settings: Settings) -> dict[str, Any]:
    """Name what an image's parameters say: mode and parts, and numbers that are not the default."""
    parts = " + ".join(label for name, label in _PARTS.items() if getattr(settings, name))
    numbers = {name: getattr(settings, name) for name in _NUMBERS}
    changed = {f"{TITLE} {name}": value for name, value in numbers.items() if value != DEFAULTS[name]}
    return {TITLE: settings.mode, f"{TITLE} parts": parts, **changed}


def infotext_names() -> list[str]:
    """List every name that `to_infotext` may write."""
    return [TITLE, f"{TITLE} parts", *(f"{TITLE} {name}" for name in _NUMBERS)]


def from_infotext(name: str, parameters: Mapping[str, Any], comment: Callable[[str], None] = lambda text: None) -> Any:
    """Read the value of the argument `name` from the parameters of an image, which may come from anywhere.

    None for an image that was made without Patch Conv: it looks the same with it, so whoever has it on may keep it. The
    same for a mode that does not exist; of any other value that cannot be, the default is taken.

    comment: gets a sentence where the value of this argument was not taken as it is.
    """
    if TITLE not in parameters:
        return None
    mode = _mode(parameters[TITLE])
    try:
        check_mode(mode)
    except ValueError as error:
        if name == "mode":
            comment(f"{TITLE} in these parameters is ignored: {error}")
        return None
    if name == "enabled":
        return True
    if name == "mode":
        return mode
    try:
        return _part(name, parameters) if name in _PARTS else _number(name, parameters)
    except ValueError as error:
        if name == "vae" or name not in _PARTS:  # "vae" says it of all parts
            comment(f"{TITLE} in these parameters: {error} The default is taken.")
        return DEFAULTS[name]


def _part(name: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a part is among those that are named. Raises ValueError where none of them exists."""
    text = str(parameters.get(f"{TITLE} parts", _PARTS["vae"]))
    parts = [part.strip().lower() for part in text.split("+")]
    if not any(label.lower() in parts for label in _PARTS.values()):
        *others, last = _PARTS.values()
        raise ValueError(f"parts is {text!r}: use {', '.join(others)} or {last}.")
    return _PARTS[name].lower() in parts


def _number(name: str, parameters: Mapping[str, Any]) -> Any:
    """Read a number. Raises ValueError for what is none, or cannot be this one."""
    text = parameters.get(f"{TITLE} {name}", DEFAULTS[name])
    try:
        value: Any = float(text)
    except (TypeError, ValueError, OverflowError):
        value = text
    check_setting(name, value)
    return type(DEFAULTS[name])(value)
