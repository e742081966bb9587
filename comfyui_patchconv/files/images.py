"""Images in files, and as 8-bit levels."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

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

    Raises FileNotFoundError, or ValueError if the file is no image.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = existing(path)
    try:
        with _large_images(), Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            image.load()
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not an image that Pillow can read: give a PNG, JPEG or WebP file.") from None
    except Exception as error:  # a damaged or hostile image raises anything
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path} cannot be read as an image ({short(str(error))}): it is damaged or too large."
        ) from None
    return image


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
