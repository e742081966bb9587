"""The choices that users make."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def check_option(name: str, value: Any, options: Collection[str]) -> None:
    """Raise ValueError, in a sentence, for what is not of `options`, of which there are several.

    ComfyUI compares what is chosen in a node, but not what a link brings.
    """
    known = [*options]  # what is no text may have no hash
    if value not in known:
        raise ValueError(f"{name} is {value!r}: use {', '.join(known[:-1])} or {known[-1]}.")
