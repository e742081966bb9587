"""Decode and encode with a VAE as `--mode` asks: eagerly, each convolution in strips, streamed, or whatever fits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.distributed
from torch import Tensor, nn

from ..conv.patch import patched
from ..conv.strip_sizes import DEFAULT_THRESHOLD
from ..conv.tiling import OnStrip
from ..files.packing import SIDE, packing_of
from ..hosts.auto import AutoForward, OnChoice
from ..hosts.eager_needs import EagerNeeds
from ..hosts.estimates import OF_FREE, Needs, needs_of
from ..hosts.modes import MODES
from ..memory.usage import free
from ..streaming import USUAL, stream

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

MB = 1e6
EAGER = "plain"
"""The mode without strips, by the name that the command line has for it."""

CHOICES = (*MODES, EAGER)


@dataclass(frozen=True)
class Strips:
    """How to decode or encode.

    mode: one of `CHOICES`. splits, threshold: see `Tiling`. budget: see `streaming.stream`; for `"auto"` None takes
    what is free. group: the processes to stream over, whatever the mode; None for this one. beside: how many
    processes share what is free. silent_seconds: see `Tuning`.
    """

    mode: str = "auto"
    splits: int = 0
    threshold: int = DEFAULT_THRESHOLD
    budget: Optional[int] = None
    group: Any = None
    beside: int = 1
    silent_seconds: float = USUAL.silent_seconds


def decode(
    vae: AutoencoderKL, latent: Tensor, strips: Strips = Strips(), on_choice: Optional[OnChoice] = None
) -> Tensor:
    """The images `[B, 3, H, W]` of `latent` `[B, C, h, w]`, on the VAE's device. on_choice: see `OnChoice`."""
    packing, latent = packing_of(vae), latent.to(vae.device)
    if packing is not None:
        latent = packing.unpack(latent)
    return _call(vae, "decode", vae.decoder, latent.to(vae.dtype), strips, on_choice)[0]


def encode(
    vae: AutoencoderKL, image: Tensor, strips: Strips = Strips(), on_choice: Optional[OnChoice] = None
) -> Tensor:
    """The latent `[B, C, h, w]` of `image` `[B, 3, H, W]`: the mean of its distribution, as ComfyUI has it.

    on_choice: see `OnChoice`.
    """
    packing = packing_of(vae)
    latent = _call(vae, "encode", vae.encoder, image.to(vae.device, vae.dtype), strips, on_choice)[0].mode()
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


def _call(
    vae: AutoencoderKL, name: str, part: nn.Module, input: Tensor, strips: Strips, on_choice: Optional[OnChoice]
) -> Any:
    """What `vae`'s method `name` returns for `input`; most of it is done by `part`, a decoder or encoder."""
    run: Any = getattr(vae, name)
    working: AbstractContextManager[Any] = nullcontext()
    if strips.group is not None:
        budget = strips.budget if strips.mode == "stream" else strips.budget or _free(vae.device, strips)
        working = _streamed(part, budget, strips)
    elif strips.mode == "auto":
        run = _auto(vae, name, part, strips, on_choice)
    elif strips.mode != EAGER:
        working = _streamed(part, strips.budget, strips) if strips.mode == "stream" else _in_strips(part, strips)
    with working, _line_cleared():
        return run(input, return_dict=False)


def _auto(vae: AutoencoderKL, name: str, part: nn.Module, strips: Strips, on_choice: Optional[OnChoice]) -> AutoForward:
    """The method `name` of `vae`, run as it fits."""

    def needs(input: Tensor) -> Optional[Needs]:
        maps = EagerNeeds(vae).of_call(name, (input[:1],), {}, input.device, input.dtype)
        return needs_of(maps, strips.splits, strips.threshold, input.device.type, input.dtype) if maps else None

    def streaming() -> AbstractContextManager[Any]:
        return _streamed(part, strips.budget or _free(vae.device, strips), strips)

    def unused(device: torch.device) -> int:
        return free(device) // strips.beside

    return AutoForward(
        getattr(vae, name),
        streaming,
        needs,
        unused,
        strips.budget or 0,
        lambda _: _in_strips(part, strips),
        on_choice,
    )


def _free(device: torch.device, strips: Strips) -> int:
    """The budget for what is free: a share of it for each process of this machine."""
    return int(OF_FREE * free(device) / strips.beside) or 1


def _streamed(part: nn.Module, budget: Optional[int], strips: Strips) -> AbstractContextManager[Any]:
    first = strips.group is None or torch.distributed.get_rank(strips.group) == 0
    shown = _percent if first and sys.stderr.isatty() else None
    tuning = replace(USUAL, silent_seconds=strips.silent_seconds)
    return stream(part, budget=budget, on_progress=shown, tuning=tuning, group=strips.group)


def _in_strips(part: nn.Module, strips: Strips) -> AbstractContextManager[Any]:
    """Convolutions in strips, those with kernels of 1 too: backends copy their input and output all the same."""
    on_strip = _progress() if sys.stderr.isatty() else None
    return patched(part, strips.splits, threshold=strips.threshold, on_strip=on_strip, predicate=lambda *_: True)


@contextmanager
def _line_cleared() -> Iterator[None]:
    """Clear the line that says how far it is, at the end of the block."""
    try:
        yield
    finally:
        if sys.stderr.isatty():
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
