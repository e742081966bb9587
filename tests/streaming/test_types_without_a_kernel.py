"""Convolutions of types for which a CPU has no kernel of its own: what they take beside their result is in the plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocations import allocated
from conv_helpers import assert_same
from torch import Tensor
from torch.nn import functional as F

from comfyui_patchconv.streaming import Streamed, Tuning

CHANNELS = 6
Convolution = Callable[[Tensor], Tensor]


def weight(x: Tensor, sides: int, kernel: int, inputs: int = CHANNELS) -> Tensor:
    found = torch.arange(CHANNELS * inputs * kernel**sides).remainder(7) - 3
    return found.view(CHANNELS, inputs, *(kernel,) * sides).to(x.dtype)


def video(x: Tensor) -> Tensor:
    return x.reshape(1, CHANNELS, 4, 64, -1)


FORMS: dict[str, Convolution] = {
    "7x7": lambda x: F.conv2d(x, weight(x, 2, 7), padding=3),
    "3x3": lambda x: F.conv2d(x, weight(x, 2, 3), padding=1),
    "strided": lambda x: F.conv2d(x, weight(x, 2, 3), padding=1, stride=2),
    "dilated": lambda x: F.conv2d(x, weight(x, 2, 3), padding=2, dilation=2),
    "groups": lambda x: F.conv2d(x, weight(x, 2, 3, 1), padding=1, groups=CHANNELS),
    "sounds": lambda x: F.conv1d(x.flatten(2), weight(x, 1, 7), padding=3),
    "videos": lambda x: F.conv3d(video(x), weight(x, 3, 3), padding=1),
    "transposed": lambda x: F.conv_transpose2d(x, weight(x, 2, 4), padding=1, stride=2),
    "upsampled": lambda x: F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight(x, 2, 3), padding=1),
    "nearest": lambda x: F.conv2d(F.interpolate(x, scale_factor=2.0), weight(x, 2, 3), padding=1),
}
TYPES = torch.float64, torch.int64, torch.complex64, torch.complex128


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_copied_for_a_product_is_within_the_plan(form: str, dtype: torch.dtype) -> None:
    if form == "nearest" and dtype != torch.float64:
        pytest.skip("no interpolation of such numbers")

    def run(x: Tensor) -> Tensor:
        return FORMS[form](x.to(dtype) + 1) + 1

    x = torch.randint(-9, 9, (1, CHANNELS, 256, 160)).float()
    with torch.no_grad():
        expected, eager = allocated(lambda: run(x))
        for tuning in (Tuning(allocator_bytes=0, always=True), Tuning(allocator_bytes=0)):
            runner = Streamed(budget=None, tuning=tuning)
            call: Any = lambda runner=runner: runner.call(run, (x,), {})  # noqa: E731
            call()
            result, ours = allocated(call)
            assert_same(_real(result), _real(expected), 1e-5)
            assert runner.last is not None
            assert ours.peak <= runner.last.peak + (1 << 20)
            if not runner.last.in_strips:
                assert runner.last.peak >= 0.95 * eager.peak


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x.double()
