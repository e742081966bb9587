"""A square of the demo's photograph, as the demo's VAE decodes it, for pictures of the docs."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

from comfyui_patchconv.cli.demo import PHOTOGRAPH, SMALL_VAE
from comfyui_patchconv.cli.vae import RunOptions, decode
from comfyui_patchconv.files.latents import load_latent
from comfyui_patchconv.files.vae import load_vae

_TOP, _LEFT, _SIDE = 0, 48, 72  # where the raccoon looks at one, in the latent's pixels


@cache
@torch.inference_mode()
def photograph() -> Tensor:
    """`[3, 576, 576]` in 0..1."""
    image = decode(load_vae(SMALL_VAE), load_latent(PHOTOGRAPH), RunOptions("stream"))[0]
    top, left, side = (8 * value for value in (_TOP, _LEFT, _SIDE))
    return image[:, top : top + side, left : left + side].add(1).div(2).clamp(0, 1)


def latent_colours() -> Tensor:
    """`[3, 72, 72]` in 0..1: the latent's first three channels, each over its own range."""
    latent = load_latent(PHOTOGRAPH)[0, :3, _TOP : _TOP + _SIDE, _LEFT : _LEFT + _SIDE]
    low, high = (latent.flatten(1).quantile(share, 1)[:, None, None] for share in (0.02, 0.98))
    return ((latent - low) / (high - low)).clamp(0, 1)
