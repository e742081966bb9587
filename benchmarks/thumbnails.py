"""Draws the thumbnails of the example workflows on decoding: what they do, shown on the demo's photograph.

python benchmarks/thumbnails.py
"""

from __future__ import annotations

from pathlib import Path

import demo_photograph
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

FOLDER = Path(__file__).resolve().parents[1] / "example_workflows"
WIDTH, HEIGHT = 768, 512
GROUND, AMBER, PALE = (24, 31, 56), (255, 178, 56), (201, 211, 238)
SMOOTH = 2  # pixels drawn for each that is kept, on either side


def photograph(size: int) -> Image.Image:
    return picture(demo_photograph.photograph()).resize((size, size), Image.Resampling.LANCZOS)


def picture(image: Tensor) -> Image.Image:
    """`[3, H, W]` in 0..1."""
    return Image.fromarray(image.movedim(0, -1).clamp(0, 1).mul(255).round().byte().numpy())


def latent(size: int, cells: int) -> Image.Image:
    """The photograph's latent in `cells`² coloured squares."""
    coarse = F.adaptive_avg_pool2d(demo_photograph.latent_colours(), cells)
    return picture(coarse).resize((size, size), Image.Resampling.NEAREST)


def canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH), GROUND)
    return image, ImageDraw.Draw(image)


def strips(onto: Image.Image, whole: Image.Image, place: tuple[int, int], active: int, count: int, gap: int) -> None:
    """`whole` in strips, the active one framed, with the rows that it reads beside it."""
    draw, (left, top), height = ImageDraw.Draw(onto, "RGBA"), place, whole.height // count
    for number in range(count):
        y = top + number * (height + gap)
        onto.paste(whole.crop((0, number * height, whole.width, (number + 1) * height)), (left, y))
        halo = height // 6
        if number == active - 1:
            draw.rectangle((left, y + height - halo, left + whole.width - 1, y + height - 1), fill=(*AMBER, 170))
        if number == active + 1:
            draw.rectangle((left, y, left + whole.width - 1, y + halo - 1), fill=(*AMBER, 170))
        if number == active:
            frame = (left - gap // 2, y - gap // 2, left + whole.width + gap // 2, y + height + gap // 2)
            draw.rounded_rectangle(frame, gap // 2, outline=AMBER, width=5 * SMOOTH)


def arrow(draw: ImageDraw.ImageDraw, start: int, end: int, y: int) -> None:
    head = 14 * SMOOTH
    draw.line((start, y, end - head, y), fill=PALE, width=6 * SMOOTH)
    draw.polygon([(end, y), (end - head, y - head), (end - head, y + head)], fill=PALE)


def decode_large() -> Image.Image:
    image, draw = canvas()
    small, size, y = 130 * SMOOTH, 400 * SMOOTH, HEIGHT * SMOOTH // 2
    image.paste(latent(small, 24), (40 * SMOOTH, y - small // 2))
    arrow(draw, 190 * SMOOTH, 270 * SMOOTH, y)
    gap = 14 * SMOOTH
    strips(image, photograph(size), (310 * SMOOTH, y - (size + 4 * gap) // 2), 2, 5, gap)
    return image


def stream_budget() -> Image.Image:
    """A memory curve that an eager run would draw, and one that stays below the line of the budget."""
    image, draw = canvas()
    left, right, bottom, top = (value * SMOOTH for value in (60, 708, 440, 70))
    budget = bottom - 120 * SMOOTH
    eager = [(0.0, 0.1), (0.12, 0.18), (0.3, 0.3), (0.42, 0.62), (0.62, 0.68), (0.7, 0.97), (0.93, 0.94), (1.0, 0.1)]
    ours = [(0.0, 0.1), (0.1, 0.2), (0.25, 0.24), (0.4, 0.28), (0.55, 0.25), (0.75, 0.29), (0.92, 0.26), (1.0, 0.1)]

    def curve(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(left + x * (right - left), bottom - value * (bottom - top)) for x, value in points]

    for points, fill in ((eager, (58, 70, 110)), (ours, (70, 140, 230))):
        draw.polygon([(left, bottom), *curve(points), (right, bottom)], fill=fill)
    draw.line(curve(eager), fill=(120, 136, 180), width=4 * SMOOTH, joint="curve")
    draw.line(curve(ours), fill=(160, 205, 255), width=4 * SMOOTH, joint="curve")
    for x in range(left, right, 28 * SMOOTH):
        draw.line((x, budget, x + 16 * SMOOTH, budget), fill=AMBER, width=6 * SMOOTH)
    draw.line((left, bottom, right, bottom), fill=PALE, width=3 * SMOOTH)
    return image


def save_latent_decode_later() -> Image.Image:
    image, draw = canvas()
    y, small, size = HEIGHT * SMOOTH // 2, 220 * SMOOTH, 330 * SMOOTH
    image.paste(latent(small, 24), (50 * SMOOTH, y - small // 2))
    clock, radius = (335 * SMOOTH, y), 34 * SMOOTH
    arrow(draw, 286 * SMOOTH, 388 * SMOOTH, y + 64 * SMOOTH)
    box = (clock[0] - radius, y - radius - 20 * SMOOTH, clock[0] + radius, y + radius - 20 * SMOOTH)
    draw.ellipse(box, outline=AMBER, width=6 * SMOOTH)
    for dx, dy in ((0, -22), (16, 8)):
        hand = (clock[0], y - 20 * SMOOTH, clock[0] + dx * SMOOTH, y + (dy - 20) * SMOOTH)
        draw.line(hand, fill=AMBER, width=6 * SMOOTH)
    image.paste(photograph(size), (398 * SMOOTH, y - size // 2))
    return image


def upscale_image() -> Image.Image:
    """A small picture, coarse, and the same one large and fine, in strips."""
    image, draw = canvas()
    small, size, y = 112 * SMOOTH, 400 * SMOOTH, HEIGHT * SMOOTH // 2
    coarse = photograph(28).resize((small, small), Image.Resampling.NEAREST)
    image.paste(coarse, (48 * SMOOTH, y - small // 2))
    arrow(draw, 186 * SMOOTH, 272 * SMOOTH, y)
    gap = 12 * SMOOTH
    strips(image, photograph(size), (310 * SMOOTH, y - (size + 7 * gap) // 2), 3, 8, gap)
    return image


def main() -> None:
    for draw in (decode_large, stream_budget, save_latent_decode_later, upscale_image):
        draw().resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(FOLDER / f"{draw.__name__}.jpg", quality=90)


if __name__ == "__main__":
    main()
