"""What `patchconv decode` makes of latents, by what their VAE is of: pictures, videos and sounds, and their files."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from ..files.image_rows import empty
from ..files.images import save_image, save_picture
from ..files.sounds import SUFFIXES as SOUNDS
from ..files.sounds import quieter, save_sound
from ..files.vaes import traits_of
from ..files.vaes.family import Medium
from ..files.videos import SUFFIXES as VIDEOS
from ..files.videos import save_video
from ..memory.recorder import Recorder
from ..units import time_of
from .options import Choices, say
from .outputs import Outputs
from .processes import Processes
from .vae import Halves

FORMATS: dict[Medium, tuple[str, ...]] = {"image": (".png",), "video": (".png", *VIDEOS), "sound": SOUNDS}
"""How names of files end, by what is in them: the usual one first."""

_NEEDED = {".png": "PIL", **dict.fromkeys(VIDEOS, "av"), **dict.fromkeys(SOUNDS, "soundfile")}
"""What has to be installed to write a file."""


def formats_of(medium: Medium, wanted: Optional[str]) -> tuple[str, ...]:
    """How names of files may end, where those of the format `wanted`, or of any, are written; the usual one first.

    Raises ValueError for a format that is of another medium.
    """
    if wanted is None:
        return FORMATS[medium]
    if f".{wanted}" not in FORMATS[medium]:
        known = " or ".join(suffix[1:] for suffix in FORMATS[medium])
        raise ValueError(f"--format is {wanted} and the VAE is of {medium}s: use {known}.")
    return (f".{wanted}",)


def check_installed(suffix: str) -> None:
    """Raises ModuleNotFoundError where a file of that name's end could not be written for want of a library."""
    importlib.import_module(_NEEDED[suffix])


@dataclass(frozen=True)
class Decoding:
    """Decodes latents, and writes what it makes. rate: frames a second of a video; None for that of the VAE's model."""

    halves: Halves
    outputs: Outputs
    processes: Processes
    rate: Optional[float] = None

    def of(self, path: Path, latent: Tensor) -> None:
        """Decode `latent` `[N, C, …]` of the file `path`. Raises what decoding and writing raise."""
        of: dict[Medium, Callable[[Path, Tensor], None]] = {
            "image": self._pictures,
            "video": self._videos,
            "sound": self._sounds,
        }
        of[traits_of(self.halves.vae).medium](path, latent)

    def _pictures(self, path: Path, latent: Tensor) -> None:
        for (name,), sample in self._each(path, latent):
            with self._working() as (recorder, choices):
                image = self.halves.decode(sample, choices)[0]
            if self.processes.writes:
                save_image(name, image)
            say(f"{name}: {image.shape[2]}x{image.shape[1]}", recorder, choices)

    def _videos(self, path: Path, latent: Tensor) -> None:
        latent = latent[:, :, None] if latent.dim() == 4 else latent
        traits, moving = traits_of(self.halves.vae), self.outputs.suffix_of(path) in VIDEOS
        rate = self.rate or traits.rate
        count = 1 if moving else traits.frames_of(latent.shape[2])
        for names, sample in self._each(path, latent, count):
            with self._working() as (recorder, choices):
                levels, total = self.halves.decode(sample, choices, _levels)
            frames, kept = levels[0], [name for name in names if name is not None]
            if not total.isfinite():
                raise ValueError(f"{kept[0]} is not written, the video holds NaN: use float32 or bfloat16.")
            if self.processes.writes and moving:
                save_video(kept[0], frames, rate)
            elif self.processes.writes:
                _save_frames(names, frames)
            what = f"{frames.shape[3]}x{frames.shape[2]}"
            if moving or frames.shape[1] > 1:
                what = f"{frames.shape[1]} frames of {what}" + (f", {rate:g} a second" if moving else "")
            say(f"{_from(kept)}: {what}", recorder, choices)

    def _sounds(self, path: Path, latent: Tensor) -> None:
        rate = int(traits_of(self.halves.vae).rate)
        for (name,), sample in self._each(path, latent):
            with self._working() as (recorder, choices):
                sound = quieter(self.halves.decode(sample, choices, _kept)[0])
            if self.processes.writes:
                save_sound(name, sound, rate)
            say(f"{name}: {time_of(sound.shape[1] / rate)} of sound at {rate} Hz", recorder, choices)

    def _each(self, path: Path, latent: Tensor, parts: int = 1) -> Iterator[tuple[list[Any], Tensor]]:
        """Each sample of a batch `latent` with the files of its `parts`, None for one that is there; but for a sample
        all of whose files are."""
        names = self.processes.as_first_has_it(lambda: self.outputs.of(path, len(latent), parts))
        for number, sample in enumerate(latent.split(1)):
            own = names[number * parts : (number + 1) * parts]
            if any(own):
                yield own, sample

    @contextmanager
    def _working(self) -> Iterator[tuple[Recorder, Choices]]:
        choices = Choices()
        with Recorder(self.halves.vae.device) as recorder:
            yield recorder, choices


def _levels(video: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit levels of `video` `[1, 3, T, H, W]` from -1 to 1, on the CPU, in a file where they are many; and its sum,
    which is none where it holds NaN."""
    levels = empty(tuple(video.shape), torch.uint8)
    levels.copy_(video.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8))
    return levels, video.float().sum()


def _kept(sound: Tensor) -> Tensor:
    """`sound` in float32 on the CPU, in a file where it is long."""
    kept = empty(tuple(sound.shape), torch.float32)
    kept.copy_(sound)
    return kept


def _save_frames(names: list[Optional[Path]], frames: Tensor) -> None:
    """Write each of `frames` `[3, T, H, W]` to its PNG, but for those without a name."""
    from PIL import Image

    for number, name in enumerate(names):
        if name is not None:
            save_picture(name, Image.fromarray(frames[:, number].permute(1, 2, 0).contiguous().numpy()))


def _from(names: list[Path]) -> str:
    return str(names[0]) if len(names) == 1 else f"{names[0]} to {names[-1].name}"
