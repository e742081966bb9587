"""Decode and encode with a VAE as `--mode` asks: eagerly, each convolution in strips, streamed, or whatever fits."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed
from torch import Tensor, nn

from ..conv.patch import patched
from ..conv.strip_sizes import DEFAULT_THRESHOLD
from ..conv.tiling import OnStrip
from ..files.packing import packing_of
from ..files.vaes import traits_of
from ..files.vaes.family import Missing
from ..hosts.auto import AutoForward, OnChoice
from ..hosts.eager_needs import EagerNeeds
from ..hosts.estimates import OF_FREE, Needs, needs_of
from ..hosts.modes import MODES
from ..memory.usage import free
from ..streaming import USUAL, stream

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
    vae: Any,
    latent: Tensor,
    strips: Strips = Strips(),
    on_choice: Optional[OnChoice] = None,
    into: Optional[Callable[[Tensor], Any]] = None,
) -> Any:
    """What `vae` makes of `latent` `[N, C, …]`, on its device: images `[N, 3, H, W]` or videos `[N, 3, T, H, W]` from
    -1 to 1, or sounds `[N, C, L]`. The VAE of a video makes images of latents `[N, C, h, w]`.

    on_choice: see `OnChoice`. into: see `Half`; what it returns is returned.
    """
    traits, packing, latent = traits_of(vae), packing_of(vae), latent.to(vae.device)
    if packing is not None:
        latent = packing.unpack(latent)
    still = traits.medium == "video" and latent.dim() == 4
    made = _call(Half(vae, "decode", into), latent[:, :, None] if still else latent, strips, on_choice)
    if into is not None:
        return made
    made = made[:, :, 0] if still else made
    return made if traits.low == -1 else made.sub(traits.low).mul(2 / (1 - traits.low)).sub(1)


def encode(vae: Any, image: Tensor, strips: Strips = Strips(), on_choice: Optional[OnChoice] = None) -> Tensor:
    """The latent `[N, C, h, w]` of `image` `[N, 3, H, W]` from -1 to 1: the mean of its distribution, as ComfyUI has
    it; of the VAE of a video `[N, C, 1, h, w]`.

    on_choice: see `OnChoice`.
    """
    traits, packing = traits_of(vae), packing_of(vae)
    if traits.low != -1:
        image = image.add(1).mul((1 - traits.low) / 2).add(traits.low)
    image = image.to(vae.device)
    still = traits.medium == "video" and image.dim() == 4
    latent = _call(Half(vae, "encode"), image[:, :, None] if still else image, strips, on_choice)
    return latent if packing is None else packing.pack(latent)


def scale(vae: Any) -> int:
    """Pixels to a latent's pixel, on either side; samples to one of a sound's."""
    packing = packing_of(vae)
    return traits_of(vae).scale * (1 if packing is None else packing.side)


def channels(vae: Any) -> int:
    """Channels of the latents that `vae` decodes."""
    packing = packing_of(vae)
    return traits_of(vae).channels if packing is None else packing.channels


def check_channels(vae: Any, latent: Tensor, path: Optional[Path] = None) -> None:
    """Raises ValueError unless `vae` decodes latents of `latent`'s channels."""
    wanted = channels(vae)
    if latent.shape[1] != wanted:
        raise ValueError(
            f"{path or 'the latent'} has {latent.shape[1]} channels and the VAE decodes {wanted}: give the VAE of "
            "the model that made it."
        )


class Half:
    """A VAE's `decode` or `encode`, by its name, as a function of one tensor.

    into: is given what the VAE makes, and gives what is returned in its place. It is streamed too: what it copies to a
    file never lies in memory as a whole.
    """

    def __init__(self, vae: Any, name: str, into: Optional[Callable[[Tensor], Any]] = None) -> None:
        self.vae, self.name, self.into = vae, name, into

    def __call__(self, input: Tensor) -> Any:
        return self.run(input)  # looked up now: where it is streamed, another stands in its place

    def run(self, input: Tensor) -> Any:
        """What it makes of `input`; of a distribution the mean."""
        made = getattr(self.vae, self.name)(input, return_dict=False)[0]
        made = made if isinstance(made, Tensor) else made.mode()
        return made if self.into is None else self.into(made)

    @property
    def part(self) -> nn.Module:
        """What has its convolutions: its decoder or encoder, or all of the VAE where there is none."""
        return getattr(self.vae, f"{self.name}r", self.vae)


def _call(half: Half, input: Tensor, strips: Strips, on_choice: Optional[OnChoice]) -> Any:
    """What `half` makes of `input`. Raises ValueError where the VAE's file has no such half."""
    if isinstance(half.part, Missing):
        raise ValueError(half.part.why)
    run: Any = half
    input = input.to(half.vae.dtype)
    working: AbstractContextManager[Any] = nullcontext()
    if strips.group is not None:
        budget = strips.budget if strips.mode == "stream" else strips.budget or _free(input.device, strips)
        working = _streamed(half, budget, strips)
    elif strips.mode == "auto":
        run = _auto(half, strips, on_choice)
    elif strips.mode != EAGER:
        working = _streamed(half, strips.budget, strips) if strips.mode == "stream" else _in_strips(half.part, strips)
    with working, _line_cleared():
        return run(input)


def _auto(half: Half, strips: Strips, on_choice: Optional[OnChoice]) -> AutoForward:
    """The function of `half`, run as it fits."""
    vae = half.vae

    def needs(input: Tensor) -> Optional[Needs]:
        maps = EagerNeeds(vae).of_call(half.name, (input[:1],), {}, input.device, input.dtype)
        return needs_of(maps, strips.splits, strips.threshold, input.device.type, input.dtype) if maps else None

    def streaming() -> AbstractContextManager[Any]:
        return _streamed(half, strips.budget or _free(vae.device, strips), strips)

    def unused(device: torch.device) -> int:
        return free(device) // strips.beside

    return AutoForward(
        half,
        streaming,
        needs,
        unused,
        strips.budget or 0,
        lambda _: _in_strips(half.part, strips),
        on_choice,
    )


def _free(device: torch.device, strips: Strips) -> int:
    """The budget for what is free: a share of it for each process of this machine."""
    return int(OF_FREE * free(device) / strips.beside) or 1


def _streamed(half: Half, budget: Optional[int], strips: Strips) -> AbstractContextManager[Any]:
    first = strips.group is None or torch.distributed.get_rank(strips.group) == 0
    shown = _percent if first and sys.stderr.isatty() else None
    tuning = replace(USUAL, silent_seconds=strips.silent_seconds)
    return stream(half.run, budget=budget, on_progress=shown, tuning=tuning, group=strips.group)


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
