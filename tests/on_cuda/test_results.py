"""What streams on a device is what eager computes there: layouts, types, budgets, random networks, real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network_helpers import random_network, run_network
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.conv.videos import VARIABLE
from comfyui_patchconv.streaming import stream, streamed

from .helpers import HALVES, SMALL, apart, assert_near, drawn, exactly, vae

NAMES = (
    """
    kl 16 decode, tiny decode, vq encode, wan decode, wan encode, hunyuan decode, ltx decode, ltx encode, mochi decode,
    cosmos decode, cogvideox decode, dc decode, dc encode
""".strip()
    .replace("\n    ", " ")
    .split(", ")
)
"""Of `model_zoo.CASES`."""

SHAPES = {"decode": (1, 4, 19, 16), "encode": (1, 3, 152, 128)}


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("part", SHAPES)
def test_a_streamed_vae_is_as_near_to_float64_as_eager(
    device: torch.device, part: str, dtype: torch.dtype, budget: Any, last: bool
) -> None:
    order = torch.channels_last if last else torch.contiguous_format
    model: Any = vae(device, dtype, (16, 16, 32, 32))
    model.to(memory_format=order)
    input = drawn(device, *SHAPES[part], dtype=dtype).contiguous(memory_format=order)
    with torch.inference_mode():
        exact = exactly(model, lambda model, input: getattr(model, part)(input), input)
        eager = getattr(model, part)(input)
        with stream(getattr(model, part), budget=budget, tuning=SMALL):
            result = getattr(model, part)(input)
    assert_near(result, eager, exact)


@pytest.mark.parametrize("seed", range(24))
def test_random_networks_give_eagers_result(device: torch.device, seed: int) -> None:
    operators, channels = random_network(seed, device)
    x = drawn(device, 2, channels, 6 + seed % 12, 7, seed=seed).double()

    def run(map: Tensor) -> Tensor:
        return run_network(operators, map, 1 + seed % 3)

    budget = [None, 1, 20_000][seed % 3]
    with torch.inference_mode():
        expected = run(x)
        result = streamed(run, budget=budget, tuning=SMALL)(x)
    assert result.device == x.device
    assert apart(result, expected)[0] <= 1e-9


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_padding_of_every_mode_gives_eagers_result(device: torch.device, mode: str) -> None:
    x, weight = drawn(device, 1, 4, 60, 40), drawn(device, 4, 4, 5, 5) / 10

    def run(map: Tensor) -> Tensor:
        for _ in range(2):
            map = F.silu(F.conv2d(F.pad(map, (2, 2, 2, 2), mode), weight.to(map.dtype)))
        return map

    with torch.inference_mode():
        result = streamed(run, tuning=SMALL)(x)
        assert_near(result, run(x), run(x.double()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [None, 1])
def test_networks_of_diffusers_are_as_near_to_float64_as_eager(device: torch.device, name: str, budget: Any) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed, which has these networks")
    if device.type == "cpu" and name not in ("tiny decode", "ltx decode"):
        pytest.skip("tests/streaming has all of them on a CPU")
    from model_zoo import CASES, draw_weights

    build, run, input = CASES[name]
    model, method = draw_weights(build()).to(device), name.split()[-1]
    input = input.to(device)
    with torch.inference_mode():
        eager = run(model, input)
        with stream(getattr(model, method), budget=budget, tuning=SMALL):
            result = run(model, input)
        exact = exactly(model, run, input)
    assert_near(result, eager, exact)


@pytest.mark.parametrize("made_of", ["auto", "images", "videos"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_streamed_conv3d_is_as_near_to_float64_as_eager(
    device: torch.device, dtype: torch.dtype, made_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, made_of)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(4, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv3d(16, 3, 3))
    model = model.to(device, dtype).requires_grad_(False)
    input = drawn(device, 1, 4, 5, 48, 40, dtype=dtype)
    with torch.inference_mode():
        exact = exactly(model, lambda model, input: model(input), input)
        eager = model(input)
        with stream(model, tuning=SMALL):
            result = model(input)
    assert_near(result, eager, exact)
