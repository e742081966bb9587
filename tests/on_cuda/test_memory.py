"""Budgets against what CUDA's allocator had, and memory that ends for real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from allocations import allocated
from torch import Tensor, nn

from comfyui_patchconv import convert_model
from comfyui_patchconv.memory.errors import is_out_of_memory
from comfyui_patchconv.streaming import Streamed, Tuning, expect

from .helpers import SMALL, Autoencoder, apart, drawn, in_use, vae

WORKSPACE = 64 << 20
"""Bytes that cuDNN and cuBLAS may work in beside what a plan counts."""


def large(device: torch.device, part: str = "decode") -> tuple[Autoencoder, Tensor]:
    """A VAE and an input whose maps are large beside any workspace; on a CPU they are small."""
    gpu = device.type == "cuda"
    model = vae(device, torch.float16 if gpu else torch.float32, (64, 64, 128, 128) if gpu else (8, 8, 8, 8))
    side = 2048 if gpu else 96
    shape = (1, 4, side // 8, side // 8) if part == "decode" else (1, 3, side, side)
    return model, drawn(device, *shape, dtype=torch.float16 if gpu else torch.float32)


def taken(device: torch.device, call: Any) -> tuple[Tensor, int]:
    """What `call` returns, and the most bytes beyond those before."""
    if device.type != "cuda":
        result, found = allocated(call)
        return result, found.peak
    before = in_use(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before


@pytest.mark.parametrize("share", [None, 2, 4])
@pytest.mark.parametrize("part", ["decode", "encode"])
def test_a_decode_takes_what_its_plan_says_and_stays_within_its_budget(
    device: torch.device, part: str, share: int | None
) -> None:
    model, input = large(device, part)
    tuning = SMALL if device.type == "cpu" else Streamed().tuning

    def planned(budget: int | None) -> Any:
        return expect(
            model, lambda copy, make: getattr(copy, part)(make(input.shape)), device=device, dtype=input.dtype,
            budget=budget, tuning=tuning,
        )  # fmt: skip

    budget = None if share is None else planned(None).peak // share
    plan, method = planned(budget), getattr(model, part)
    with torch.inference_mode():
        expected = method(input)
        Streamed(tuning=tuning).call(method, (input[..., :16, :16],), {})  # the libraries' handles are there
        runner = Streamed(budget, tuning=tuning)
        result, peak = taken(device, lambda: runner.call(method, (input,), {}))
    slack = WORKSPACE if device.type == "cuda" else 0
    assert peak <= 1.05 * plan.peak + slack
    if budget is not None and plan.peak <= budget:
        assert peak <= budget + slack
    assert apart(result, expected.double())[0] <= (1e-2 if result.dtype == torch.float16 else 1e-5)


def test_a_decode_leaves_nothing_behind(gpu: torch.device) -> None:
    model, input = large(gpu)
    runner = Streamed(1)
    with torch.inference_mode():
        runner.call(model.decode, (input,), {})
        runner.last = None
        before = in_use(gpu)
        for _ in range(2):
            runner.call(model.decode, (input,), {})
            runner.last = None
        assert in_use(gpu) <= before


@contextmanager
def no_more_than(device: torch.device, size: int) -> Iterator[None]:
    """Within the block the device gives so many bytes beyond those in use, and no more."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = (torch.cuda.memory_reserved(device) + size) / total
    torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


def test_a_decode_that_does_not_fit_eagerly_streams(gpu: torch.device) -> None:
    model, latent = large(gpu)
    with torch.inference_mode():
        expected, eager = taken(gpu, lambda: model.decode(latent))
        Streamed().call(model.decode, (latent,), {})  # what libraries keep is there
        with no_more_than(gpu, eager // 2 + WORKSPACE):
            with pytest.raises(torch.cuda.OutOfMemoryError):
                model.decode(latent)
            result = Streamed().call(model.decode, (latent,), {})
    assert apart(result, expected.double())[0] <= 1e-2


def test_strips_are_halved_where_memory_ends(gpu: torch.device) -> None:
    """The plan wants strips that do not fit, of a device that has less than it seems to have."""
    model, latent = large(gpu)
    runner = Streamed(tuning=Tuning(strip_bytes=1 << 40, always=True))
    with torch.inference_mode():
        expected = model.decode(latent)
        _, needed = taken(gpu, lambda: Streamed().call(model.decode, (latent,), {}))
        with no_more_than(gpu, round(1.3 * needed) + WORKSPACE):
            result = runner.call(model.decode, (latent,), {})
    assert apart(result, expected.double())[0] <= 1e-2


def test_a_decode_for_which_nothing_is_left_fails_in_one_piece(gpu: torch.device) -> None:
    model, latent = large(gpu)
    runner = Streamed()
    with torch.inference_mode():
        expected = runner.call(model.decode, (latent,), {})
        runner.last = None
        before = in_use(gpu)
        with no_more_than(gpu, 1 << 20), pytest.raises(RuntimeError) as raised:
            runner.call(model.decode, (latent,), {})
        assert is_out_of_memory(raised.value)
        del raised
        runner.last = None
        assert in_use(gpu) <= before + (1 << 20)
        result = runner.call(model.decode, (latent,), {})
    assert apart(result, expected.double())[0] <= 1e-2


def test_one_convolution_takes_little_more_than_its_output(gpu: torch.device) -> None:
    module = nn.Conv2d(128, 128, 3, padding=1).to(gpu, torch.float16).requires_grad_(False)
    input = drawn(gpu, 1, 128, 64, 2048, dtype=torch.float16).repeat(1, 1, 32, 1)
    with torch.inference_mode():
        expected = module(input)
        convert_model(module, 16, threshold=0)
        module(input)  # cuDNN's handle and its plans are there
        result, peak = taken(gpu, lambda: module(input))
        assert peak <= 1.05 * result.nbytes + WORKSPACE
        with no_more_than(gpu, round(1.1 * result.nbytes) + WORKSPACE):
            assert apart(module(input), expected.double())[0] <= 1e-2
