"""Pictures of any size, mode and depth, read and written a few rows at a time: by libvips, through `pyvips`."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch
from torch import Tensor

from ..memory.mapped import MappedFile
from ..units import size_of
from .atomic import write_whole
from .images import check_numbers, check_range
from .tensors import existing
from .words import short

SUFFIXES = (".png", ".tif", ".tiff")
"""Of files that can be written, the usual one first."""

READ = (*SUFFIXES, ".jpg", ".jpeg", ".webp")
"""What files of a folder are taken for pictures: what libvips reads in all its builds, unlike .bmp."""

_ROWS_BYTES = 32 << 20
"""Bytes of the rows that are read at once."""

_IN_MEMORY = 64 << 20
"""Bytes up to which a picture lies in memory rather than in a file."""

_BIG_TIFF = 3 << 30
"""Bytes of pixels from which TIFF's 32-bit offsets may not do."""

_PROFILE = "icc-profile-data"
_KINDS = {(1, 8): "b-w", (1, 16): "grey16", (3, 8): "srgb", (3, 16): "rgb16"}
"""What libvips calls pictures of so many channels and bits."""

_RAW = {*_KINDS.values(), "multiband", "rgb"}
"""What it calls pictures whose numbers it takes for levels."""

_NUMBERS = {
    "uchar": (8, "whole"), "ushort": (16, "whole"), "uint": (32, "whole"), "float": (32, "float"),
    "char": (8, "signed"), "short": (16, "signed"), "int": (32, "signed"),
}  # fmt: skip
"""What its formats are, as `check_numbers` has it."""

_FORMATS = {8: "uchar", 16: "ushort"}
_OFFSET = 1 << 15
"""What 16-bit levels are stored lower by, for torch has whole numbers with a sign."""


@dataclass
class Picture:
    """A picture that is open. path: its file. image: libvips', of colours and alpha if there is one. bits: of a level,
    8 or 16. profile: of its colours, where they are RGB."""

    path: Path
    image: Any
    bits: int
    profile: Optional[bytes] = None

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height

    @property
    def alpha(self) -> Optional[Any]:
        """The alpha channel alone; None without one."""
        return self.image[self.image.bands - 1] if self.image.hasalpha() else None

    def colours(self, channels: int) -> Any:
        """The picture without alpha, as RGB for three channels, as grey for one. Raises ValueError for others."""
        if channels not in (1, 3):
            raise ValueError(f"A picture has 1 or 3 channels, beside alpha, and {channels} are wanted: choose another.")
        image = self.image.colourspace(_KINDS[channels, self.bits])
        return image[:channels] if image.bands > channels else image

    def pixels(self, channels: int) -> Tensor:
        """`[1, C, H, W]`, float32 from 0 to 1; a large one lies in a file without a name. Raises ValueError for a
        damaged picture, and as `colours`."""
        import numpy as np

        colours, most = self.colours(channels), 2**self.bits - 1
        result = empty((1, channels, self.height, self.width), torch.float32)
        at_once = max(_ROWS_BYTES // (4 * channels * self.width), 1)
        for top in range(0, self.height, at_once):
            count = min(at_once, self.height - top)
            try:
                rows = colours.crop(0, top, self.width, count).cast(_FORMATS[self.bits]).numpy()
            except Exception as error:  # libvips' own, which says on several lines what it met
                raise ValueError(f"{self.path} is damaged ({_said(error)}): export it again.") from None
            rows = rows.reshape(count, self.width, channels).astype(np.float32)
            result[0, :, top : top + count] = torch.from_numpy(rows).movedim(-1, 0).div_(most)
        return result


def open_picture(path: str | os.PathLike[str]) -> Picture:
    """The picture in the file `path`, upright. What has more than 8 bits has 16, a palette has its colours.

    Raises FileNotFoundError, or ValueError for a file that is no picture; ModuleNotFoundError without `pyvips`.
    """
    import pyvips  # pyright: ignore[reportMissingImports]

    path = existing(path)
    try:
        image = pyvips.Image.new_from_file(str(path), fail_on="error").autorot()
        profile = image.get(_PROFILE) if _PROFILE in image.get_fields() else None
        if image.interpretation in _RAW:
            image = _scaled_to_levels(image, path)
        deep = image.format != "uchar"
        if image.interpretation not in _KINDS.values():
            image, profile = image.colourspace("rgb16" if deep else "srgb"), None
        elif deep:  # whatever it says: what it has for its levels is these
            image = image.cast("ushort").copy(interpretation=_KINDS[3 if image.bands > 2 else 1, 16])
        return Picture(path, image, 16 if deep else 8, profile if image.bands > 2 else None)
    except pyvips.Error as error:
        raise ValueError(
            f"{path} cannot be read as a picture ({_said(error)}): give a PNG, JPEG, WebP or TIFF."
        ) from None


def _scaled_to_levels(image: Any, path: Path) -> Any:
    """`image`, whose numbers libvips takes as they are, with levels of 8 or 16 bits. Raises ValueError for numbers that
    do not say how bright they are."""
    check_numbers(path, *_NUMBERS.get(image.format, (64, None)))
    if image.format != "float":
        return image
    found = image.stats()
    low, high, total = (found(place, 0)[0] for place in range(3))
    check_range(path, low if math.isfinite(total) else math.nan, high, 1)
    kind = _KINDS[3 if image.bands > 2 else 1, 16]
    return image.linear(2**16 - 1, 0).rint().cast("ushort").copy(interpretation=kind)


def _said(error: Exception) -> str:
    """What libvips said last; an error of its has several lines."""
    return short(([line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"])[-1])


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without values; a large one in a file without a name, which is no memory of this process's own.

    Raises OSError where there is no room for that file.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= _IN_MEMORY:
        return torch.empty(shape, dtype=dtype)
    return MappedFile(size, _no_room).empty(shape, dtype)


def _no_room(size: int, why: object) -> str:
    return (
        f"{tempfile.gettempdir()} has no room for the {size_of(size)} of the result ({why}): free some, or set TMPDIR "
        "to another folder."
    )


def empty_levels(shape: tuple[int, ...], bits: int) -> Tensor:
    """A tensor for levels of so many bits; see `levels_of`."""
    return empty(shape, torch.uint8 if bits == 8 else torch.int16)


def levels_of(image: Tensor, bits: int) -> Tensor:
    """`image` from 0 to 1 as levels of 8 or 16 bits, the latter less `_OFFSET`."""
    if bits == 8:
        return image.mul(255).round().to(torch.uint8)
    return image.float().mul(2**16 - 1).sub(_OFFSET).round().to(torch.int16)


def save_levels(path: Path, levels: Tensor, source: Picture, alpha: bool) -> None:
    """Write `levels` `[1, C, H, W]` of `levels_of` to `path`, a PNG or TIFF, whole or not at all, row by row.

    source: the picture that they are made of, whose colour profile is kept, and whose alpha too, scaled to their size,
    if `alpha`. Raises OSError where the file cannot be written.
    """
    image = _joined(levels, source)
    if alpha and source.alpha is not None:
        image = image.bandjoin(_scaled(source.alpha, image).cast(image.format))
    if source.profile is not None and levels.shape[1] == 3:
        image = image.copy()
        image.set_type(_blob(), _PROFILE, source.profile)
    write_whole(path, lambda file: _write(image, file, path.suffix.lower()))


def _blob() -> int:
    import pyvips  # pyright: ignore[reportMissingImports]

    return pyvips.GValue.blob_type


def _joined(levels: Tensor, source: Picture) -> Any:
    """The planes of `levels` as one picture, without a copy."""
    import pyvips  # pyright: ignore[reportMissingImports]

    _, channels, height, width = levels.shape
    stored = "uchar" if source.bits == 8 else "short"
    planes = [pyvips.Image.new_from_memory(plane.numpy().reshape(-1), width, height, 1, stored) for plane in levels[0]]
    image = planes[0] if channels == 1 else planes[0].bandjoin(planes[1:])
    if source.bits == 16:
        image = (image + _OFFSET).cast("ushort")
    return image.copy(interpretation=_KINDS[channels, source.bits])


def _scaled(alpha: Any, image: Any) -> Any:
    """`alpha` at the size of `image`, smoothly: where it is all of one level it stays that."""
    across, down = image.width / alpha.width, image.height / alpha.height
    return alpha if (across, down) == (1, 1) else alpha.resize(across, vscale=down, kernel="cubic")


def _write(image: Any, file: BinaryIO, suffix: str) -> None:
    import pyvips  # pyright: ignore[reportMissingImports]

    target = pyvips.Target.new_to_descriptor(file.fileno())
    try:
        if suffix == ".png":
            image.pngsave_target(target, compression=6)
            return
        size = image.width * image.height * image.bands * (1 if image.format == "uchar" else 2)
        image.tiffsave_target(target, compression="deflate", predictor="horizontal", bigtiff=size > _BIG_TIFF)
    except pyvips.Error as error:
        raise OSError(_said(error)) from None
