"""What the values of a command line may be: types for `argparse`."""

from __future__ import annotations

import argparse
import math
import re

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def natural(text: str) -> int:
    """A whole number from 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def seed(text: str) -> int:
    """A whole number that torch's generators take."""
    found = natural(text)
    if found >= 2**64:
        raise argparse.ArgumentTypeError(f"{text} is too large: use a seed below 2^64")
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


def size(text: str) -> int:
    """Bytes of `2GiB`, `1.5 GB`, `800MB` or a bare number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B|)", text, re.ASCII | re.IGNORECASE)
    unit = found[2].lower() if found else ""
    scale = (1024 if "i" in unit else 1000) ** (" kmgt".index(unit[0]) if unit not in ("", "b") else 0)
    value = round(float(found[1]) * scale) if found else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size above 0 such as 2GiB or 800MB")
    return value


def device(text: str) -> torch.device:
    """A device that can be used here: `gpu`, or as torch names them."""
    try:
        found = torch.device("cuda" if text == "gpu" else text)
        torch.empty(1, device=found).cpu()
    except Exception as error:  # each backend has its own way to be missing
        reason = first_line(error).split(". ")[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({reason})") from None
    return found


def first_line(error: BaseException) -> str:
    """Of what an error says, without its full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
