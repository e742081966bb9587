"""Landscapes drawn by code: sky, sun or moon, and two hills."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Colour = tuple[float, float, float]

_SMOOTH = 4  # pixels drawn for each that is kept, on either side


@dataclass(frozen=True)
class Scene:
    """Colours in 0..1; places and heights as shares of the picture's side.

    sky: colour at the top, and what is added to it until the bottom. sun: its colour, at `place` (x, y) with `radius`.
    far, near: of a hill its colour, what is added to it from left to right, and from top to bottom.
    far_line, near_line: of a hill its mean height, and amplitude, frequency and phase of the wave.
    """

    sky: Colour = (0.35, 0.55, 0.85)
    dawn: Colour = (0.4, 0.3, 0.1)
    sun: Colour = (1.0, 0.9, 0.6)
    place: tuple[float, float] = (0.72, 0.22)
    radius: float = 0.1
    far: Colour = (0.32, 0.5, 0.45)
    far_line: tuple[float, float, float, float] = (0.55, 0.08, 9, 2)
    near: Colour = (0.2, 0.42, 0.18)
    near_line: tuple[float, float, float, float] = (0.7, 0.1, 6, 0)


def draw(scene: Scene, size: int) -> Tensor:
    """`[1, 3, size, size]` in 0..1, without smoothing."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")

    def colour(of: Colour, right: Colour = (0, 0, 0), down: Colour = (0, 0, 0)) -> Tensor:
        return torch.stack([a + b * x + c * y for a, b, c in zip(of, right, down)])

    def below(height: float, amplitude: float, frequency: float, phase: float) -> Tensor:
        return y > height + amplitude * torch.sin(frequency * x + phase)

    image = colour(scene.sky, down=scene.dawn)
    for shape, filled in (
        ((x - scene.place[0]) ** 2 + (y - scene.place[1]) ** 2 < scene.radius**2, colour(scene.sun)),
        (below(*scene.far_line), colour(scene.far, (0.1, 0, 0), (0, 0.05, 0))),
        (below(*scene.near_line), colour(scene.near, (0.15, 0, 0), (0, 0.1, 0))),
    ):
        image = torch.where(shape, filled, image)
    return image[None]


def drawn_by_chance(seed: int) -> Scene:
    """A scene by day, at dusk or at night."""
    chance = random.Random(seed)
    u = chance.uniform
    sky, dawn, sun = chance.choice(
        [
            ((0.35, 0.55, 0.85), (0.4, 0.3, 0.1), (1.0, 0.95, 0.6)),
            ((0.3, 0.2, 0.45), (0.8, 0.3, -0.15), (1.0, 0.5, 0.3)),
            ((0.03, 0.04, 0.15), (0.1, 0.12, 0.2), (0.9, 0.92, 1.0)),
        ]
    )
    light = 0.35 + 0.65 * sky[2] / 0.85
    far = (u(0.25, 0.4) * light, u(0.4, 0.55) * light, u(0.4, 0.6) * light)
    near = (u(0.15, 0.5) * light, u(0.35, 0.5) * light, u(0.1, 0.25) * light)
    return Scene(
        sky,
        dawn,
        sun,
        (u(0.12, 0.88), u(0.12, 0.4)),
        u(0.06, 0.12),
        far,
        (u(0.45, 0.6), u(0.04, 0.1), u(4, 10), u(0, 6.3)),
        near,
        (u(0.68, 0.85), u(0.03, 0.1), u(3, 8), u(0, 6.3)),
    )


def write(folder: Path, count: int, size: int) -> None:
    """Draw `count` landscapes, smoothed, as PNGs in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image = F.avg_pool2d(draw(drawn_by_chance(number), size * _SMOOTH), _SMOOTH)[0]
        pixels = image.movedim(0, -1).clamp(0, 1).mul(255).round().byte().numpy()
        Image.fromarray(pixels).save(folder / f"{number:05}.png")
