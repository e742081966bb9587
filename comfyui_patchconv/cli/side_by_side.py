"""Pictures of one image made in several ways, side by side, with a closer look and what each differs by below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from ..files.images import levels
from ..hosts.chart import font

GAIN = 30
"""What differences are multiplied by to be seen."""

CLOSER, _FLAT = 9, 2
"""A closer look is at one part of so many of the width, and so many times wider than high."""

_GAP, _TITLE, _CAPTION, _FOOT = 14, 44, 34, 24
_INK, _MUTED, _OURS, _PAPER = "#1f2430", "#667085", "#1668c7", "#ffffff"


@dataclass(frozen=True)
class Column:
    """One way: what it is called, its image `[3, H, W]` from -1 to 1, and the one it is compared with, if any.

    caption: a line below the image. ours: the title is in colour.
    """

    title: str
    image: Tensor
    reference: Optional[Tensor] = None
    caption: str = ""
    ours: bool = False

    @property
    def error(self) -> float:
        """The largest difference to the reference, relative to the reference's range; 0 without one."""
        if self.reference is None:
            return 0.0
        return float(_error(self.image, self.reference).max())


def draw(columns: Sequence[Column], note: str, width: int = 440, foot: str = "") -> Image.Image:
    """The images in a row, RGB, each `width` pixels wide; below each a closer look at the place where most differs,
    which is framed in the images, and `GAIN` times its difference to its reference.

    note: lines that stand where a column without a reference has no difference. foot: a small line at the bottom.
    """
    rows, across = columns[0].image.shape[-2:]
    size, closer = (width, round(width * rows / across)), (width, width // _FLAT)
    look, below = _TITLE + size[1] + _GAP, _TITLE + size[1] + _GAP + closer[1] + _CAPTION
    sheet = Image.new("RGB", (_GAP + (width + _GAP) * len(columns), below + size[1] + _FOOT + _GAP), _PAPER)
    pen, place = ImageDraw.Draw(sheet), farthest(columns)
    for number, column in enumerate(columns):
        left = _GAP + number * (width + _GAP)
        middle = left + width / 2
        pen.text((middle, _TITLE / 2 + 4), column.title, _OURS if column.ours else _INK, font(20), "mm")
        sheet.paste(_picture(column.image).resize(size, Image.Resampling.LANCZOS), (left, _TITLE))
        frame = [round(edge * width / across) for edge in place]
        pen.rectangle([left + frame[0], _TITLE + frame[1], left + frame[2], _TITLE + frame[3]], outline=_PAPER, width=2)
        sheet.paste(_picture(column.image).crop(place).resize(closer, Image.Resampling.NEAREST), (left, look))
        caption = column.caption
        if column.reference is not None:
            sheet.paste(_difference(column, size), (left, below))
            caption = ", ".join(filter(None, (caption, f"largest error {column.error:.2g}")))
        else:
            pen.multiline_text((left + 4, below + 4), note, _INK, font(18), spacing=8)
        pen.text((middle, below - _CAPTION / 2), caption, _MUTED, font(16), "mm")
    pen.text((sheet.width - _GAP, sheet.height - _FOOT / 2 - 4), foot, _MUTED, font(13), "rm")
    return sheet


def farthest(columns: Sequence[Column]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of the images in which one of them differs most from its reference, on
    the mean over its pixels."""
    rows, across = columns[0].image.shape[-2:]
    width = max(across // CLOSER, 1)
    height = max(min(width // _FLAT, rows), 1)
    errors = [_error(one.image, one.reference).mean(0) for one in columns if one.reference is not None]
    error = torch.stack(errors).amax(0) if errors else torch.zeros(rows, across)
    means = F.avg_pool2d(error[None], (height, width), 1)[0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return left, top, left + width, top + height


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(levels(image).numpy())


def _difference(column: Column, size: tuple[int, int]) -> Image.Image:
    """`GAIN` times the difference to the reference, in each colour, black where there is none."""
    assert column.reference is not None
    error = (GAIN * _error(column.image, column.reference)).clamp(0, 1)
    pixels = (255 * error).round().movedim(0, -1).numpy().astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BOX)


def _error(image: Tensor, reference: Tensor) -> Tensor:
    """How far each value of `image` is from `reference`'s, relative to the range of that."""
    low, high = reference.aminmax()
    return (image - reference).abs() / (high - low).clamp(min=1e-9)  # one colour has no range
