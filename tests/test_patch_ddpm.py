"""Patch-based DDPM: the authors' model, files and sampling, and what is ours beside them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor
from torch.nn import functional as F

import comfyui_patchconv.patch_ddpm.model as model_module
from comfyui_patchconv.footprint import peak_activations
from comfyui_patchconv.patch_ddpm.checkpoints import PREFIX, import_torch, load, save
from comfyui_patchconv.patch_ddpm.config import Config, DiffusionConfig, ModelConfig, TrainerConfig
from comfyui_patchconv.patch_ddpm.diffusion import SAMPLERS, Loss, betas, sample, schedule_buffers, signal_share
from comfyui_patchconv.patch_ddpm.model import PatchDenoiser, cut, join, patch_bytes

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "patch_ddpm.pt"
CELEBA = ModelConfig(128)
TALL = ModelConfig(8, dim_mults=(1, 2), resnet_block_groups=4, patch_divider=3, image_size=(18, 12))
FEW = DiffusionConfig(timesteps=8)


def reference() -> tuple[Config, dict[str, Tensor]]:
    with np.load(DATA / "patch_ddpm.npz") as found:
        arrays = {key: torch.from_numpy(found[key]) for key in found}
    return Config.from_json((DATA / "patch_ddpm.json").read_text()), arrays


def randomised(config: ModelConfig) -> PatchDenoiser:
    torch.manual_seed(0)
    model = PatchDenoiser(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.eval()


def inputs(config: ModelConfig, count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, config.channels, *config.image_sides, generator=generator)
    return image, torch.randint(1000, (count,), generator=generator)


def test_the_authors_model() -> None:
    """A forward pass within 1e-5 of what their code gave, however many patches at once."""
    config, given = reference()
    model, _ = import_torch(CHECKPOINT, config)
    with torch.no_grad():
        for at_once in (None, 1, 3, 4):
            assert_same(model(given["x"], given["t"], at_once), given["y"], 1e-5)


def test_the_authors_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 20 steps, with the noise that their code drew, within 1e-4."""
    config, given = reference()
    model, diffusion = import_torch(CHECKPOINT, config)
    drawn = iter(given["noises"])
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(drawn))
    assert_same(sample(model, diffusion, given["start"]), given["sample"], 1e-4)


def test_names_shapes_and_size_of_the_published_model() -> None:
    with torch.device("meta"):
        model = PatchDenoiser(CELEBA)
    listed = [line.split(" ", 1) for line in (DATA / "patch_ddpm_keys.txt").read_text().splitlines()]
    assert [[name, str(tuple(value.shape))] for name, value in model.state_dict().items()] == listed
    assert len(listed) == 260
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 126.85


def test_cutting_and_joining() -> None:
    image, _ = inputs(TALL)
    patches = cut(image, 3)
    assert patches.shape == (9, 2, 3, 6, 4)
    for number, patch in enumerate(patches):
        top, left = number // 3 * 6, number % 3 * 4
        assert torch.equal(patch, image[:, :, top : top + 6, left : left + 4])
    assert torch.equal(join(patches, 3), image)


@pytest.mark.parametrize(
    "config",
    [
        TALL,
        replace(TALL, patch_divider=1, image_size=(4, 10)),
        replace(TALL, patch_divider=5, image_size=10, channels=1, init_dim=3),
        replace(TALL, dim_mults=(1,), image_size=(3, 9)),
        replace(TALL, dim_mults=(1, 1, 3), image_size=(24, 12), channels=4),
    ],
)
def test_every_patch_by_itself(config: ModelConfig) -> None:
    """Sizes that are not square, odd dividers, other channels and levels: as when each patch is cut out and placed."""
    model, (image, steps), divider = randomised(config), inputs(config), config.patch_divider
    height, width = (side // divider for side in config.image_sides)
    whole = F.adaptive_avg_pool2d(image, (height, width))
    expected = torch.empty_like(image)
    with torch.no_grad():
        for row in range(divider):
            for column in range(divider):
                place = (..., slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
                expected[place] = model._denoised(image[place][None], whole, steps, row * divider + column)[0]
        for at_once in (0, 1, 2, 100):
            assert_same(model(image, steps, at_once), expected)


def test_a_patch_knows_its_place_and_the_whole_image() -> None:
    model, (image, steps) = randomised(TALL), inputs(TALL)
    with torch.no_grad():
        alike = model(cut(image, 3)[0].repeat(1, 1, 3, 3), steps)
        plain = model(image, steps)
        image[..., -1, -1] += 1
        assert not torch.equal(model(image, steps)[..., :6, :4], plain[..., :6, :4])
    first, second, *_ = cut(alike, 3)
    assert not torch.allclose(first, second)


def test_gradients_of_patches_one_after_the_other() -> None:
    model, (image, steps) = randomised(TALL), inputs(TALL)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(parameters) == len(list(model.parameters())) - 2  # a layer that the files have and nobody uses
    together = torch.autograd.grad(model(image, steps).square().mean(), list(parameters.values()))
    apart = torch.autograd.grad(model(image, steps, 2).square().mean(), list(parameters.values()))
    for one, other in zip(apart, together):
        assert_same(one, other)


def test_memory_is_that_of_the_patches_at_once() -> None:
    """Counted, on a model that is wide beside the image, of which a few copies exist as a whole."""
    config = replace(TALL, dim=64)
    model, (image, steps) = randomised(config), inputs(config, 1)
    one = patch_bytes(config, torch.float32, image.device)
    for at_once in (2, 9):
        peak = peak_activations(model, lambda twin, count=at_once: twin(image, steps, count), device=image.device)
        assert at_once * one <= peak <= at_once * one + 4 * image.nbytes
    assert 4 * image.nbytes < one


def test_as_many_patches_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (image, steps) = randomised(TALL), inputs(TALL)
    run, counts = model._denoised, []
    monkeypatch.setattr(model, "_denoised", lambda patches, *rest: counts.append(len(patches)) or run(patches, *rest))
    each = 2 * patch_bytes(TALL, torch.float32, image.device)
    for free, expected in ((0, [1] * 9), (2 * 4 * each, [4, 4, 1]), (10**12, [9])):
        monkeypatch.setattr(model_module, "free", lambda _, free=free: free)
        with torch.no_grad():
            model(image, steps)
        assert counts == expected
        counts.clear()
    monkeypatch.setattr(model_module, "free", lambda _: 0)
    model(image, steps)
    assert counts == [9]  # a graph is kept for the gradients in any case


def test_half_precision() -> None:
    model, (image, steps) = randomised(TALL), inputs(TALL)
    with torch.no_grad():
        expected = model(image, steps)
        model.bfloat16()
        assert_same(model(image, steps), expected, 0.05)
        assert_same(model(image.bfloat16(), steps), expected.bfloat16(), 0.05)
    assert sample(model, FEW, image.bfloat16(), steps=2).dtype == torch.float32


def test_autocast_with_gradients() -> None:
    """As trainers use it: the prediction is float32 all the same."""
    model, (image, steps) = randomised(TALL), inputs(TALL)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(image, steps)
    found.mean().backward()
    with torch.no_grad():
        assert_same(found.detach(), model(image, steps), 0.05)


def test_inputs_that_do_not_fit() -> None:
    model, (image, steps) = randomised(TALL), inputs(TALL)
    with pytest.raises(ValueError, match=r"image is \(2, 3, 12, 18\): give \[N, 3, 18, 12\]"):
        model(image.mT, steps)
    with pytest.raises(ValueError, match=r"steps is \(1,\): give one for each image, \[2\]"):
        model(image, steps[:1])
    with pytest.raises(ValueError, match="patches_at_once is -1: use 1 or more, or 0"):
        model(image, steps, -1)


def test_schedule() -> None:
    """The formula of Nichol & Dhariwal 2021; only the last beta reaches the limit."""
    share = signal_share(1000)
    wave = [math.cos((step / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(1001)]
    expected = torch.tensor(wave[1:], dtype=torch.float64) / wave[0]
    assert_same(share[:-1], expected[:-1])
    assert float(betas(1000)[-1]) == 0.999
    assert float(betas(1000)[:-1].max()) < 0.999
    assert schedule_buffers(DiffusionConfig(1))["betas"].tolist() == [pytest.approx(0.999)]


def test_schedule_of_the_authors_checkpoint() -> None:
    state = torch.load(CHECKPOINT, weights_only=True)["ema"]
    buffers = schedule_buffers(DiffusionConfig(20))
    assert list(buffers) == [name for name in state if not name.startswith(PREFIX)]
    for name, value in buffers.items():
        assert_same(value, state[name], 1e-6)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_loss(objective: str, loss_type: str) -> None:
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
def test_samplers_as_in_diffusers(steps: int) -> None:
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
def test_sampling(sampler: str) -> None:
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


def test_sampling_that_is_impossible() -> None:
    model, (noise, _) = randomised(TALL), inputs(TALL)
    for steps in (0, 9):
        with pytest.raises(ValueError, match=f"steps is {steps}: use 1 to 8"):
            sample(model, FEW, noise, steps=steps)
    with pytest.raises(ValueError, match=r"sampler is 'euler': use ancestral, ddim, dpm\+\+"):
        sample(model, FEW, noise, sampler="euler")


def test_configurations_as_text() -> None:
    config = Config(TALL, FEW, TrainerConfig("data", "log", wandb_name="run"))
    assert Config.from_json(config.to_json()) == config
    assert list(json.loads(Config(TALL).to_json())) == ["model", "diffusion"]
    assert Config.from_json('{"model": {"dim": 128}}') == Config(CELEBA)
    published, _ = reference()
    assert published == Config(
        ModelConfig(16, dim_mults=(1, 2), patch_divider=2, image_size=16),
        DiffusionConfig(20),
        TrainerConfig("data", "log"),
    )


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("model", {"dimm": 8}, "model.dimm is not known: known are dim, init_dim, "),
        ("model", {"dim": "128"}, "model.dim is '128': use a whole number"),
        ("model", {"dim": True}, "model.dim is True: use a whole number"),
        ("model", {"dim": 2}, "model.dim is 2: use 4 or more"),
        ("model", {"init_dim": 0}, "model.init_dim is 0: use 1 or more"),
        ("model", {"init_dim": 1.5}, "model.init_dim is 1.5: use a whole number or null"),
        ("model", {"out_dim": 6}, "model.out_dim is 6: use null or the image's channels, 3"),
        ("model", {"dim_mults": 2}, "model.dim_mults is 2: use a list of whole numbers"),
        ("model", {"dim_mults": []}, r"model.dim_mults is \[\]: use whole numbers above 0"),
        (
            "model",
            {"dim_mults": [2, 4]},
            r"model.dim_mults is \[2, 4\]: use whole numbers above 0, the first of them 1",
        ),
        ("model", {"dim_mults": [1, 0]}, r"model.dim_mults is \[1, 0\]: use whole numbers above 0"),
        ("model", {"channels": 0}, "model.channels is 0: use 1 for grey, 3 for RGB or 4 for RGBA"),
        ("model", {"resnet_block_groups": 3}, "a level is 16 channels wide: .* multiples of resnet_block_groups, 3"),
        ("model", {"learned_variance": True}, "model.learned_variance is true.*: use false"),
        ("model", {"patch_divider": 0}, "model.patch_divider is 0: use 1 or more"),
        ("model", {"image_size": 0}, "model.image_size is 0: use a multiple of 32"),
        ("model", {"image_size": 130}, "model.image_size is 130: use a multiple of 32, which is 4 patches that are "),
        ("model", {"image_size": 48}, "model.image_size is 48: use a multiple of 32, .* halved 3 times"),
        ("model", {"image_size": [64, 65]}, r"model.image_size is \(64, 65\): use a multiple of 32"),
        ("model", {"image_size": [64]}, r"model.image_size is \[64\]: use a whole number or \[height, width\]"),
        ("diffusion", {"timesteps": 0}, "diffusion.timesteps is 0: use 1 or more"),
        ("diffusion", {"loss_type": "huber"}, "diffusion.loss_type is 'huber': use l1 or l2"),
        ("diffusion", {"objective": "pred_v"}, "diffusion.objective is 'pred_v': use pred_noise or pred_x0"),
        ("trainer", {"log_dir": 3}, "trainer.log_dir is 3: use a text"),
        ("trainer", {"wandb_name": 3}, "trainer.wandb_name is 3: use a text or null"),
        ("trainer", {"use_amp": 1}, "trainer.use_amp is 1: use true or false"),
        ("trainer", {"ema_decay": 1}, "trainer.ema_decay is 1: use 0 to below 1"),
        ("trainer", {"train_lr": "fast"}, "trainer.train_lr is 'fast': use a number"),
        ("trainer", {"train_lr": 0}, "trainer.train_lr is 0: use a number above 0"),
        ("trainer", {"train_batch_size": 0}, "trainer.train_batch_size is 0: use 1 or more"),
        ("trainer", {"num_workers": -1}, "trainer.num_workers is -1: use 0 or more"),
    ],
)
def test_configurations_that_are_wrong(section: str, values: dict[str, Any], words: str) -> None:
    text = {"model": {"dim": 16}, "diffusion": {}, "trainer": {"train_dataset_dir": "data", "log_dir": "log"}}
    text[section] |= values
    with pytest.raises(ValueError, match=words):
        Config.from_json(json.dumps(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "the configuration is not JSON"),
        ("[]", "the configuration is not a JSON object"),
        ("{}", "model is missing: give an object"),
        ('{"modell": {}}', "modell is not known: known are model, diffusion, trainer"),
        ('{"model": 3}', "model is 3: use an object"),
        ('{"model": {}}', "model.dim is missing: give a whole number"),
        ('{"model": {"dim": 16}, "trainer": {"log_dir": ""}}', "trainer.train_dataset_dir is missing: give a text"),
    ],
)
def test_texts_that_are_no_configuration(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config.from_json(text)


def test_files_of_our_own(tmp_path: Path) -> None:
    model, (image, steps) = randomised(TALL), inputs(TALL)
    diffusion = DiffusionConfig(objective="pred_x0")
    save(model, diffusion, tmp_path / "model.safetensors")
    loaded, of_file = load(tmp_path / "model.safetensors")
    assert (loaded.config, of_file) == (TALL, diffusion)
    with torch.no_grad():
        assert torch.equal(loaded(image, steps, 9), model(image, steps, 9))


def test_the_authors_file_without_its_configuration() -> None:
    """Shapes tell all of it but the size of the image."""
    config, _ = reference()
    model, diffusion = import_torch(CHECKPOINT)
    assert model.config == replace(config.model, init_dim=10, image_size=128)
    assert diffusion == config.diffusion
    expected, _ = import_torch(CHECKPOINT, config)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())


def test_the_trained_weights_instead_of_the_averaged(tmp_path: Path) -> None:
    config, _ = reference()
    held = torch.load(CHECKPOINT, weights_only=True)
    held["model"] = {name: value + 1 if PREFIX in name else value for name, value in held["model"].items()}
    torch.save(held, tmp_path / "model-last.pt")
    trained, averaged = (import_torch(tmp_path / "model-last.pt", config, entry)[0] for entry in ("model", "ema"))
    for one, other in zip(trained.parameters(), averaged.parameters()):
        assert torch.equal(one, other + 1)


def test_what_differs_between_two_configurations() -> None:
    """What a value that is left out stands for is no difference."""
    config = Config(ModelConfig(24, patch_divider=1, image_size=32))
    for other, words in (
        (config, None),
        (Config(replace(config.model, init_dim=16, out_dim=3, image_size=(32, 32))), None),
        (Config(config.model, trainer=TrainerConfig("a", "b")), None),
        (Config(replace(config.model, dim_mults=(1, 2, 4, 4))), "model.dim_mults, (1, 2, 4, 8) and (1, 2, 4, 4)"),
        (Config(config.model, FEW), "diffusion.timesteps, 1000 and 8"),
    ):
        assert config.difference(other) == words


def test_files_of_our_trainings_hold_their_configuration(tmp_path: Path) -> None:
    """Groups and objective, which no shape tells, are not taken from the defaults."""
    config = Config(TALL, DiffusionConfig(objective="pred_x0"))
    model = randomised(TALL)
    weights = {**schedule_buffers(config.diffusion), **{PREFIX + name: v for name, v in model.state_dict().items()}}
    torch.save({"ema": weights, "config": config.to_json()}, tmp_path / "model-1.pt")
    save(model, config.diffusion, tmp_path / "model.safetensors")
    for read, path in ((import_torch, "model-1.pt"), (load, "model.safetensors")):
        for given in (None, config):
            found, diffusion = read(tmp_path / path, given)
            assert (found.config, diffusion) == (TALL, config.diffusion)
        with pytest.raises(ValueError, match=r"holds another configuration than the one given: diffusion\.objective, "):
            read(tmp_path / path, Config(TALL))


def test_files_that_are_something_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="has no patch-based DDPM configuration"):
        load(path)
    save_file({"weight": torch.zeros(1)}, path, {"patch_ddpm": Config(TALL).to_json()})
    with pytest.raises(
        ValueError, match=r"_init_conv.weight is missing there, and \(4, 6, 7, 7\) in the configuration"
    ):
        load(path)
    state = {**randomised(TALL).state_dict(), "more": torch.zeros(1)}
    save_file(state, path, {"patch_ddpm": Config(TALL).to_json()})
    with pytest.raises(ValueError, match=r"more is \(1,\) there, and nothing in the configuration"):
        load(path)
    path.write_bytes(CHECKPOINT.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load(path)
    with pytest.raises(ValueError, match="cannot be read safely, as weights alone"):
        import_torch(path)
    with pytest.raises(ValueError, match="has no weights called 'ema': use ema or model of a training's model-"):
        import_torch(DATA / "patch_diffusion_uncond_p4.pt")
    with pytest.raises(ValueError, match="has no weights called 'opt'"):
        import_torch(CHECKPOINT, entry="opt")


def test_the_authors_files_of_another_configuration(tmp_path: Path) -> None:
    config, _ = reference()
    state = torch.load(CHECKPOINT, weights_only=True)["ema"]
    path = tmp_path / "model-last.pt"

    def changed(**values: Any) -> Path:
        kept = {name: value for name, value in {**state, **values}.items() if value is not None}
        torch.save({"ema": kept}, path)
        return path

    with pytest.raises(ValueError, match="trained with 20 timesteps and the configuration has 1000"):
        import_torch(CHECKPOINT, replace(config, diffusion=DiffusionConfig()))
    with pytest.raises(ValueError, match=r"_init_conv.weight is \(10, 6, 7, 7\) there, and \(84, 6, 7, 7\)"):
        import_torch(CHECKPOINT, Config(CELEBA, config.diffusion))
    with pytest.raises(ValueError, match="trained with another schedule"):
        import_torch(changed(betas=torch.linspace(1e-4, 0.02, 20)), config)
    with pytest.raises(ValueError, match="has no betas"):
        import_torch(changed(betas=None), config)
    with pytest.raises(ValueError, match="its weights have other names"):
        import_torch(changed(**{f"{PREFIX}_embedding._pos_embedding_layer.0.weight": None}))
    with pytest.raises(ValueError, match=r"so give that too: model\.image_size is 128"):
        import_torch(changed(**{f"{PREFIX}_embedding._pos_embedding_layer.0.weight": torch.zeros(16, 9)}))
