"""What a Patch Diffusion model is trained with (Luhman & Luhman 2022; the variance as in Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor, nn

from .config import Config
from .diffusion import STEPS, posterior, signal_share

_HALF_LEVEL = 1 / 255  # half of what lies between two levels of an 8-bit image in -1..1

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt_snr": torch.sqrt,
    "p2": lambda snr: snr / (1 + snr).sqrt(),
    "snr": lambda snr: snr,
    "snr+1": lambda snr: snr + 1,
    "truncated_snr": lambda snr: snr.clamp(min=1),
}
"""Weights of the squared error of the predicted image, by the signal-to-noise ratio. `sqrt_snr` is the authors'."""


class Loss:
    """The loss of models of one configuration: `loss(model, images [N, 3, H, W] in 0..1, labels [N])`, a scalar.

    weights: one of `WEIGHTS`. drop: the share of labels that become "no class", without which a model cannot be guided.
    part: of a configuration with several models, which: 0 for that of the least noise. It is trained on its own share
        of the timesteps.

    Raises ValueError for a part that is missing, or that there is not, and for a share outside 0 to 1.
    """

    def __init__(
        self, config: Config, weights: str = "sqrt_snr", drop: float = 0.1, part: Optional[int] = None
    ) -> None:
        if not 0 <= drop <= 1:
            raise ValueError(f"the share of labels to drop is {drop}: use 0 to 1, such as 0.1.")
        self.config, self.drop = config, drop
        share = signal_share(config.beta_max)
        before = torch.cat([torch.ones(1, dtype=share.dtype), share[:-1]])
        found = posterior(share, before)
        smallest = found.log_smallest.clone()
        smallest[0] = smallest[1]  # nothing is left to vary before the first step
        snr = share / (1 - share)
        columns = [share.sqrt(), (1 - share).sqrt(), WEIGHTS[weights](snr), found.of_clean, smallest, found.log_largest]
        self._table = torch.stack(columns, 1).float()
        self.steps = _steps_of(config, snr, part)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        clean = images * 2 - 1
        device, count = clean.device, len(clean)
        self._table, self.steps = self._table.to(device), self.steps.to(device)
        steps = self.steps[torch.randint(len(self.steps), (count,), device=device)]
        dropped = torch.rand(count, device=device) < self.drop
        wanted = torch.where(dropped, self.config.classes, labels) if self.config.classes else None
        return self.at(model, clean, wanted, steps, torch.randn_like(clean)).mean()

    def at(self, model: nn.Module, clean: Tensor, labels: Optional[Tensor], steps: Tensor, noise: Tensor) -> Tensor:
        """`[N]`, for images in -1..1 at these timesteps and with this noise."""
        signal, rest, weight, of_clean, smallest, largest = self._table[steps][..., None, None, None].unbind(1)
        predicted = model(signal * clean + rest * noise, steps, labels).float()
        error = clean - predicted[:, :3]
        squared = (weight * error**2).flatten(1).mean(1)
        if not self.config.learn_sigma:
            return squared
        place = predicted[:, 3:]
        log_variance = place * smallest + (1 - place) * largest
        return squared + _bits(of_clean * error.detach(), smallest, log_variance, clean, steps)


def _bits(distance: Tensor, true_log: Tensor, log: Tensor, clean: Tensor, steps: Tensor) -> Tensor:
    """`[N]`: what one step adds to the variational bound, in bits per value.

    distance: from the predicted mean of the image one step earlier to the true one. true_log, log: their log variances.
    """
    apart = 0.5 * (log - true_log + (true_log - log).exp() + distance**2 * (-log).exp() - 1)
    first = -_log_likelihood(clean, distance, log)
    of_step = torch.where(steps.view(-1, 1, 1, 1) == 0, first, apart)
    return of_step.flatten(1).mean(1) / math.log(2)


def _log_likelihood(clean: Tensor, distance: Tensor, log_variance: Tensor) -> Tensor:
    """Log-likelihood of the 8-bit level of each value, under a normal distribution `distance` away; the outer levels
    reach on."""
    scale = (-0.5 * log_variance).exp()
    above = torch.special.ndtr((distance + _HALF_LEVEL) * scale)
    below = torch.special.ndtr((distance - _HALF_LEVEL) * scale)
    above = torch.where(clean > 0.999, 1.0, above)
    below = torch.where(clean < -0.999, 0.0, below)
    return (above - below).clamp(min=1e-12).log()


def _steps_of(config: Config, snr: Tensor, part: Optional[int]) -> Tensor:
    """The timesteps of one of the configuration's models."""
    models = len(config.snr_splits) + 1
    if part is None and models > 1:
        raise ValueError(f"this configuration is {models} models: say which one, 0 to {models - 1}.")
    if part is not None and not 0 <= part < models:
        raise ValueError(f"part is {part} and this configuration is {models} models: use 0 to {models - 1}.")
    splits = torch.tensor(config.snr_splits, dtype=snr.dtype)
    owner = (snr[:, None] <= splits).sum(1)
    return torch.arange(STEPS)[owner == (part or 0)]
