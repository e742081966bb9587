"""Videos in files: MP4 and MKV, written frame by frame by FFmpeg's libraries, through PyAV."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from .atomic import write_whole
from .words import short

SUFFIXES = (".mp4", ".mkv")
"""Of files that can be written."""

_KINDS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    ".mp4": ("mp4", "libx264", "yuv420p", {"crf": "16"}),
    ".mkv": ("matroska", "ffv1", "bgr0", {"level": "3", "slicecrc": "1"}),
}
"""Container, codec, pixels and options: what all players play, and what loses nothing."""

_EXACT = 1001
"""The largest denominator of a rate, as that of 24000 / 1001 frames a second."""


def save_video(path: str | os.PathLike[str], frames: Tensor, rate: float) -> None:
    """Write `frames` `[3, T, H, W]`, 8-bit levels, to `path`, whole or not at all: an MP4 in H.264, nearly without
    loss, or an MKV in FFV1, without any.

    rate: frames a second. Raises ValueError for sides that H.264 cannot have, OSError if it cannot be written, and
    ModuleNotFoundError without `av`.
    """
    import av  # pyright: ignore[reportMissingImports]
    from av.error import FFmpegError  # pyright: ignore[reportMissingImports]

    path = Path(path)
    container, codec, pixels, options = _KINDS[path.suffix.lower()]
    _, count, height, width = frames.shape
    if pixels == "yuv420p" and (height % 2 or width % 2):
        raise ValueError(f"{path} would have {width}x{height} pixels, and H.264 needs even sides: write a .mkv.")

    def write(file: BinaryIO) -> None:
        with av.open(file, "w", format=container) as opened:
            stream: Any = opened.add_stream(codec, Fraction(rate).limit_denominator(_EXACT), options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, pixels
            for number in range(count):
                picture = frames[:, number].permute(1, 2, 0).contiguous().numpy()
                opened.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            opened.mux(stream.encode())

    try:
        write_whole(path, write)
    except FFmpegError as error:
        raise OSError(f"{path} cannot be written ({short(str(error))}): use another name, or PNG.") from None
