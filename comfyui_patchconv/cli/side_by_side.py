"""Pictures of one image made in several ways, side by side, with what each differs by below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..files.images import levels
from ..hosts.chart import font

GAIN = 30
"""What differences are multiplied by to be seen."""

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
    """The images in a row, RGB, each `width` pixels wide, and below each `GAIN` times its difference to its reference.

    note: lines that stand where a column without a reference has no difference. foot: a small line at the bottom.
    """
    rows, across = columns[0].image.shape[-2:]
    height = round(width * rows / across)
    whole = (_GAP + (width + _GAP) * len(columns), _TITLE + height + _CAPTION + height + _FOOT + _GAP)
    sheet = Image.new("RGB", whole, _PAPER)
    pen, below = ImageDraw.Draw(sheet), _TITLE + height + _CAPTION
    for number, column in enumerate(columns):
        left = _GAP + number * (width + _GAP)
        middle = left + width / 2
        pen.text((middle, _TITLE / 2 + 4), column.title, _OURS if column.ours else _INK, font(20), "mm")
        sheet.paste(_picture(column.image, (width, height)), (left, _TITLE))
        caption = column.caption
        if column.reference is not None:
            sheet.paste(_difference(column, (width, height)), (left, below))
            caption = ", ".join(filter(None, (caption, f"largest error {column.error:.2g}")))
        else:
            pen.multiline_text((left + 4, below + 4), note, _INK, font(18), spacing=8)
        pen.text((middle, below - _CAPTION / 2), caption, _MUTED, font(16), "mm")
    pen.text((sheet.width - _GAP, sheet.height - _FOOT / 2 - 4), foot, _MUTED, font(13), "rm")
    return sheet


def _picture(image: Tensor, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(levels(image).numpy()).resize(size, Image.Resampling.LANCZOS)


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
