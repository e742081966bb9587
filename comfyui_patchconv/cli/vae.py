"""Decode and encode with a VAE as `--mode` asks: eagerly, each convolution in strips, or streamed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, cast

from torch import Tensor, nn

from ..conv.patch import patched
from ..conv.strip_sizes import DEFAULT_THRESHOLD
from ..conv.tiling import OnStrip
from ..files.packing import SIDE, packing_of
from ..hosts.modes import MODES
from ..streaming import stream

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

MB = 1e6
EAGER = "plain"
"""The mode without strips, by the name that the command line has for it."""

CHOICES = (*MODES, EAGER)


@dataclass(frozen=True)
class Strips:
    """How to decode or encode.

    mode: one of `CHOICES`. splits, threshold: see `Tiling`. budget: see `streaming.stream`.
    """

    mode: str = "patch"
    splits: int = 0
    threshold: int = DEFAULT_THRESHOLD
    budget: Optional[int] = None


def decode(vae: AutoencoderKL, latent: Tensor, strips: Strips = Strips()) -> Tensor:
    """The images `[B, 3, H, W]` of `latent` `[B, C, h, w]`, on the VAE's device."""
    packing, latent = packing_of(vae), latent.to(vae.device)
    if packing is not None:
        latent = packing.unpack(latent)
    with _in_strips(vae.decoder, strips):
        return vae.decode(cast(Any, latent.to(vae.dtype)), return_dict=False)[0]


def encode(vae: AutoencoderKL, image: Tensor, strips: Strips = Strips()) -> Tensor:
    """The latent `[B, C, h, w]` of `image` `[B, 3, H, W]`: the mean of its distribution, as ComfyUI has it."""
    packing = packing_of(vae)
    with _in_strips(vae.encoder, strips):
        latent = vae.encode(image.to(vae.device, vae.dtype), return_dict=False)[0].mode()
    return latent if packing is None else packing.pack(latent)


def scale(vae: AutoencoderKL) -> int:
    """Pixels to a latent's pixel, on either side."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1) * (1 if packing_of(vae) is None else SIDE)


def channels(vae: AutoencoderKL) -> int:
    """Channels of the latents that `vae` decodes."""
    packing = packing_of(vae)
    return vae.config["latent_channels"] if packing is None else packing.channels


def check_channels(vae: AutoencoderKL, latent: Tensor, path: Optional[Path] = None) -> None:
    """Raises ValueError unless `vae` decodes latents of `latent`'s channels."""
    wanted = channels(vae)
    if latent.shape[1] != wanted:
        raise ValueError(
            f"{path or 'the latent'} has {latent.shape[1]} channels and the VAE decodes {wanted}: give the VAE of "
            "the model that made it."
        )


@contextmanager
def _in_strips(model: nn.Module, strips: Strips) -> Iterator[None]:
    if strips.mode == EAGER:
        yield
        return
    watched = sys.stderr.isatty()
    if strips.mode == "stream":
        working = stream(model, budget=strips.budget, on_progress=_percent if watched else None)
    else:
        every = {"predicate": lambda *_: True}  # kernels of 1 too: backends copy their input and output all the same
        on_strip = _progress() if watched else None
        working = patched(model, strips.splits, threshold=strips.threshold, on_strip=on_strip, **every)
    with working:
        try:
            yield
        finally:
            if watched:
                print(end="\r\x1b[K", file=sys.stderr, flush=True)


def _percent(done: int, work: int) -> None:
    if work:
        print(f"\r{done / work:4.0%}", end="", file=sys.stderr, flush=True)


def _progress() -> OnStrip:
    """A line on stderr that counts the convolutions that run in strips."""
    done = 0

    def show(_: nn.Module, rows_done: int, rows: int) -> None:
        nonlocal done
        print(f"\rconvolution {done + 1}: {rows_done / rows:4.0%}", end="", file=sys.stderr, flush=True)
        done += rows_done == rows

    return show
