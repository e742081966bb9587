"""Images in tiles as ComfyUI cuts and blends them (`comfy.utils.tiled_scale`), around any function."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]


def fading(model: Model, image: Tensor, tile: tuple[int, int], overlap: int, scale: float) -> Tensor:
    """`model(image)` in tiles: `overlap` pixels are in two tiles, and each fades out over them.

    tile: rows and columns. scale: rows of the result to one of the image, 1/8 where a VAE encodes.
    """
    height, width = image.shape[-2:]
    total = weights = None
    for top, left in places(height, width, tile, overlap):
        top, left = max(min(top, height - tile[0]), 0), max(min(left, width - tile[1]), 0)
        made = model(image[..., top : top + tile[0], left : left + tile[1]])
        if total is None or weights is None:
            total = made.new_zeros((*made.shape[:2], round(height * scale), round(width * scale)))
            weights = torch.zeros_like(total[:, :1])
        fade = round(overlap * scale)
        mask = edges(made.shape[-2], fade, top > 0, top + tile[0] < height, made)[:, None]
        mask = mask * edges(made.shape[-1], fade, left > 0, left + tile[1] < width, made)
        rows, columns = (round(start * scale) for start in (top, left))
        where = slice(rows, rows + made.shape[-2]), slice(columns, columns + made.shape[-1])
        total[..., where[0], where[1]] += made * mask
        weights[..., where[0], where[1]] += mask
    assert total is not None
    assert weights is not None
    return total / weights


def thrice(model: Model, image: Tensor, tile: int, overlap: int, scale: float) -> Tensor:
    """`model(image)` as ComfyUI's VAE in tiles: the mean of tall, wide and square tiles of as many pixels."""
    shapes = ((2 * tile, tile // 2), (tile // 2, 2 * tile), (tile, tile))
    results = (fading(model, image, shape, overlap, scale) for shape in shapes)
    return (next(results) + next(results) + next(results)) / 3.0


def places(height: int, width: int, tile: tuple[int, int], overlap: int) -> Iterator[tuple[int, int]]:
    """The upper left corners of tiles."""
    for top in range(0, max(height - overlap, 1), tile[0] - overlap):
        for left in range(0, max(width - overlap, 1), tile[1] - overlap):
            yield top, left


def edges(length: int, fade: int, before: bool, after: bool, like: Tensor) -> Tensor:
    """What a tile counts along one side: less towards a neighbour."""
    mask = torch.ones(length, device=like.device, dtype=like.dtype)
    ramp = torch.arange(1, fade + 1, device=like.device, dtype=like.dtype) / fade
    if before:
        mask[:fade] *= ramp
    if after:
        mask[-fade:] *= ramp.flip(0)
    return mask
