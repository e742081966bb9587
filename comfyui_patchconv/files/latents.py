"""Latents in files: ComfyUI's `.latent`, and others that hold one tensor."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .tensors import FLOATS, read_header, save_tensors
from .words import listed, shape_of, short

SCALE = 0.18215
"""What ComfyUI divides latents by that were saved before its files had `latent_format_version_0`."""


def load_latent(path: str | os.PathLike[str]) -> Tensor:
    """The latent in the file `path`, `[N, C, H, W]` in float32, scaled as a VAE's decoder takes it.

    path: ComfyUI's `.latent`, or any safetensors file that holds one tensor, `[N, C, H, W]` or `[C, H, W]`, or one
        of several called `latent_tensor`, `samples`, `latents` or `latent`.

    Raises FileNotFoundError, or ValueError if the file is damaged, holds no latent, or one with NaN or infinity.
    """
    path = Path(path)
    header = read_header(path)
    names = [name for name in header if not name.startswith("latent_format_version")]
    known = [name for name in ("latent_tensor", "samples", "latents", "latent") if name in names]
    if not known and len(names) != 1:
        raise ValueError(
            f"{path} holds {listed(names)} and none is called latent_tensor: give a .latent file from ComfyUI's "
            "SaveLatent, or a safetensors file with one tensor."
        )
    name = (known or names)[0]
    dtype, shape = header[name]
    if dtype not in FLOATS:
        raise ValueError(
            f"{path}: {short(name)} is of type {short(dtype, 20)}: a latent is of float32, float16 or bfloat16."
        )
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(
            f"{path}: {short(name)} has the shape {shape_of(shape)}: a latent is [batch, channels, height, width]."
        )
    with safe_open(path, "pt") as file:
        latent = file.get_tensor(name).to(torch.float32)
    if not torch.isfinite(latent).all():
        raise ValueError(f"{path}: {short(name)} holds NaN or infinity: it cannot be decoded, make it anew.")
    if name == "latent_tensor" and "latent_format_version_0" not in header:
        latent = latent / SCALE
    return latent if latent.dim() == 4 else latent[None]


def save_latent(path: str | os.PathLike[str], latent: Tensor) -> None:
    """Write `latent` `[N, C, H, W]` as ComfyUI's `.latent`, for its LoadLatent, in float32, whole or not at all.

    Raises OSError where that cannot be.
    """
    save_tensors(path, {"latent_tensor": latent.float(), "latent_format_version_0": torch.tensor([])})
