"""Patch-based DDPM: noise, loss and samplers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Optional

import pytest
import torch
from conv_helpers import assert_same
from patch_ddpm_helpers import CHECKPOINT, FEW, TALL, inputs, randomised
from torch import Tensor

from comfyui_patchconv.pixel_models.patch_ddpm.checkpoints import PREFIX
from comfyui_patchconv.pixel_models.patch_ddpm.config import DiffusionConfig
from comfyui_patchconv.pixel_models.patch_ddpm.diffusion import (
    SAMPLERS,
    Loss,
    betas,
    sample,
    schedule_buffers,
    signal_share,
)


def test_the_schedule_is_the_cosine() -> None:
    """The formula of Nichol & Dhariwal 2021; only the last beta reaches the limit."""
    share = signal_share(1000)
    wave = [math.cos((step / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(1001)]
    expected = torch.tensor(wave[1:], dtype=torch.float64) / wave[0]
    assert_same(share[:-1], expected[:-1])
    assert float(betas(1000)[-1]) == 0.999
    assert float(betas(1000)[:-1].max()) < 0.999
    assert schedule_buffers(DiffusionConfig(1))["betas"].tolist() == [pytest.approx(0.999)]


def test_the_schedule_is_that_of_the_authors_checkpoint() -> None:
    state = torch.load(CHECKPOINT, weights_only=True)["ema"]
    buffers = schedule_buffers(DiffusionConfig(20))
    assert list(buffers) == [name for name in state if not name.startswith(PREFIX)]
    for name, value in buffers.items():
        assert_same(value, state[name], 1e-6)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_the_loss_is_the_formulas(objective: str, loss_type: str) -> None:
    config = DiffusionConfig(1000, loss_type, objective)
    images, noise, steps = torch.rand(3, 3, 8, 8), torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    share = signal_share(1000)[steps].float().view(-1, 1, 1, 1)

    def model(noisy: Tensor, at: Tensor) -> Tensor:
        assert torch.equal(at, steps)
        assert_same(noisy, share.sqrt() * (2 * images - 1) + (1 - share).sqrt() * noise)
        return torch.full_like(noisy, 0.1)

    wanted = noise if objective == "pred_noise" else 2 * images - 1
    difference = (wanted - 0.1).abs() if loss_type == "l1" else (wanted - 0.1).square()
    found: Any = Loss(config)
    assert_same(found.at(model, images, steps, noise), difference.mean())


def test_loss_draws_every_timestep() -> None:
    seen: list[Tensor] = []
    loss: Any = Loss(DiffusionConfig(4))
    torch.manual_seed(0)
    found = loss(lambda noisy, at: seen.append(at) or noisy, torch.rand(200, 1, 2, 2))
    assert found.shape == ()
    assert seen[0].unique(return_counts=True)[1].tolist() == pytest.approx([50] * 4, abs=20)


def best(config: DiffusionConfig, means: Sequence[float], deviation: float) -> Any:
    """The best model of independent pixels, each of this deviation around one of the means; it is a formula."""
    share, centres = signal_share(config.timesteps), torch.tensor(means)

    def model(image: Tensor, at: Tensor, patches_at_once: int) -> Tensor:
        signal = share[at].float().view(-1, 1, 1, 1)
        spread = signal * deviation**2 + 1 - signal
        apart = image[..., None] - signal.sqrt()[..., None] * centres
        likely = (-apart.square() / (2 * spread[..., None])).softmax(-1)
        clean = (likely * (centres + (signal.sqrt() * deviation**2 / spread)[..., None] * apart)).sum(-1)
        return clean if config.objective == "pred_x0" else (image - signal.sqrt() * clean) / (1 - signal).sqrt()

    return model


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
@pytest.mark.parametrize(
    ("sampler", "steps"),
    [("ancestral", None), ("ancestral", 250), ("ddim", None), ("ddim", 130), ("dpm++", None), ("dpm++", 30)],
)
def test_samples_are_spread_as_the_data(sampler: str, steps: Optional[int], objective: str) -> None:
    config = DiffusionConfig(objective=objective)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 3, 32, 32, generator=generator)
    images = sample(best(config, [0.2], 0.3), config, noise, steps=steps, sampler=sampler, generator=generator)
    assert abs(float(images.mean()) - 0.6) < 0.01
    assert abs(float(images.std()) - 0.15) < 0.0075


TWO_KINDS = ([-0.5, 0.4], 0.1)
"""Of pixels: dark ones and bright ones, nothing between, and so no normal distribution."""


@cache
def sampled(sampler: str, steps: Optional[int] = None) -> Tensor:
    config, generator = DiffusionConfig(), torch.Generator().manual_seed(0)
    noise = torch.randn(4, 3, 32, 32, generator=generator)
    return sample(best(config, *TWO_KINDS), config, noise, steps=steps, sampler=sampler, generator=generator)


def largest_gap(one: Tensor, other: Tensor) -> float:
    """Kolmogorov's: between the shares of values below a value, wherever it is largest."""
    values = torch.cat([one.flatten(), other.flatten()]).sort().values
    below = [torch.searchsorted(each.flatten().sort().values, values, right=True) for each in (one, other)]
    return float((below[0] / one.numel() - below[1] / other.numel()).abs().max())


def test_all_samplers_agree_at_full_steps() -> None:
    """In distribution with ancestral sampling, whose noise is fresh, and image by image among the others, which solve
    the same equation. The gap between two random draws of 12288 values is below 0.022 in 99 of 100 cases."""
    ancestral, ddim, multistep = (sampled(name) for name in SAMPLERS)
    means, deviation = TWO_KINDS
    drawn = torch.tensor(means)[torch.randint(2, ancestral.shape)] + deviation * torch.randn(ancestral.shape)
    for images in (ddim, multistep, (drawn + 1) / 2):
        assert largest_gap(images, ancestral) < 0.022
    assert largest_gap(ancestral, ancestral + 0.01) > 0.03  # what the test can see
    assert float((ddim - multistep).abs().max()) < 0.01


def test_fewer_steps_come_near_to_all() -> None:
    """Half the steps: twice the error with ddim, four times with dpm++, as their orders say."""
    whole = sampled("dpm++")

    def error(sampler: str, steps: int) -> float:
        return float((sampled(sampler, steps) - whole).abs().mean())

    assert 1.5 < error("ddim", 50) / error("ddim", 100) < 2.5
    assert 3 < error("dpm++", 50) / error("dpm++", 100) < 5
    assert error("dpm++", 100) < error("ddim", 100) / 2 < 0.0015


@pytest.mark.parametrize("steps", [1, 2, 20, 100])
def test_samplers_do_what_those_of_diffusers_do(steps: int) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    config = DiffusionConfig(100, objective="pred_x0")
    model, noise = best(config, *TWO_KINDS), torch.randn(2, 3, 8, 8)
    schedule: Any = {
        "trained_betas": betas(100).tolist(),
        "prediction_type": "sample",
        "timestep_spacing": "trailing",
    }
    schedulers: Any = {"ddim": DDIMScheduler(100, **schedule), "dpm++": DPMSolverMultistepScheduler(100, **schedule)}
    for name, scheduler in schedulers.items():
        scheduler.set_timesteps(steps)
        image = noise
        for step in scheduler.timesteps:
            image = scheduler.step(model(image, step.expand(2), 0), step, image, return_dict=False)[0]
        assert_same(sample(model, config, noise, steps=steps, sampler=name), (image + 1) / 2, 1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_is_repeatable_and_reports(sampler: str) -> None:
    model, (noise, _) = randomised(TALL), inputs(TALL)
    seen: list[tuple[int, int]] = []

    def on_step(done: int, steps: int, image: Tensor) -> None:
        assert image.min() >= 0
        assert image.max() <= 1
        seen.append((done, steps))

    def run(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return sample(model, FEW, noise, steps=5, sampler=sampler, generator=generator, **options)

    images = run(3, on_step=on_step, patches_at_once=9)
    assert images.shape == noise.shape
    assert 0 <= images.min() <= images.max() <= 1
    assert not images.requires_grad
    assert seen == [(done, 5) for done in range(5)]
    assert torch.equal(run(3, patches_at_once=9), images)
    assert_same(run(3, patches_at_once=2), images, 1e-4)
    assert torch.equal(run(4, patches_at_once=9), images) == (sampler != "ancestral")


def test_sampling_that_is_impossible_is_refused() -> None:
    model, (noise, _) = randomised(TALL), inputs(TALL)
    for steps in (0, 9):
        with pytest.raises(ValueError, match=f"steps is {steps}: use 1 to 8"):
            sample(model, FEW, noise, steps=steps)
    with pytest.raises(ValueError, match=r"sampler is 'euler': use ancestral, ddim, dpm\+\+"):
        sample(model, FEW, noise, sampler="euler")
