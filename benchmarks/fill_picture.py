"""Draws a landscape with a hole, fills it, and writes the pictures of docs/ and example_workflows/.

python benchmarks/fill_picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from landscapes import Scene, draw
from PIL import Image
from torch import Tensor

from comfyui_patchconv.conv.fill import fill

SIZE = 384
GAP = 8


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
    image, mask = draw(Scene(), SIZE), torch.ones(1, 1, SIZE, SIZE)
    mask[..., 150:310, 90:300] = 0
    mask[..., :36] = 0
    before, smooth, edges = with_checks(image, mask), fill(image, mask), fill(image, mask, edge_aware=True)
    save([before, smooth, edges], ROOT / "docs" / "fill.png")
    save([before, edges], ROOT / "example_workflows" / "partial_conv_inpainting.jpg")


if __name__ == "__main__":
    main()
