"""From noise to image with models that predict the image (Luhman & Luhman 2022, arXiv 2207.04316)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .config import BETA_MIN
from .model import PatchUNet

STEPS = 1000
_PERCENTILE = 0.995  # of pixels that dynamic thresholding leaves as they are (Saharia et al. 2022)

OnStep = Callable[[int, int, Tensor], object]
Model = Callable[[Tensor, Tensor, Optional[Tensor]], Tensor]


def signal_share(beta_max: float) -> Tensor:
    """The share of the image in the variance after each of the 1000 steps, `[1000]`, float64: a linear schedule."""
    return (1 - torch.linspace(BETA_MIN, beta_max, STEPS, dtype=torch.float64)).cumprod(0)


class Posterior(NamedTuple):
    """The distribution of the image one step earlier, given the clean and the noisy one (Ho et al. 2020, eq. 7)."""

    of_clean: Tensor
    """The clean image's weight in the mean."""
    of_noisy: Tensor
    """The noisy image's."""
    log_smallest: Tensor
    """Logarithm of the variance if the clean image is known."""
    log_largest: Tensor
    """Logarithm of the variance if nothing is known of it."""


def posterior(now: Tensor, before: Tensor) -> Posterior:
    """now, before: the image's share in the variance (`signal_share`) after the step and before it, of one shape."""
    beta = 1 - now / before
    return Posterior(
        before.sqrt() * beta / (1 - now),
        (now / before).sqrt() * (1 - before) / (1 - now),
        (beta * (1 - before) / (1 - now)).log(),
        beta.log(),
    )


def spaced(counts: str) -> list[int]:
    """The timesteps to use, from the first to the last of 1000.

    counts: how many; or comma-separated, how many of each of that many equal sections; or `"ddimN"`, N at an integer
        stride. As `timestep_respacing` of OpenAI's guided diffusion (MIT). Raises ValueError for what is impossible.
    """
    try:
        if counts.startswith("ddim"):
            wanted = int(counts[4:])
            strides = [stride for stride in range(1, STEPS + 1) if len(range(0, STEPS, stride)) == wanted]
            return list(range(0, STEPS, strides[0]))
        sections = [int(count) for count in counts.split(",")]
    except (ValueError, IndexError):
        raise ValueError(f"steps is {counts!r}: use a number to {STEPS}, several with commas, or 'ddim50'.") from None
    steps, start = [], 0
    for number, count in enumerate(sections):
        size = STEPS // len(sections) + (number < STEPS % len(sections))
        if not 1 <= count <= size:
            raise ValueError(f"{count} steps of a section of {size} are impossible: use 1 to {size}.")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        offsets = accumulate([0.0] + [stride] * (count - 1))  # added up as there, which decides where a half is rounded
        steps += [start + round(offset) for offset in offsets]
        start += size
    return steps


def sample(
    models: Sequence[PatchUNet],
    noise: Tensor,
    labels: Optional[Tensor] = None,
    *,
    steps: str = "250",
    guidance: float = 1.5,
    ddim: bool = False,
    generator: Optional[torch.Generator] = None,
    on_step: Optional[OnStep] = None,
) -> Tensor:
    """Images `[N, 3, H, W]` in -1..1 from `noise` of that shape.

    models: one, or for each part of the noise one, for less noise first.
    labels: classes `[N]`, for models that have them. steps: see `spaced`.
    guidance: how far to go from what is predicted without a class to what is predicted with it; 1 for no guidance.
    ddim: without fresh noise in each step (Song et al. 2021), otherwise ancestral (Ho et al. 2020).
    generator: of the noise of each step. on_step: called with steps done, steps in all, and the image as predicted.

    Raises ValueError for labels that are missing or not wanted, or another number of models than the splits say.
    """
    config = models[0].config
    if len(models) != len(config.snr_splits) + 1:
        raise ValueError(
            f"{len(models)} models for {len(config.snr_splits)} splits: give one more than there are splits."
        )
    return denoise(
        [_guided(model, config.classes, guidance) for model in models],
        noise,
        labels,
        share=signal_share(config.beta_max),
        splits=config.snr_splits,
        steps=spaced(steps),
        learn_sigma=config.learn_sigma,
        ddim=ddim,
        generator=generator,
        on_step=on_step,
    )


@torch.no_grad()
def denoise(
    models: Sequence[Model],
    noise: Tensor,
    labels: Optional[Tensor],
    *,
    share: Tensor,
    splits: Sequence[float],
    steps: Sequence[int],
    learn_sigma: bool,
    ddim: bool,
    generator: Optional[torch.Generator],
    on_step: Optional[OnStep],
) -> Tensor:
    """The loop of `sample`. models: `model(image, timesteps, labels)`, the image that is predicted, and behind it,
    with `learn_sigma`, where the variance lies between the smallest and the largest."""
    image = noise
    for done, index in enumerate(reversed(range(len(steps)))):
        now, before = share[steps[index]], share[steps[index - 1]] if index else torch.ones((), dtype=share.dtype)
        model = models[sum(float(now / (1 - now)) <= split for split in splits)]
        at = torch.full((len(image),), steps[index], device=image.device)
        predicted = model(image, at, labels)
        clean, place = predicted.chunk(2, 1) if learn_sigma else (predicted, torch.ones_like(predicted))
        if on_step is not None:
            on_step(done, len(steps), clean)
        if index == 0:
            return clean.clamp(-1, 1)
        if ddim:
            rest = (image - now.sqrt().item() * clean) / (1 - now).sqrt().item()
            image = before.sqrt().item() * clean + (1 - before).sqrt().item() * rest
            continue
        of_clean, of_noisy, smallest, largest = (value.item() for value in posterior(now, before))
        mean = of_clean * clean + of_noisy * image
        fresh = torch.randn(
            image.shape, generator=generator, dtype=image.dtype, device=generator_device(generator, image)
        )
        image = mean + (0.5 * (place * smallest + (1 - place) * largest)).exp() * fresh.to(image.device)
    return image


def generator_device(generator: Optional[torch.Generator], image: Tensor) -> torch.device:
    """The device that noise is drawn on: with a CPU generator, one seed gives one image on every device."""
    return image.device if generator is None else generator.device


def dynamic_threshold(image: Tensor) -> Tensor:
    """Each image divided by the 99.5th percentile of its absolute values, where that is above 1, and cut to -1..1."""
    flat = image.abs().flatten(1).float()
    rank = round(_PERCENTILE * (flat.shape[1] - 1))
    bound = flat.kthvalue(rank + 1, 1).values.clamp(min=1).to(image.dtype).view(-1, 1, 1, 1)
    return image.clamp(-bound, bound) / bound


def _guided(model: PatchUNet, classes: int, guidance: float) -> Model:
    """The model with its prediction kept within the range of images, and guided where it has classes."""

    def run(image: Tensor, steps: Tensor, labels: Optional[Tensor]) -> Tensor:
        given = image.to(next(model.parameters()).dtype)
        found = model(given, steps, labels).to(image.dtype)
        clean, place = found[:, :3], found[:, 3:]
        if not classes or guidance == 1 or labels is None:
            return torch.cat([clean.clamp(-1, 1), place], 1)
        free = model(given, steps, torch.full_like(labels, classes))[:, :3].to(image.dtype)
        return torch.cat([dynamic_threshold(free + guidance * (clean - free)), place], 1)

    return run
