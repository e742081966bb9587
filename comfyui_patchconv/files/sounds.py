"""Sounds in files: FLAC and WAV, written a piece at a time by libsndfile, through `soundfile`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch
from torch import Tensor

from .atomic import write_whole
from .words import short

SUFFIXES = (".flac", ".wav")
"""Of files that can be written, the usual one first."""

_SUBTYPES = {".flac": "PCM_24", ".wav": "FLOAT"}

_AT_ONCE = 1 << 20
"""Samples of a channel that are looked at, or written, at once."""

_LONG = 4 << 30
"""Bytes from which WAV's 32-bit sizes do not do."""

_LOUD = 5.0
"""How many standard deviations are to lie within the range of a sound."""


def quieter(sound: Tensor) -> Tensor:
    """`sound` `[C, L]`, in place as loud as ComfyUI's VAE Decode Audio has it: five standard deviations above 1 become
    1."""
    parts, count = sound.split(_AT_ONCE, 1), max(sound.numel(), 2)
    mean = sum(float(part.double().sum()) for part in parts) / count
    squares = sum(float(part.double().sub_(mean).square_().sum()) for part in parts)
    loud = _LOUD * (squares / (count - 1)) ** 0.5
    return sound.div_(loud) if loud > 1 else sound


class _Watched:
    """A file for libsndfile, which calls it back and cannot take an exception. failed: the error of a write; None for
    none."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell
        self.failed: Optional[OSError] = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failed = error
            return 0


def save_sound(path: str | os.PathLike[str], sound: Tensor, rate: int) -> None:
    """Write `sound` `[C, L]`, float32 of `rate` samples a second, to `path`, whole or not at all: a FLAC of 24 bits,
    where what lies beyond -1 to 1 is clipped, or a WAV of 32-bit floats.

    Raises ValueError if it holds NaN or infinity, OSError if it cannot be written, ModuleNotFoundError without
    `soundfile`.
    """
    import soundfile  # pyright: ignore[reportMissingImports]

    path = Path(path)
    if not all(bool(part.isfinite().all()) for part in sound.split(_AT_ONCE, 1)):
        raise ValueError(f"{path} is not written, the sound holds NaN or infinity: use float32 or bfloat16.")
    suffix = path.suffix.lower()
    kind = "FLAC" if suffix == ".flac" else "WAV" if sound.numel() * sound.element_size() < _LONG else "RF64"

    def write(file: BinaryIO) -> None:
        watched: Any = _Watched(file)
        try:
            with soundfile.SoundFile(watched, "w", rate, len(sound), _SUBTYPES[suffix], format=kind) as opened:
                for part in sound.split(_AT_ONCE, 1):
                    opened.write(part.clamp(-1, 1).T.contiguous().numpy() if suffix == ".flac" else part.T.numpy())
        except (AssertionError, soundfile.SoundFileError) as error:
            raise watched.failed or OSError(short(str(error))) from None
        if watched.failed is not None:  # when it was closed
            raise watched.failed

    with torch.no_grad():
        write_whole(path, write)
