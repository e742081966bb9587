"""Pictures side by side: what is the same is black below, what differs is not."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from comfyui_patchconv.cli.side_by_side import Column, draw

WIDTH = 100


def columns(changed: torch.Tensor, eager: torch.Tensor) -> Image.Image:
    return draw([Column("eager", eager), Column("same", eager, eager), Column("other", changed, eager)], "", WIDTH)


def below(picture: Image.Image, number: int) -> np.ndarray:
    """The middle of the difference that stands below an image."""
    left = 14 + number * (WIDTH + 14)
    return np.asarray(picture)[-90:-60, left + 20 : left + WIDTH - 20].astype(int)


def test_only_what_differs_is_bright() -> None:
    eager = torch.linspace(-1, 1, 64).expand(3, 64, 64)
    picture = columns(eager + 0.1, eager)
    assert below(picture, 1).max() == 0
    assert below(picture, 2).min() > 100


def test_the_error_is_relative_to_the_range() -> None:
    eager = torch.linspace(-1, 1, 64).expand(3, 64, 64)
    assert abs(Column("other", eager + 0.1, eager).error - 0.05) < 1e-6
    assert Column("eager", eager).error == 0


def test_an_image_of_one_colour_is_drawn() -> None:
    flat = torch.zeros(3, 64, 64)
    assert below(columns(flat, flat), 2).max() == 0
