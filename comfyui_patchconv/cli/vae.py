"""Decode and encode with a VAE as `--mode` asks: eagerly, each convolution in strips, streamed, or whatever fits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
from ..hosts.memory_estimates import OF_FREE, Needs, needs_of
from ..hosts.modes import MODES
from ..hosts.streamed import Switch
from ..memory.usage import free
from ..streaming import USUAL, Streamed
from ..terminal import watched
from .line import cleared, percent
from .line import show as show_line

MB = 1e6
EAGER = "plain"
"""The mode without strips, by the name that the command line has for it."""

CHOICES = (*MODES, EAGER)


@dataclass(frozen=True)
class RunOptions:
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


class Halves:
    """Decodes and encodes with one VAE: what is counted, planned, or found to be too large, is known from then on.

    options: how it does so.
    """

    def __init__(self, vae: Any, options: RunOptions = RunOptions()) -> None:
        self.vae, self.options = vae, options
        self._needs = EagerNeeds(vae)
        self._runs: dict[Any, _HalfRun] = {}

    def decode(
        self, latent: Tensor, on_choice: Optional[OnChoice] = None, into: Optional[Callable[[Tensor], Any]] = None
    ) -> Any:
        """What the VAE makes of `latent` `[N, C, …]`, on its device: images `[N, 3, H, W]` or videos `[N, 3, T, H, W]`
        from -1 to 1, or sounds `[N, C, L]`. The VAE of a video makes images of latents `[N, C, h, w]`.

        on_choice: see `OnChoice`. into: see `Half`; what it returns is returned. Another function plans anew.
        """
        vae = self.vae
        traits, packing, latent = traits_of(vae), packing_of(vae), latent.to(vae.device)
        if packing is not None:
            latent = packing.unpack(latent)
        still = traits.medium == "video" and latent.dim() == 4
        made = self._run("decode", into)(latent[:, :, None] if still else latent, on_choice)
        if into is not None:
            return made
        made = made[:, :, 0] if still else made
        return made if traits.low == -1 else made.sub(traits.low).mul(2 / (1 - traits.low)).sub(1)

    def encode(self, image: Tensor, on_choice: Optional[OnChoice] = None) -> Tensor:
        """The latent `[N, C, h, w]` of `image` `[N, 3, H, W]` from -1 to 1: the mean of its distribution, as ComfyUI
        has it; of the VAE of a video `[N, C, 1, h, w]`.

        on_choice: see `OnChoice`.
        """
        vae = self.vae
        traits, packing = traits_of(vae), packing_of(vae)
        if traits.low != -1:
            image = image.add(1).mul((1 - traits.low) / 2).add(traits.low)
        image = image.to(vae.device)
        still = traits.medium == "video" and image.dim() == 4
        latent = self._run("encode", None)(image[:, :, None] if still else image, on_choice)
        return latent if packing is None else packing.pack(latent)

    def _run(self, name: str, into: Optional[Callable[[Tensor], Any]]) -> _HalfRun:
        key = name, into
        if key not in self._runs:
            self._runs[key] = _HalfRun(Half(self.vae, name, into), self.options, self._needs)
        return self._runs[key]


def decode(
    vae: Any,
    latent: Tensor,
    options: RunOptions = RunOptions(),
    on_choice: Optional[OnChoice] = None,
    into: Optional[Callable[[Tensor], Any]] = None,
) -> Any:
    """What `vae` makes of one latent; see `Halves.decode`."""
    return Halves(vae, options).decode(latent, on_choice, into)


def encode(vae: Any, image: Tensor, options: RunOptions = RunOptions(), on_choice: Optional[OnChoice] = None) -> Tensor:
    """The latent of one image; see `Halves.encode`."""
    return Halves(vae, options).encode(image, on_choice)


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

    def run(self, input: Tensor) -> Any:
        """What it makes of `input`; of a distribution the mean."""
        made = getattr(self.vae, self.name)(input, return_dict=False)[0]
        made = made if isinstance(made, Tensor) else made.mode()
        return made if self.into is None else self.into(made)

    @property
    def part(self) -> nn.Module:
        """What has its convolutions: its decoder or encoder, or all of the VAE where there is none."""
        return getattr(self.vae, f"{self.name}r", self.vae)


class _HalfRun:
    """A half of a VAE, run as `options` say."""

    def __init__(self, half: Half, options: RunOptions, needs: EagerNeeds) -> None:
        self.half, self.options, self._counted = half, options, needs
        alone = options.group is None
        first = alone or torch.distributed.get_rank(options.group) == 0
        tuning = replace(USUAL, silent_seconds=options.silent_seconds)
        shown = percent if first and watched() else None
        self._streamed = Streamed(on_progress=shown, tuning=tuning, group=options.group)
        self._streamed.least = options.budget is None
        self._streams = Switch(options.mode == "stream" or not alone)
        self._auto: Optional[AutoForward] = None
        if options.mode == "auto" and alone:
            self._auto = AutoForward(
                self._forward, lambda: self._streams.set_to(True), self._needs, self._free, options.budget or 0,
                lambda _: self._in_strips(),
            )  # fmt: skip

    def __call__(self, input: Tensor, on_choice: Optional[OnChoice] = None) -> Any:
        """What it makes of `input`. Raises ValueError where the VAE's file has no such half."""
        if isinstance(self.half.part, Missing):
            raise ValueError(self.half.part.why)
        run: Callable[[Tensor], Any] = self._forward
        if self._auto is not None:
            self._auto.on_choice, run = on_choice, self._auto
        in_strips = self.options.mode == "patch" and not self._streams.on
        with self._in_strips() if in_strips else nullcontext(), cleared():
            return run(input.to(self.half.vae.dtype))

    def _forward(self, input: Tensor) -> Any:
        if not self._streams.on:
            return self.half.run(input)
        budget = self.options.budget
        if budget is None and self.options.mode != "stream":
            budget = int(OF_FREE * self._free(input.device)) or 1
        self._streamed.budget = budget
        return self._streamed.call(self.half.run, (input,), {})

    def _in_strips(self) -> AbstractContextManager[Any]:
        """Convolutions in strips, those with kernels of 1 too: backends copy their input and output all the same."""
        on_strip, options = _progress() if watched() else None, self.options
        return patched(
            self.half.part, options.splits, threshold=options.threshold, on_strip=on_strip, predicate=lambda *_: True
        )

    def _needs(self, input: Tensor) -> Optional[Needs]:
        options, device = self.options, input.device
        maps = self._counted.of_call(self.half.name, (input[:1],), {}, device, input.dtype)
        return needs_of(maps, options.splits, options.threshold, device.type, input.dtype) if maps else None

    def _free(self, device: torch.device) -> int:
        """What is free for each process of this machine."""
        return free(device) // self.options.beside


def _progress() -> OnStrip:
    """A line on stderr that counts the convolutions that run in strips."""
    done = 0

    def show(_: nn.Module, rows_done: int, rows: int) -> None:
        nonlocal done
        show_line(f"convolution {done + 1}: {rows_done / rows:4.0%}")
        done += rows_done == rows

    return show
