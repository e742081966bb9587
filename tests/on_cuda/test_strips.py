"""Convolutions in strips on a device: forward, gradients, partial convolution and what is made of it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from comfyui_patchconv import PartialConv2d, PConv2d, Tiling, convert_model
from comfyui_patchconv.conv.fill import fill
from comfyui_patchconv.conv.holes import with_holes

from .helpers import HALVES, apart, assert_near, drawn, exactly, vae

SIDES = {nn.Conv1d: (400,), nn.Conv2d: (64, 40), nn.Conv3d: (5, 40, 24)}
MODES = ("zeros", "reflect", "replicate", "circular")


def tiled(module: nn.Module, splits: int = 5, **settings: Any) -> nn.Module:
    return convert_model(deepcopy(module), splits, threshold=0, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SIDES, ids=lambda kind: kind.__name__)
def test_strips_give_eagers_result(device: torch.device, kind: Any, mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = kind(8, 16, 5, padding=2, stride=2, padding_mode=mode).to(device, dtype)
    input = drawn(device, 2, 8, *SIDES[kind], dtype=dtype)
    with torch.inference_mode():
        eager, result = module(input), tiled(module)(input)
        exact = exactly(module, lambda module, input: module(input), input)
    assert_near(result, eager, exact)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_strips_of_every_kernel(device: torch.device, kernel: int, sequential: bool) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(16, 16, kernel, padding=kernel // 2).to(device)
    input = drawn(device, 1, 16, 96, 64)
    with torch.inference_mode():
        eager, result = module(input), tiled(module, 16, sequential=sequential)(input)
        exact = exactly(module, lambda module, input: module(input), input)
    assert_near(result, eager, exact)


@pytest.mark.parametrize("mode", MODES)
def test_strips_give_eagers_gradients(device: torch.device, mode: Any) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode).to(device).double()
    input = drawn(device, 2, 8, 40, 24).double().requires_grad_()

    def gradients(module: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(module(input).square().sum(), [input, *module.parameters()]))

    for ours, eager in zip(gradients(tiled(module)), gradients(module)):
        assert ours.device == eager.device
        assert apart(ours, eager)[0] <= 1e-10


def holes_of(device: torch.device) -> Tensor:
    holes = torch.ones(1, 1, 32, 24, device=device)
    holes[..., 8:20, 5:12] = 0
    return holes


def test_partial_convolutions_are_those_of_the_cpu(device: torch.device) -> None:
    torch.manual_seed(0)
    nvidia, other = PartialConv2d(4, 6, 3, padding=1), PConv2d(4, 6, 3, padding=1)
    cpu, found = torch.device("cpu"), []
    for place in (cpu, device):
        input, holes = drawn(place, 1, 4, 32, 24), holes_of(place)
        with torch.inference_mode():
            results = [nvidia.to(place)(input, holes), other.to(place)(input, holes[:, 0])[0],
                       *(fill(input[:, :3].abs(), holes, edges) for edges in (False, True))]  # fmt: skip
        assert all(result.device == input.device for result in results)
        found.append([result.cpu() for result in results])
    for expected, result in zip(*found):
        assert apart(result, expected.double())[0] <= 1e-5


def test_an_encode_with_holes_is_that_of_the_cpu(device: torch.device) -> None:
    found = []
    for place in (torch.device("cpu"), device):
        model, picture = vae(place), drawn(place, 1, 3, 64, 48)
        mask = holes_of(place)[0, 0].repeat(2, 2)
        with torch.inference_mode():
            found.append(with_holes(model, model.encode, picture, mask, Tiling(3, threshold=0)).cpu())
    assert apart(found[1], found[0].double())[0] <= 1e-5
