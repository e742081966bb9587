"""From images to noise and back (Ho et al. 2020), with the cosine schedule (Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..patch_diffusion.diffusion import OnStep, denoise, posterior
from .config import DiffusionConfig

SAMPLERS = ("ancestral", "ddim", "dpm++")
"""Fresh noise in each step (Ho et al. 2020); none (Song et al. 2021); none, and fewer steps (Lu et al. 2022)."""

_OFFSET = 0.008  # keeps the first betas from vanishing
_LARGEST_BETA = 0.999
_SMALLEST_VARIANCE = 1e-20

Denoiser = Callable[[Tensor, Tensor, int], Tensor]


def betas(timesteps: int) -> Tensor:
    """The share of new noise in the variance of each step, `[timesteps]`, float64."""
    time = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    share = ((time + _OFFSET) / (1 + _OFFSET) * math.pi / 2).cos() ** 2
    return (1 - share[1:] / share[:-1]).clamp(0, _LARGEST_BETA)


def signal_share(timesteps: int) -> Tensor:
    """The share of the image in the variance after each step, `[timesteps]`, float64."""
    return (1 - betas(timesteps)).cumprod(0)


def schedule_buffers(config: DiffusionConfig) -> dict[str, Tensor]:
    """What the authors' checkpoints hold beside the weights, `[timesteps]` each, float32, by their names."""
    share = signal_share(config.timesteps)
    before = torch.cat([torch.ones(1, dtype=share.dtype), share[:-1]])
    step = posterior(share, before)
    variance = betas(config.timesteps) * (1 - before) / (1 - share)
    buffers = {
        "betas": betas(config.timesteps),
        "alphas_cumprod": share,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": share.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - share).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - share).log(),
        "sqrt_recip_alphas_cumprod": share.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / share - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=_SMALLEST_VARIANCE).log(),
        "posterior_mean_coef1": step.of_clean,
        "posterior_mean_coef2": step.of_noisy,
    }
    return {name: value.float() for name, value in buffers.items()}


class Loss:
    """What training makes smaller: `loss(model, images [N, C, H, W] in 0..1)`, a scalar, at timesteps and with noise
    that it draws."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        share = signal_share(config.timesteps)
        self._table = torch.stack([share.sqrt(), (1 - share).sqrt()], 1).float()

    def __call__(self, model: nn.Module, images: Tensor, labels: Optional[Tensor] = None) -> Tensor:
        """labels: not used; a training loop for all kinds of models gives them."""
        steps = torch.randint(self.config.timesteps, (len(images),), device=images.device)
        return self.at(model, images, steps, torch.randn_like(images))

    def at(self, model: nn.Module, images: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """The loss of images in 0..1 at the timesteps `[N]` and with this noise."""
        clean = images * 2 - 1
        self._table = self._table.to(images.device)
        signal, rest = self._table[steps][..., None, None, None].unbind(1)
        predicted = model(signal * clean + rest * noise, steps)
        wanted = noise if self.config.objective == "pred_noise" else clean
        return (F.l1_loss if self.config.loss_type == "l1" else F.mse_loss)(predicted, wanted)


@torch.no_grad()
def sample(
    model: Denoiser, config: DiffusionConfig, noise: Tensor, *, steps: Optional[int] = None,
    sampler: str = "ancestral", generator: Optional[torch.Generator] = None, patches_at_once: int = 0,
    on_step: Optional[OnStep] = None,
) -> Tensor:  # fmt: skip
    """Images `[N, C, H, W]` in 0..1, float32, from `noise` of that shape.

    model: a `PatchDenoiser`, or whatever is called as one. steps: None for all timesteps, otherwise so many of them,
        evenly spaced, from the last on. sampler: one of `SAMPLERS`.
    generator: of the noise of each ancestral step. patches_at_once: see `PatchDenoiser.forward`.
    on_step: called with steps done, steps in all, and the image as predicted, in 0..1.

    Raises ValueError for another sampler, or more steps than the model knows.
    """
    count = config.timesteps if steps is None else steps
    if not 1 <= count <= config.timesteps:
        raise ValueError(f"steps is {count}: use 1 to {config.timesteps}, as many as the model was trained with.")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}: use {', '.join(SAMPLERS)}.")
    image, share = noise.float(), signal_share(config.timesteps)
    predicted = _predictor(model, config, share, image.device, patches_at_once)

    def tell(done: int, steps: int, image: Tensor) -> None:
        if on_step is not None:
            on_step(done, steps, (image + 1) / 2)

    used = [(number + 1) * config.timesteps // count - 1 for number in range(count)]
    if sampler == "dpm++":
        return (_multistep(predicted, image, share, used, tell) + 1) / 2
    image = denoise(
        [predicted], image, None, share=share, splits=(), steps=used, learn_sigma=False, ddim=sampler == "ddim",
        generator=generator, on_step=tell,
    )  # fmt: skip
    return (image + 1) / 2


def _predictor(
    model: Denoiser, config: DiffusionConfig, share: Tensor, device: torch.device, patches_at_once: int
) -> Callable[..., Tensor]:
    """What predicts the image in -1..1, `(noisy image, timesteps, labels or None)`, whatever `model` predicts."""
    table = torch.stack([share.rsqrt(), (1 / share - 1).sqrt()], 1).float().to(device)

    def predicted(image: Tensor, at: Tensor, labels: Optional[Tensor] = None) -> Tensor:
        found = model(image, at, patches_at_once)
        if config.objective == "pred_noise":
            of_image, of_noise = table[at][..., None, None, None].unbind(1)
            found = of_image * image - of_noise * found
        return found.clamp(-1, 1)

    return predicted


def _multistep(
    predicted: Callable[[Tensor, Tensor], Tensor], image: Tensor, share: Tensor, steps: Sequence[int], tell: OnStep
) -> Tensor:
    """DPM-Solver++ of the second order, multistep (Lu et al. 2022, arXiv 2211.01095, algorithm 2)."""
    log_ratio = (share / (1 - share)).log() / 2  # of signal to noise; the solver's time
    before: Optional[tuple[Tensor, float]] = None
    for done, index in enumerate(reversed(range(len(steps)))):
        now = steps[index]
        clean = predicted(image, torch.full((len(image),), now, device=image.device))
        tell(done, len(steps), clean)
        if index == 0:
            return clean
        then = steps[index - 1]
        width = (log_ratio[then] - log_ratio[now]).item()
        ahead = clean if before is None else clean + (clean - before[0]) * (width / before[1] / 2)
        rest = ((1 - share[then]) / (1 - share[now])).sqrt().item()
        image = rest * image - share[then].sqrt().item() * math.expm1(-width) * ahead
        before = clean, width
    return image
