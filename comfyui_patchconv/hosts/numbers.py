"""The numbers that users give."""

from __future__ import annotations

from typing import Any


def check_number(name: str, value: Any, unit: str, whole: bool = False) -> None:
    """Raise ValueError, in a sentence, for what is no finite number of at least 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
    if not number or (whole and value != int(value)):
        raise ValueError(f"{name} is {value!r}: use a number of {unit}, or 0.")


def check_range(name: str, value: Any, least: float, most: float, whole: bool = False) -> None:
    """Raise ValueError, in a sentence, for what is no number from `least` to `most`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
    if not number or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name} is {value!r}: use a {kind} from {_plain(least)} to {_plain(most)}.")


def _plain(value: float) -> str:
    return str(int(value) if value == int(value) else value)
