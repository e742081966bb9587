"""Architectures of `spandrel`, small: streamed it gives what it gives run whole, and leaves the weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conv_helpers import assert_same
from upscale_architectures import ARCHITECTURES, first, made
from upscale_helpers import require_spandrel

from comfyui_patchconv.streaming import Streamed, Tuning

STRIPS = Tuning(strip_bytes=20_000, always=True)
"""Of a few rows, whatever it costs."""


@pytest.fixture(autouse=True)
def spandrel() -> Iterator[None]:
    require_spandrel()
    with torch.inference_mode():
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_picture_of_the_whole(name: str) -> None:
    model = made(name)
    image = torch.rand(1, 3, 64, 64)
    expected = first(model(image.clone()))  # one of them writes into it
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    runner = Streamed(tuning=STRIPS)
    assert_same(first(runner.call(model, (image.clone(),), {})), expected, 1e-5)
    assert runner.last is not None
    assert runner.last.in_strips
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    print(f"{name}: evaluated whole {runner.report or 'nothing'}")
