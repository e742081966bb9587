"""Latents of images, videos and sounds in files: ComfyUI's `.latent`, and others that hold one tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .tensors import FLOATS, opened, save_tensors
from .vaes.family import Medium
from .words import listed, shape_of, short

SCALE = 0.18215
"""What ComfyUI divides latents by that were saved before its files had `latent_format_version_0`."""


_SIDES: dict[Medium, str] = {
    "image": "channels, height, width",
    "video": "channels, frames, height, width",
    "sound": "channels, length",
}
"""What a latent's sides are, behind the batch."""


def load_latent(path: str | os.PathLike[str], medium: Medium = "image", trust: bool = False) -> Tensor:
    """The latent in the file `path` in float32, scaled as a VAE's decoder takes it: `[N, C, H, W]` of images,
    `[N, C, T, H, W]` of videos, `[N, C, L]` of sounds.

    path: ComfyUI's `.latent`, or any file of safetensors or `torch.save` that holds one tensor, with or without a
        batch, or one of several called `latent_tensor`, `samples`, `latents` or `latent`.
    medium: what the latent is of. A file of a video's may hold images, `[N, C, H, W]`, which stay that; one of an image
        may hold a video of one frame.
    trust: a file of `torch.save`; see `tensors.unpickled`.

    Raises FileNotFoundError, or ValueError if the file is damaged, holds no latent, or one with NaN or infinity.
    """
    path = Path(path)
    header, read = opened(path, trust)
    name = _name_of(path, header)
    dtype, shape = header[name]
    if dtype not in FLOATS:
        raise ValueError(
            f"{path}: {short(name)} is of type {short(dtype, 20)}: a latent is of float32, float16 or bfloat16."
        )
    sides = _SIDES[medium].count(",") + 1
    still = len(shape) == 4 if medium == "video" else medium == "image" and len(shape) == 5 and shape[2] == 1
    if 0 in shape or not (still or len(shape) in (sides, sides + 1)):
        raise ValueError(
            f"{path}: {short(name)} has the shape {shape_of(shape)}: a latent of this VAE is [batch, {_SIDES[medium]}]."
        )
    latent = read(name).to(torch.float32)
    if not torch.isfinite(latent).all():
        raise ValueError(f"{path}: {short(name)} holds NaN or infinity: it cannot be decoded, make it anew.")
    if name == "latent_tensor" and "latent_format_version_0" not in header:
        latent = latent / SCALE
    if still:
        return latent if medium == "video" else latent[:, :, 0]
    return latent if latent.dim() == sides + 1 else latent[None]


def _name_of(path: Path, names: Iterable[str]) -> str:
    """Which of a file's tensors is the latent. Raises ValueError where none is sure to be."""
    names = [name for name in names if not name.startswith("latent_format_version")]
    known = [name for name in ("latent_tensor", "samples", "latents", "latent") if name in names]
    if not known and len(names) != 1:
        raise ValueError(
            f"{path} holds {listed(names)} and none is called latent_tensor: give a .latent file from ComfyUI's "
            "SaveLatent, or a file with one tensor."
        )
    return (known or names)[0]


def save_latent(path: str | os.PathLike[str], latent: Tensor) -> None:
    """Write `latent` `[N, C, …]` as ComfyUI's `.latent`, for its LoadLatent, in float32, whole or not at all.

    Raises OSError where that cannot be.
    """
    save_tensors(path, {"latent_tensor": latent.float(), "latent_format_version_0": torch.tensor([])})
