"""A map that the program copies into memory that is there is computed there: nothing of its size lies beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Streamed, Tuning, streamed

from .comparing import TUNINGS, assert_alike

WEIGHT = nn.Parameter(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)) / 6, requires_grad=False)
X = torch.randn(2, 4, 15, 8, generator=torch.Generator().manual_seed(2))


def convolved(x: Tensor) -> Tensor:
    return F.silu(F.conv2d(x, WEIGHT, padding=1))


def into_new_memory(x: Tensor) -> Tensor:
    return torch.zeros(X.shape).copy_(convolved(x))


def into_a_part(x: Tensor) -> Tensor:
    out = torch.zeros(2, 4, 20, 9)
    out[:, :, 3:18, 1:].copy_(convolved(x))
    out[0, :, 2:17, :8] = convolved(x * 2)[1]
    return out


def into_another_order(x: Tensor) -> tuple[Tensor, Tensor]:
    out, last = torch.zeros(8, 15, 4, 2), torch.zeros(X.shape).contiguous(memory_format=torch.channels_last)
    out.permute(3, 2, 1, 0).copy_(convolved(x))
    return out, last.copy_(convolved(x))


def into_another_type(x: Tensor) -> tuple[Tensor, Tensor]:
    levels = torch.zeros(X.shape, dtype=torch.uint8).copy_(convolved(x).abs().mul(20).round().to(torch.uint8))
    return levels, torch.zeros(X.shape, dtype=torch.float64).copy_(convolved(x))


def into_more_places(x: Tensor) -> Tensor:
    return torch.zeros(3, *X.shape).copy_(convolved(x))


def into_the_argument(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    x.copy_(convolved(x))
    return x, y


def twice(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, one, other = convolved(x), torch.zeros(X.shape), torch.zeros(X.shape)
    one.copy_(y)
    other.copy_(y)
    one.mul_(2)
    return one, other, y


def and_go_on(x: Tensor) -> tuple[Tensor, ...]:
    y, out = convolved(x), torch.zeros(X.shape)
    later = convolved(y)
    out.copy_(y)
    shown, sums = y[:, :, 2:5], y.sum()
    out.add_(1)
    y.mul_(3)
    return y, out, later, shown, sums


PROGRAMS = [
    into_new_memory, into_a_part, into_another_order, into_another_type, into_more_places, into_the_argument, twice,
    and_go_on,
]  # fmt: skip


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_it_is_what_eager_copies(program: Callable[[Tensor], object], tuning: Tuning, budget: int | None) -> None:
    given = [X.clone(), X.clone()]
    with torch.no_grad():
        expected = program(given[0])
    assert_alike(streamed(program, tuning=tuning, budget=budget)(given[1]), expected)
    assert torch.allclose(given[0], given[1], atol=1e-5)


def test_a_map_that_is_returned_too_has_memory_of_its_own() -> None:
    out = torch.zeros(X.shape)

    def program(x: Tensor) -> Tensor:
        y = convolved(x)
        out.copy_(y)
        return y

    result = streamed(program, tuning=TUNINGS["one row"])(X)
    out.zero_()
    assert_alike(result, convolved(X))


def test_nothing_of_its_size_lies_beside_it() -> None:
    large = torch.randn(1, 4, 512, 512)
    out = torch.empty(1, 4, 2048, 2048)

    def larger(x: Tensor) -> Tensor:
        return F.interpolate(convolved(x), scale_factor=4.0, mode="nearest")

    peaks = []
    for program in (larger, lambda x: out.copy_(larger(x))):
        runner = Streamed(budget=32 << 20, tuning=Tuning(strip_bytes=1 << 20, allocator_bytes=0))
        with torch.no_grad():
            runner.call(program, (large,), {})
        assert runner.last is not None
        peaks.append(runner.last.peak)
    assert peaks[1] <= peaks[0] - out.nbytes
    assert_alike(out, larger(large))


def test_what_was_stopped_on_the_way_is_computed_elsewhere() -> None:
    strips = []

    def stop(done: int, work: int) -> None:
        strips.append(done)
        if len(strips) == 1:
            raise KeyboardInterrupt

    def program(x: Tensor) -> tuple[Tensor, Tensor]:
        y, out = convolved(x), torch.zeros(X.shape)
        try:
            out.copy_(y)
        except KeyboardInterrupt:
            out.fill_(7)
        return y, out

    y, out = streamed(program, tuning=TUNINGS["one row"], on_progress=stop)(X)
    assert_alike(y, convolved(X))
    assert bool((out == 7).all())
