"""Images in files, and as 8-bit levels."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor

from ..memory.errors import is_out_of_memory
from .atomic import write_whole
from .tensors import existing
from .words import short

if TYPE_CHECKING:
    from PIL import Image


IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""What files of a folder are taken for images."""


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """The image in the file `path`, upright, with 8 bits a channel.

    Raises FileNotFoundError, or ValueError if the file is no image, or one whose levels can be of any brightness.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = existing(path)
    try:
        with _large_images(), Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
            tags = getattr(file, "tag_v2", {})  # of a TIFF
            bits, kind = max(tags.get(_BITS, (8,))), _KINDS_OF_NUMBERS.get(max(tags.get(_KIND_OF_NUMBERS, (1,))))
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow can read: give a PNG, JPEG or WebP file.") from None
    except Exception as error:  # a damaged or hostile image raises anything
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path} cannot be read as an image ({short(str(error))}): it is damaged or too large."
        ) from None
    check_numbers(path, bits, kind)
    return _with_8_bits(image, path) if image.mode[0] in "IF" else image


_BITS, _KIND_OF_NUMBERS = 258, 339
_KINDS_OF_NUMBERS = {1: "whole", 2: "signed", 3: "float", 4: "whole"}
"""Tags of a TIFF, and what the latter says."""


def check_numbers(path: Path, bits: int, kind: Optional[str]) -> None:
    """Raises ValueError for an image in `path` whose levels are numbers of so many bits of which nothing says how
    bright they are. kind: `"whole"`, from 0, `"signed"`, `"float"`, which are from 0 to 1, or None for others."""
    if kind is None or kind == "signed" or (kind == "whole" and bits > 16):
        raise ValueError(
            f"{path} has levels of {bits} bits{' with a sign' * (kind == 'signed')}, which do not say what is white: "
            "export it with 8 or 16 bits a channel."
        )


def check_range(path: Path, low: float, high: float, white: int) -> None:
    """Raises ValueError where the levels of the image in `path`, from `low` to `high`, are not from 0 to `white`."""
    if not 0 <= low <= high <= white:
        raise ValueError(
            f"{path} has levels from {low:g} to {high:g} where 0 is black and {white} is white: export it with 8 or 16 "
            "bits a channel."
        )


def _with_8_bits(image: Image.Image, path: Path) -> Image.Image:
    """Grey of 16 bits, or of numbers from 0 to 1, which Pillow would clip at 255 rather than scale."""
    import numpy as np
    from PIL import Image

    levels, white = np.asarray(image), 1 if image.mode == "F" else 2**16 - 1
    check_range(path, float(levels.min()), float(levels.max()), white)
    return Image.fromarray((levels * (255 / white)).round().astype(np.uint8))


_limit = Lock()


@contextmanager
def _large_images() -> Iterator[None]:
    """Pillow opens images of up to 2^31 pixels within the block: large ones are what this package is for.

    It has one limit for the process, half of the number that it refuses, and a warning from there on. Threads take
    turns, so that each finds the limit that was there before, and puts it back.
    """
    from PIL import Image

    with _limit:
        before = Image.MAX_IMAGE_PIXELS
        if before is not None:  # None is no limit at all
            Image.MAX_IMAGE_PIXELS = max(before, 2**30)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def load_image(path: str | os.PathLike[str], multiple: int = 8) -> Tensor:
    """The image in the file `path` as a VAE's encoder takes it: `[1, 3, H, W]`, float32 from -1 to 1.

    multiple: pixels that height and width are to be a multiple of; what is over is cropped evenly, as ComfyUI does.

    Raises FileNotFoundError, or ValueError if the file is no image or a smaller one than `multiple`.
    """
    import numpy as np

    image = open_image(path).convert("RGB")
    if min(image.size) < multiple:
        raise ValueError(f"{path} is {image.width}x{image.height} pixels: at least {multiple}x{multiple} are needed.")
    width, height = (side - side % multiple for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float().div_(127.5).sub_(1)


def save_image(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write `image` `[1 | 3 | 4, H, W]` from -1 to 1 to `path`, a PNG; what lies outside is clipped.

    Raises ValueError if it holds NaN, which would be a black image, and OSError if it cannot be written.
    """
    from PIL import Image

    if image.isnan().any():
        raise ValueError(f"{path} is not written, the image holds NaN: use float32 or bfloat16, float16 is too narrow.")
    save_picture(path, Image.fromarray(levels(image).numpy()))


def save_picture(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Write `picture` to `path` as a PNG, whole or not at all. Raises OSError if it cannot be written."""
    write_whole(path, lambda file: picture.save(file, "PNG"))


def levels(images: Tensor) -> Tensor:
    """8-bit levels `[…, H, W, C]` of `images` `[…, C, H, W]` from -1 to 1, on the CPU; `[…, H, W]` of one channel."""
    whole = images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to("cpu", torch.uint8)
    return whole.movedim(-3, -1).contiguous() if images.shape[-3] > 1 else whole.squeeze(-3)


def grid(images: Tensor, gap: int = 2) -> Tensor:
    """One image `[C, H, W]` of `images` `[N, C, h, w]` from -1 to 1: side by side, as many as below one another, white
    `gap` pixels between them."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    whole = images.new_ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        whole[:, top : top + height, left : left + width] = image
    return whole
