"""What a GPU does at once: copies beside work, several streams, threads; and that the host does not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comfyui_patchconv.streaming import Streamed, stream, streamed
from comfyui_patchconv.streaming.execute import pass_loop
from comfyui_patchconv.streaming.execute.copies import SideStreams

from .helpers import SMALL, apart, assert_near, drawn, exactly, vae

CYCLES = 400_000_000
"""Of the device's clock: some tenths of a second, longer than any copy here."""


def test_a_copy_out_runs_beside_the_work_behind_it(gpu: torch.device) -> None:
    copies, source = SideStreams(gpu), torch.full((16 << 20,), 3.0, device=gpu)
    target = copies.room(source)
    torch.cuda.synchronize(gpu)
    arrival = copies.start(target, source)
    torch.cuda._sleep(CYCLES)
    behind = torch.cuda.current_stream(gpu).record_event()
    arrival.synchronize()
    assert not behind.query(), "the copy waited for work that was given after it"
    assert target.is_pinned()
    assert bool((target == 3.0).all())
    behind.synchronize()


def test_a_copy_waits_for_the_work_before_it(gpu: torch.device) -> None:
    copies, source = SideStreams(gpu), torch.zeros(16 << 20, device=gpu)
    target = copies.room(source)
    torch.cuda._sleep(CYCLES)
    source.fill_(5.0)
    copies.start(target, source).synchronize()
    assert bool((target == 5.0).all())


def test_work_waits_for_the_copy_that_it_reads(gpu: torch.device) -> None:
    copies, target = SideStreams(gpu), torch.zeros(16 << 20, device=gpu)
    away = copies.room(target)
    away.fill_(7.0)
    torch.cuda._sleep(CYCLES)  # the copy back begins behind it
    copies.await_on_device(copies.start(target, away))
    assert float(target.sum()) == 7.0 * target.numel()


@pytest.mark.parametrize("part", ["decode", "encode"])
def test_offloaded_maps_arrive_whatever_the_device_is_at(device: torch.device, part: str) -> None:
    model = vae(device)
    input = drawn(device, *((1, 4, 12, 8) if part == "decode" else (1, 3, 96, 64)))
    runner, method = Streamed(1, tuning=SMALL), getattr(model, part)
    with torch.inference_mode():
        exact = exactly(model, lambda model, input: getattr(model, part)(input), input)
        eager = method(input)
        for _ in range(10 if device.type == "cuda" else 2):
            result = runner.call(method, (input,), {})
            assert_near(result, eager, exact)
    assert runner.last is not None
    assert runner.last.offloaded


def test_a_call_keeps_to_the_stream_that_is_current(gpu: torch.device) -> None:
    model, latent = vae(gpu), drawn(gpu, 1, 4, 12, 8)
    with torch.inference_mode():
        expected = model.decode(latent)
        side = torch.cuda.Stream(gpu)
        for budget in (None, 1):
            with torch.cuda.stream(side), stream(model.decode, budget=budget, tuning=SMALL):
                torch.cuda._sleep(CYCLES // 10)
                input = latent * 1.0  # of this stream, behind the sleep
                result = model.decode(input)
            side.synchronize()
            assert apart(result, expected.double())[0] <= 1e-4


@pytest.mark.parametrize("budget", [None, 1])
def test_threads_with_streams_of_their_own(device: torch.device, budget: Any) -> None:
    """Each has a model of its own: what streams one is put in the place of a method of it."""
    latents = [drawn(device, 1, 4, 8 + number, 8, seed=number) for number in range(4)]

    def work(latent: Tensor) -> tuple[Tensor, Tensor]:
        model, gpu = vae(device), device.type == "cuda"
        if gpu:
            torch.cuda.synchronize(device)
        side = torch.cuda.Stream(device) if gpu else None
        with torch.inference_mode(), torch.cuda.stream(side) if side is not None else nullcontext():
            expected = model.decode(latent)
            run = streamed(model.decode, budget=budget, tuning=SMALL)
            results = [run(latent) for _ in range(3 if gpu else 1)]
        if side is not None:
            side.synchronize()
        return results[-1], expected

    with ThreadPoolExecutor(len(latents)) as pool:
        for result, expected in pool.map(work, latents):
            assert apart(result, expected.double())[0] <= 1e-4


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within the block it is an error to wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def padded(mode: str) -> Any:
    return lambda x: F.conv2d(F.silu(F.pad(x, (1, 1, 2, 2), mode)), torch.ones(4, 4, 3, 3, device=x.device))


@pytest.mark.parametrize("part", ["decode", "encode", "reflect", "replicate"])
def test_the_host_does_not_wait_within_a_sweep(gpu: torch.device, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vae(gpu)
    if part in ("decode", "encode"):
        function = getattr(model, part)
        input = drawn(gpu, *((1, 4, 12, 8) if part == "decode" else (1, 3, 96, 64)))
    else:
        function, input = padded(part), drawn(gpu, 1, 4, 256, 192)
    runner, passes, run = Streamed(tuning=SMALL), [], pass_loop.PassLoop.compute

    def guarded(one_pass: Any) -> None:
        with no_waiting():
            run(one_pass)
        passes.append(one_pass)

    with torch.inference_mode():
        expected = runner.call(function, (input,), {})  # libraries may wait when they start
        monkeypatch.setattr(pass_loop.PassLoop, "compute", guarded)
        result = runner.call(function, (input,), {})
    assert passes
    assert apart(result, expected.double())[0] <= 1e-5
