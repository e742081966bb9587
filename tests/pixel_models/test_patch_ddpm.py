"""Patch-based DDPM: the authors' model, and what is ours beside it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from conv_helpers import assert_same
from patch_ddpm_helpers import CELEBA, CHECKPOINT, DATA, FEW, TALL, inputs, randomised, reference
from torch.nn import functional as F

import comfyui_patchconv.pixel_models.patch_ddpm.model as model_module
from comfyui_patchconv.pixel_models.patch_ddpm import checkpoints
from comfyui_patchconv.pixel_models.patch_ddpm.config import ModelConfig
from comfyui_patchconv.pixel_models.patch_ddpm.diffusion import sample
from comfyui_patchconv.pixel_models.patch_ddpm.model import PatchDenoiser, cut, join, patch_bytes
from comfyui_patchconv.streaming import peak_activations

import_torch = partial(checkpoints.import_torch, trust=True)
"""On any torch: it is known who made these files."""


def test_it_computes_what_the_authors_model_does() -> None:
    """A forward pass within 1e-5 of what their code gave, however many patches at once."""
    config, given = reference()
    model, _ = import_torch(CHECKPOINT, config)
    with torch.no_grad():
        for at_once in (None, 1, 3, 4):
            assert_same(model(given["x"], given["t"], at_once), given["y"], 1e-5)


def test_it_samples_what_the_authors_code_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 20 steps, with the noise that their code drew, within 1e-4."""
    config, given = reference()
    model, diffusion = import_torch(CHECKPOINT, config)
    drawn = iter(given["noises"])
    monkeypatch.setattr(torch, "randn", lambda *_, **__: next(drawn))
    assert_same(sample(model, diffusion, given["start"]), given["sample"], 1e-4)


def test_names_shapes_and_size_are_those_of_the_published_model() -> None:
    with torch.device("meta"):
        model = PatchDenoiser(CELEBA)
    listed = [line.split(" ", 1) for line in (DATA / "patch_ddpm_keys.txt").read_text().splitlines()]
    assert [[name, str(tuple(value.shape))] for name, value in model.state_dict().items()] == listed
    assert len(listed) == 260
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 126.85


def test_joining_undoes_cutting() -> None:
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
def test_patches_by_themselves_give_the_whole(config: ModelConfig) -> None:
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
        before = model(image, steps)
        image[..., -1, -1] += 1
        assert not torch.equal(model(image, steps)[..., :6, :4], before[..., :6, :4])
    first, second, *_ = cut(alike, 3)
    assert not torch.allclose(first, second)


def test_gradients_of_patches_one_after_the_other_are_those_of_all_at_once() -> None:
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
        peak = peak_activations(
            model,
            lambda copy, make, count=at_once: copy(make(image.shape), make(steps.shape, steps.dtype), count),
            device=image.device,
        )
        assert at_once * one <= peak <= at_once * one + 4 * image.nbytes
    assert 4 * image.nbytes < one


def test_as_many_patches_as_fit_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_half_precision_is_near_float32() -> None:
    model, (image, steps) = randomised(TALL), inputs(TALL)
    with torch.no_grad():
        expected = model(image, steps)
        model.bfloat16()
        assert_same(model(image, steps), expected, 0.05)
        assert_same(model(image.bfloat16(), steps), expected.bfloat16(), 0.05)
    assert sample(model, FEW, image.bfloat16(), steps=2).dtype == torch.float32


def test_autocast_gives_a_float32_prediction_and_gradients() -> None:
    """As trainers use it: the prediction is float32 all the same."""
    model, (image, steps) = randomised(TALL), inputs(TALL)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(image, steps)
    found.mean().backward()
    with torch.no_grad():
        assert_same(found.detach(), model(image, steps), 0.05)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model, (image, steps) = randomised(TALL), inputs(TALL)
    with pytest.raises(ValueError, match=r"image is \(2, 3, 12, 18\): give \[N, 3, 18, 12\]"):
        model(image.mT, steps)
    with pytest.raises(ValueError, match=r"steps is \(1,\): give one for each image, \[2\]"):
        model(image, steps[:1])
    with pytest.raises(ValueError, match="patches_at_once is -1: use 1 or more, or 0"):
        model(image, steps, -1)
