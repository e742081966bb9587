"""What the values of a command line may be: types for `argparse`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from ..memory.errors import first_line
from ..units import bytes_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_YEAR = 366 * 24 * 3600
"""Seconds: more than any process is waited for."""


_DIGITS = 20
"""Of a whole number: those of the largest seed. Python turns no text of several thousand into a number."""


def path_of(text: str) -> Path:
    """A file or a folder. Nothing, as a variable that is not set leaves it, is not taken for the folder at hand."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty: give one, or . for the folder at hand")
    return Path(text)


def natural(text: str) -> int:
    """A whole number from 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    if len(text.lstrip("0")) > _DIGITS:
        raise argparse.ArgumentTypeError(f"{text[:20]}… is too large: use at most {_DIGITS} digits")
    return int(text)


def seed(text: str) -> int:
    """A whole number that torch's generators take."""
    found = natural(text)
    if found >= 2**64:
        raise argparse.ArgumentTypeError(f"{text} is too large: use a seed below 2^64")
    return found


def seconds(text: str) -> int:
    """Whole seconds, at most a year."""
    found = natural(text.lstrip("0")[:_DIGITS] or text)  # more digits than that are more than a year
    if found > _YEAR:
        raise argparse.ArgumentTypeError(f"{text[:20]} is more than a year: use at most {_YEAR} seconds")
    return found


def number(text: str) -> float:
    """A number that is neither infinite nor none."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return found


def rate(text: str) -> float:
    """Frames a second, at least one in 1000 seconds, which files can still say, and at most 1000."""
    found = number(text)
    if not 0.001 <= found <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.001 and 1000 frames a second")
    return found


def size(text: str) -> int:
    """Bytes of `2GiB`, `1.5 GB`, `800MB` or a bare number."""
    try:
        return bytes_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device(text: str) -> torch.device:
    """A device that can be used here: `gpu`, or as torch names them."""
    try:
        found = torch.device("cuda" if text == "gpu" else text)
        torch.empty(1, device=found).cpu()
    except Exception as error:  # each backend has its own way to be missing
        reason = first_line(error).split(". ")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({reason})") from None
    return found
