"""Upscale models that hosts load: what is refused, and pictures streamed one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conv_helpers import assert_same

from comfyui_patchconv.hosts.upscale import (
    StreamedUpscaler,
    check_channels,
    check_model,
    in_precision,
    joined,
    room_for,
)

from .upscaler import upscaler

CPU = torch.device("cpu")
FLOATS = (CPU, torch.float32)


def streamed(model: Any, budget: int = 0, **options: Any) -> StreamedUpscaler:
    return StreamedUpscaler(model, budget, lambda _: 10**9, output=FLOATS, **options)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (SimpleNamespace(scale=4), "SimpleNamespace.*none that makes an image of an image: load an ESRGAN"),
        (upscaler(purpose="Inpainting"), "Small.*fills masked areas and needs a mask: choose one for super-resolution"),
        (upscaler(purpose="FaceSR"), "Small.*restores faces.*not whole pictures: choose one"),
        (upscaler(scale=2.5), "scale of 2.5, and only whole numbers from 1.*choose one for 1x, 2x or 4x"),
        (upscaler(scale=0.5), "scale of 0.5"),
        (upscaler(output_channels=2), "takes 3 channels and gives 2: choose one"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(model: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        check_model(model)
    assert "\n" not in str(caught.value)


def test_what_can_be_used() -> None:
    for options in ({}, {"purpose": "Restoration", "scale": 1}, {"scale": 4.0}):
        check_model(upscaler(**options))


@pytest.mark.parametrize(
    ("channels", "words"),
    [(4, "has 4 channels.*Small.* takes 3: take the alpha off first"), (1, "has 1 channels.*choose a model for 1")],
)
def test_other_channels_than_the_models(channels: int, words: str) -> None:
    check_channels(upscaler(), 3)
    with pytest.raises(ValueError, match=words):
        check_channels(upscaler(), channels)


def test_pictures_are_those_of_the_model_run_whole() -> None:
    model = upscaler()
    images = torch.rand(3, 40, 24, 3)
    expected = model(images.movedim(-1, 1)).movedim(1, -1)
    calls: list[int] = []
    runner = streamed(model, on_call=lambda: calls.append(1))
    made = joined(runner.frames(images, *FLOATS), 3)
    assert made.shape == (3, 80, 48, 3)
    assert len(calls) == 3
    assert_same(made, expected, 1e-6)
    assert_same(joined(runner.frames(images[:1], *FLOATS), 1), expected[:1], 1e-6)


def test_each_picture_has_its_context() -> None:
    entered: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    joined(streamed(upscaler()).frames(torch.rand(2, 8, 8, 3), *FLOATS, around), 2)
    assert entered == ["in", "out"] * 2


def test_half_precision_leaves_the_model_as_it_was() -> None:
    model = upscaler()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    assert in_precision(model, torch.float32) is model
    half = in_precision(model, torch.bfloat16)
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    assert half.scale == model.scale
    images = torch.rand(1, 16, 16, 3)
    made = joined(streamed(half).frames(images, CPU, torch.bfloat16), 1)
    assert made.dtype == torch.float32
    assert_same(made, model(images.movedim(-1, 1)).movedim(1, -1), 2e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())


def test_what_a_picture_takes_is_counted_without_it() -> None:
    model = upscaler(width=32)
    runner = streamed(model, budget=1 << 30)
    expected = runner.expected(512, 384, *FLOATS)
    assert expected is not None
    assert expected.calls == 1
    result = 4 * 4 * 512 * 384 * 3
    assert result < expected.peak < expected.eager
    assert expected.eager > 32 * 4 * 4 * 512 * 384  # the larger map of all channels
    list(runner.frames(torch.rand(1, 512, 384, 3), *FLOATS))
    last = runner._streamed._streamed.last
    assert last is not None
    assert last.peak == pytest.approx(expected.peak, rel=0.05)
    assert room_for(expected, 1e12) == pytest.approx(1.1 * expected.peak)
    assert room_for(expected, 10.0) == room_for(None, 10.0) == 10.0


def test_a_model_that_cannot_be_counted_runs_all_the_same() -> None:
    model = upscaler()
    own = type(model.model).forward

    class Looks(type(model.model)):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return own(self, image) * (1 if float(image.amax()) >= 0 else -1)

    model.model.__class__ = Looks
    runner = streamed(model)
    assert runner.expected(16, 16, *FLOATS) is None
    images = torch.rand(1, 16, 16, 3)
    assert_same(joined(runner.frames(images, *FLOATS), 1), model(images.movedim(-1, 1)).movedim(1, -1), 1e-6)
