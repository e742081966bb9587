"""Fill holes from their borders inwards: repeated smoothing that counts valid pixels only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .halo import strips
from .partial import partial_convolution

_STEPS = 8  # of smoothing at each size, for what the coarser size's blocks leave
_FOLLOWED = 2  # of them above `_SMALL`, where edges are kept: what is found in small sizes is only followed there
_SMALL = 512  # pixels: the largest side of a small size
_SIMILAR = 0.1  # of the range of values: neighbours that differ by more hardly count, where edges are kept
_MARGIN = 2  # pixels beside a hole that smoothing reads
_STRIP = 1 << 18  # pixels of which neighbours are gathered at once


@torch.no_grad()
def fill(image: Tensor, mask: Tensor, edge_aware: bool = False) -> Tensor:
    """`image` with its holes filled, as smooth as their surroundings.

    The image is halved by partial convolution until no hole is left, and on the way back each hole takes the coarser
    size's values and is smoothed: a hole of any size costs the same few passes (pull-push, after Gortler et al. 1996).

    image: `[N, C, H, W]`, of floating point, values about 0 to 1. mask: 1 where valid, 0 in holes, `[N, 1, H, W]`.
    edge_aware: go by medians, which shorten edges and do not blur them, and smooth among similar values only (bilateral
        weights): edges that lead into a hole go on in it instead of melting away.

    Raises ValueError for a mask of another shape, or one without any valid pixel.
    """
    if image.dim() != 4 or mask.shape != (image.shape[0], 1, *image.shape[2:]):
        raise ValueError(
            f"image is {tuple(image.shape)} and mask {tuple(mask.shape)}: give [N, C, H, W] and [N, 1, H, W]."
        )
    valid = mask > 0
    if not bool(valid.flatten(1).any(1).all()):
        raise ValueError("the mask covers a whole image: leave some pixels that the rest can be filled from.")
    held = torch.where(valid, image, 0.0).float()
    return torch.where(valid, image, _filled(held, valid, edge_aware).to(image.dtype))


def _filled(image: Tensor, valid: Tensor, edge_aware: bool) -> Tensor:
    if bool(valid.all()):
        return image
    height, width = image.shape[2:]
    to_even = (0, width % 2, 0, height % 2)
    halved = _halved_by_median if edge_aware else _halved
    coarse, coarse_valid = halved(F.pad(image, to_even), F.pad(valid, to_even))
    coarse = _filled(coarse, coarse_valid, edge_aware)
    larger = F.interpolate(coarse, scale_factor=2, mode="nearest" if edge_aware else "bilinear")
    found = torch.where(valid, image, larger[..., :height, :width])
    holes = ~valid.flatten(0, 1).all(0)
    rows, columns = (around(holes.any(dim), _MARGIN) for dim in (1, 0))
    held, fixed, part = image[..., rows, columns], valid[..., rows, columns], found[..., rows, columns]
    for smooth in _smoothing(max(height, width), edge_aware):
        part = torch.where(fixed, held, smooth(part))
    found[..., rows, columns] = part
    return found


def _smoothing(size: int, edge_aware: bool) -> list[Callable[[Tensor], Tensor]]:
    """What to do, one after the other, with an image of which `size` is the largest side."""
    if edge_aware:
        steps = _STEPS if size <= _SMALL else _FOLLOWED
        return [_median] * steps + [_similar_mean] * steps
    return [lambda image: F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)] * _STEPS


def _halved(image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the valid pixels of each 2 x 2 window, and whether it has any."""
    channels = image.shape[1]
    box = nn.Conv2d(channels, channels, 2, 2, groups=channels, device="meta")
    weight = torch.full((channels, 1, 2, 2), 0.25, device=image.device)
    mean, valid = partial_convolution(box, image, weight, None, valid)
    return mean, valid > 0


def _halved_by_median(image: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The median of the valid pixels of each 2 x 2 window, which is a value of theirs, and whether it has any."""
    counted = torch.where(valid, image, torch.nan)
    corners = [counted[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]
    median = torch.stack(corners).nanmedian(0).values
    found = ~median[:, :1].isnan()
    return torch.where(found, median, 0.0), found


def around(holes: Tensor, margin: int) -> slice:
    """The rows from `margin` before the first that has a hole to `margin` behind the last; `holes` `[H]` has one."""
    found = holes.nonzero()
    return slice(max(int(found[0]) - margin, 0), int(found[-1]) + 1 + margin)


def _median(image: Tensor) -> Tensor:
    """The median of each pixel's 5 x 5 neighbourhood, each channel by itself."""
    height, width = image.shape[2:]
    padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
    parts = []
    for first, last in strips(height, max(_STRIP // width, 1)):
        near = [
            padded[..., first + row : last + row, column : column + width] for row in range(5) for column in range(5)
        ]
        parts.append(torch.stack(near).median(0).values)
    return torch.cat(parts, 2)


def _similar_mean(image: Tensor) -> Tensor:
    """The mean of each pixel's 3 x 3 neighbourhood, weighted by how alike the colours are."""
    height, width = image.shape[2:]
    padded = F.pad(image, (1, 1, 1, 1), mode="replicate")
    total, weights = torch.zeros_like(image), torch.zeros_like(image[:, :1])
    for row in range(3):
        for column in range(3):
            other = padded[..., row : row + height, column : column + width]
            weight = (other - image).square().mean(1, keepdim=True).div_(-2 * _SIMILAR**2).exp_()
            total.addcmul_(other, weight)
            weights.add_(weight)
    return total.div_(weights)
