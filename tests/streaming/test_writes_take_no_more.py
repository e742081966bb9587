"""Writes to memory that deferred steps read: what is kept of it takes no more than eager does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocations import allocated
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Streamed, streamed
from comfyui_patchconv.streaming.record.held import Memory

from .comparing import assert_alike

MIB = 1 << 20
SIDE = 256
CONVOLVE = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def a_buffer(x: Tensor) -> list[Tensor]:
    buffer, means = torch.zeros(x.shape), []
    for _ in range(8):
        buffer.mul_(0.5).add_(x)
        means.append(CONVOLVE(buffer).mean((2, 3)))
    return means


def the_argument(x: Tensor) -> list[Tensor]:
    means = []
    for _ in range(8):
        means.append(CONVOLVE(x).mean((2, 3)))
        x.add_(1)
    return means


def views_of_the_argument(x: Tensor) -> list[Tensor]:
    sums = [F.relu(x[:, :, :, column:]).sum((1, 2, 3)) for column in range(8)]
    x.mul_(2)
    return sums


def operands(x: Tensor) -> list[Tensor]:
    operand, means = torch.zeros(x.shape), []
    for _ in range(8):
        means.append((CONVOLVE(x) * operand).mean((2, 3)))
        operand.add_(1)
    return means


def statistics_and_another_map(x: Tensor) -> Any:
    """A map that is made of something else stays deferred."""
    return the_argument(x), CONVOLVE(drawn(1, 16, 8, 8)).sum()


def a_large_weight(x: Tensor) -> Tensor:
    staging, y = torch.empty(1024, 1024), x.view(1, 1024, 1024)
    for layer in range(8):
        staging.copy_(WEIGHTS[layer % 2])
        y = F.linear(y, staging)
    return y


WEIGHTS = [drawn(1024, 1024) / 32, drawn(1024, 1024).flip(0) / 32]


@pytest.mark.parametrize(
    "function",
    [a_buffer, the_argument, views_of_the_argument, operands, statistics_and_another_map, a_large_weight],
    ids=lambda function: function.__name__,
)
def test_writes_to_what_deferred_steps_read_take_no_more_than_in_eager(function: Callable[[Tensor], Any]) -> None:
    x = drawn(1, 16, SIDE, SIDE)
    run = Streamed()
    with torch.no_grad():
        expected, eager = allocated(lambda: function(x.clone()))
        result, ours = allocated(lambda: run.call(function, (x.clone(),), {}))
    assert_alike(result, expected)
    assert ours.peak <= 1.1 * eager.peak


def test_copies_stay_within_a_part_of_a_budget() -> None:
    """Of weights that are few beside eager's maps, and many beside a budget."""
    kernels = [drawn(16, 16, 3, 3) / 12 for _ in range(4)]
    padding = torch.empty(1 << 19)
    copies = []

    def run(x: Tensor) -> Tensor:
        for kernel in kernels * 4:
            padding.fill_(float(kernel[0, 0, 0, 0]))
            x = F.silu(F.conv2d(x, kernel, padding=1)) + padding[: 16 * 1024].view(1, 16, 32, 32).repeat(1, 1, 16, 16)
            copies.append(call.last.recorder.memory.copied if call.last is not None else 0)
        return x

    call = Streamed(budget=8 * MIB)
    with torch.no_grad():
        expected = run(drawn(1, 16, 512, 512))
        copies.clear()
        assert_alike(call.call(run, (drawn(1, 16, 512, 512),), {}), expected)
    assert max(copies) <= 2 * MIB


def test_small_weights_in_one_buffer_are_streamed_with_copies_that_the_plan_counts() -> None:
    kernels, staging = [drawn(16, 16, 3, 3) / 12 for _ in range(12)], torch.empty(16, 16, 3, 3)

    def run(x: Tensor, stages: bool) -> Tensor:
        for kernel in kernels:
            x = F.silu(F.conv2d(x, staging.copy_(kernel) if stages else kernel, padding=1))
        return x.mean((2, 3))

    x, peaks = drawn(1, 16, 512, 512), []
    for stages in (False, True):
        call = Streamed()
        with torch.no_grad():
            assert_alike(call.call(run, (x, stages), {}), run(x, stages))
        assert call.last is not None
        assert not call.ran_eagerly
        peaks.append(call.last.peak)
    assert peaks[1] - peaks[0] == 11 * staging.nbytes


class Reader:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Any = tensor


def copied_parts(memory: Tensor, parts: Callable[[Tensor], list[Tensor]]) -> int:
    """Bytes that are kept of `parts` of memory that is written to; they stay what they were."""
    watched, readers = Memory(), [Reader(part) for part in parts(memory)]
    before = [reader.tensor.clone() for reader in readers]
    for reader in readers:
        watched.watch(reader)
    told = watched.to_copy(memory)
    watched.before_write(memory)
    memory.zero_()
    for reader, value in zip(readers, before):
        assert torch.equal(reader.tensor, value)
    storages = {reader.tensor.untyped_storage()._cdata: reader.tensor.untyped_storage() for reader in readers}
    assert sum(storage.nbytes() for storage in storages.values()) == told == watched.copied
    del readers, reader, storages
    assert watched.copied == 0
    return told


def test_parts_that_overlap_are_copied_once() -> None:
    memory = drawn(64, 64)
    assert copied_parts(memory.clone(), lambda whole: [whole[:, column:] for column in range(8)]) == 64 * 64 * 4
    assert copied_parts(memory.clone(), lambda whole: [whole, whole.t(), whole.view(torch.int32)]) == 64 * 64 * 4
    assert copied_parts(memory.clone(), lambda whole: [whole[:4], whole[:4], whole[60:]]) == 8 * 64 * 4
    assert copied_parts(memory.clone(), lambda whole: [whole[:, :1], whole[:, 63:]]) == 2 * 64 * 4
    assert copied_parts(memory.clone(), lambda whole: [whole[3:, 1:], whole[4:, 1:], whole[:0]]) <= 61 * 64 * 4
    pairs = torch.view_as_complex(memory.view(64, 32, 2).clone())
    assert copied_parts(pairs, lambda whole: [whole, whole.conj(), whole.imag]) <= 3 * 64 * 64 * 4


def test_maps_that_were_written_before_have_the_values_of_their_time() -> None:
    """Within one call some steps are evaluated before a write, and some read copies."""

    def run(x: Tensor) -> Any:
        buffer, found = x * 0 + torch.zeros(x.shape), []
        staging = torch.zeros(16, 1, 1)
        for step in range(6):
            staging.fill_(step)
            found.append(F.relu(CONVOLVE(x)) * staging)
            x.mul_(0.9)
            buffer += found[-1]
        return [one.sum((2, 3)) for one in found], buffer, x

    x = drawn(1, 16, SIDE, SIDE)
    with torch.no_grad():
        assert_alike(streamed(run)(x.clone()), run(x.clone()))
