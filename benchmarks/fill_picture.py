"""Draws a landscape with a hole, fills it, and writes the pictures of docs/ and example_workflows/.

python benchmarks/fill_picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image
from torch import Tensor

from comfyui_patchconv.fill import fill

SIZE = 384
GAP = 8


def landscape() -> Tensor:
    """Sky, sun and two hills, `[1, 3, H, W]`."""
    y, x = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    image = torch.stack([0.35 + 0.4 * y, 0.55 + 0.3 * y, 0.85 + 0.1 * y])
    far, near = y > 0.55 + 0.08 * torch.sin(9 * x + 2), y > 0.7 + 0.1 * torch.sin(6 * x)
    for shape, colour in (
        ((x - 0.72) ** 2 + (y - 0.22) ** 2 < 0.01, torch.stack([1 + 0 * x, 0.9 + 0 * x, 0.6 + 0 * x])),
        (far, torch.stack([0.32 + 0.1 * x, 0.5 + 0.05 * y, 0.45 + 0 * x])),
        (near, torch.stack([0.2 + 0.15 * x, 0.42 + 0.1 * y, 0.18 + 0 * x])),
    ):
        image = torch.where(shape, colour, image)
    return image[None]


def with_checks(image: Tensor, mask: Tensor) -> Tensor:
    """The image with a chequered pattern where the mask is 0."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return torch.where(mask > 0, image, 0.75 + 0.2 * ((rows // 12 + columns // 12) % 2))


def save(panels: list[Tensor], path: Path) -> None:
    gap = torch.ones(1, 3, SIZE, GAP)
    row = torch.cat([part for panel in panels for part in (gap, panel)][1:], 3)
    pixels = row[0].movedim(0, -1).clamp(0, 1).mul(255).round().byte().numpy()
    Image.fromarray(pixels).save(path, quality=90)


def main() -> None:
    image, mask = landscape(), torch.ones(1, 1, SIZE, SIZE)
    mask[..., 150:310, 90:300] = 0
    mask[..., :36] = 0
    before, smooth, edges = with_checks(image, mask), fill(image, mask), fill(image, mask, edge_aware=True)
    save([before, smooth, edges], ROOT / "docs" / "fill.png")
    save([before, edges], ROOT / "example_workflows" / "partial_conv_inpainting.jpg")


if __name__ == "__main__":
    main()
