"""Pictures side by side: what is the same is black below, what differs is not."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from comfyui_patchconv.cli.side_by_side import Column, draw, farthest

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


def test_a_closer_look_is_where_an_image_differs_most() -> None:
    eager = torch.linspace(-1, 1, 90).expand(3, 60, 90)
    changed = eager.clone()
    changed[0, 3, 3] += 2  # one pixel, and below a place with more
    changed[:, 40:45, 50:60] += 0.5
    place = farthest([Column("eager", eager), Column("same", eager, eager), Column("other", changed, eager)])
    assert place == (50, 40, 60, 45)
    assert farthest([Column("eager", eager)]) == (0, 0, 10, 5)


def test_an_image_of_few_pixels_is_drawn() -> None:
    tiny = torch.zeros(3, 1, 2)
    assert columns(tiny + 0.5, tiny).width == 14 + 3 * (WIDTH + 14)
