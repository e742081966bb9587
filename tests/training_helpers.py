"""Images to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, count: int = 5, size: tuple[int, int] = (8, 8)) -> Path:
    """Random images in two folders, "one" and "two"."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("one" if number % 2 else "two") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return folder


def words(text: str) -> list[str]:
    """Of a command line."""
    return text.split()
