"""Triton's kernels, compiled for the GPU that is there: what they give, and that they did."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from comfyui_patchconv.streaming import streamed
from comfyui_patchconv.streaming.execute.kernels import by_triton
from comfyui_patchconv.streaming.execute.kernels.by_triton import Inputs, compute
from comfyui_patchconv.streaming.execute.kernels.choice import uses_triton
from comfyui_patchconv.streaming.execute.kernels.elements import Form
from comfyui_patchconv.streaming.graph.statistics import Statistics

from .helpers import HALVES, SMALL, assert_near, drawn, exactly, vae

TYPES = (torch.float32, *HALVES)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """A GPU for which Triton compiles."""
    if device.type != "cuda":
        pytest.skip("on a CPU tests/streaming/test_kernels.py has the kernels interpreted")
    if not uses_triton(device):
        pytest.skip("Triton is not installed here, or PATCHCONV_KERNELS=torch")
    return device


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(1, 128, 66, 256), (2, 70, 9, 33), (1, 3, 40, 64)])
def test_a_form_and_its_moments(gpu: torch.device, shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    order = torch.channels_last if last else torch.contiguous_format
    map, other = (drawn(gpu, *shape, dtype=dtype, seed=seed) for seed in (1, 2))
    line = drawn(gpu, 4, shape[0] * shape[1], seed=3)
    rows = torch.full((*shape[:2], shape[2] + 3, shape[3]), 9.0, device=gpu, dtype=dtype).to(memory_format=order)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done, _ = compute(Form(scaled=True, first="silu", added=1.0), Inputs(map, other, line), rows, 2, 1)
        _, moments = compute(Form(), Inputs(rows), None, 2, gathers=True)
    wide = map.double() * line[2].double().view(*shape[:2], 1, 1) + line[3].double().view(*shape[:2], 1, 1)
    exact = F.pad(F.silu(wide) + other.double(), (0, 0, 1, 2))
    assert done
    most = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert float((rows - exact).abs().max()) <= most * float(exact.abs().max())
    assert moments is not None
    statistics, groups = Statistics(1, shape[0]), rows.double().reshape(shape[0], 1, -1)
    statistics.add_moments(moments, rows.numel())
    torch.testing.assert_close(statistics.mean, groups.mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(statistics.variance, groups.var(-1, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("last", [False, True])
def test_an_upsampled_form(gpu: torch.device, last: bool, dtype: torch.dtype) -> None:
    order = torch.channels_last if last else torch.contiguous_format
    map, other = (drawn(gpu, 2, 70, 9, 33, dtype=dtype, seed=seed) for seed in (1, 2))
    rows = torch.full((2, 70, 20, 66), 9.0, device=gpu, dtype=dtype).to(memory_format=order)
    form = Form(first="silu", added=1.0, repeats=(1, 1, 2, 2))
    done, _ = compute(form, Inputs(map.to(memory_format=order), other), rows, 2, 1, rows=(1, 18))
    exact = F.interpolate(F.silu(map.double()) + other.double(), scale_factor=2.0, mode="nearest")[:, :, 1:18]
    assert done
    most = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert float((rows - F.pad(exact, (0, 0, 1, 2))).abs().max()) <= most * float(exact.abs().max())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("part", ["decode", "encode"])
@pytest.mark.parametrize("choice", ["auto", "torch", "kitchen"])
def test_a_vae_by_kernels_and_without(
    gpu: torch.device, part: str, dtype: torch.dtype, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if choice == "kitchen":
        pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed here")
    launched: list[Any] = []
    launch = by_triton._launch
    monkeypatch.setattr(by_triton, "_launch", lambda *given, **named: launched.append(named) or launch(*given, **named))
    monkeypatch.setenv("PATCHCONV_KERNELS", choice)
    model = vae(gpu, dtype, (32, 64, 64, 64))
    input = drawn(gpu, *((1, 4, 24, 16) if part == "decode" else (1, 3, 192, 128)), dtype=dtype)
    method = getattr(model, part)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        eager = method(input)
        result = streamed(method, tuning=SMALL)(input)
        exact = exactly(model, lambda model, input: getattr(model, part)(input), input)
    assert_near(result, eager, exact)
    assert bool(launched) == (choice == "auto")
    assert by_triton.works()
