"""Images of many channels on a CPU: channels last inside, fewer multiplications, the program's own order outside."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.conv import winograd
from comfyui_patchconv.streaming import Tuning, streamed
from comfyui_patchconv.streaming.graph.statistics import Statistics

from .comparing import skip_without_convolutions

CHANNELS = 64
STRIPS = {
    "one row, kernels not kept": Tuning(strip_bytes=1, always=True),
    "few rows": Tuning(strip_bytes=600_000, always=True),
    "one strip": Tuning(always=True),
}
strips = pytest.mark.parametrize("tuning", STRIPS.values(), ids=STRIPS)


@pytest.fixture(autouse=True)
def fewer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """From so many channels on, whatever pays off on the processor of this machine."""
    monkeypatch.setattr(winograd, "least_channels", lambda: CHANNELS)


class Block(nn.Module):
    """Norm, convolution, what is added; upsampled to twice its size behind that."""

    def __init__(self, *, channels: int = CHANNELS) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.narrow = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.first(F.silu(self.norm(x)))
        return self.narrow(F.silu(self.second(F.interpolate(y, scale_factor=2.0, mode="nearest"))))


def block(dtype: torch.dtype = torch.float32) -> Block:
    torch.manual_seed(0)
    return Block().to(dtype)


@strips
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
def test_result_and_strides_are_eagers(tuning: Tuning, batch: int, order: torch.memory_format) -> None:
    module, x = block(), torch.randn(batch, CHANNELS, 70, 17).contiguous(memory_format=order)
    with torch.no_grad():
        expected = module(x)
        actual = streamed(module, tuning=tuning)(x)
    assert_same(actual, expected, 1e-5)
    assert actual.stride() == expected.stride()


@strips
def test_a_video_of_many_channels_gives_eagers_result(tuning: Tuning) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1), nn.SiLU(), nn.Conv3d(CHANNELS, 3, 3, padding=1))
    x = torch.randn(1, CHANNELS, 3, 70, 9)
    with torch.no_grad():
        expected = module(x)
        assert_same(streamed(module, tuning=tuning)(x), expected, 1e-5)


@strips
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
def test_what_is_not_finite_stays_where_eager_has_it(tuning: Tuning, value: float) -> None:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    x = torch.randn(1, CHANNELS, 70, 17)
    x[0, 5, 31, 4] = value

    def run(x: Tensor) -> Tensor:
        return convolutions[1](F.interpolate(convolutions[0](x), scale_factor=2.0, mode="nearest"))

    with torch.no_grad():
        expected, actual = run(x), streamed(run, tuning=tuning)(x)
    finite = expected.isfinite()
    assert finite.all() == (value == 3e38)
    assert torch.equal(actual.isfinite(), finite)
    assert_same(actual[finite], expected[finite], 1e-5)


@strips
@pytest.mark.parametrize("factor", [1e3, 1e4, 1e6])
def test_an_outlier_costs_rows_around_it_no_digits(tuning: Tuning, factor: float) -> None:
    """Seen where what follows is bounded: the outlier's own values do not widen the range there."""
    torch.manual_seed(0)
    convolution, x = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), torch.randn(1, CHANNELS, 90, 20)
    x[:, :, 44, 8] *= factor
    with torch.no_grad():
        actual = streamed(lambda x: torch.tanh(convolution(x)), tuning=tuning)(x)
        exact = torch.tanh(convolution.double()(x.double()))
    difference = (actual - exact).abs()
    difference[:, :, 43:46, 7:10] = 0  # what the outlier is a part of
    assert float(difference.max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("where", ["a row", "half of it", "some pixels"])
def test_large_places_cost_those_beside_them_no_more_than_eager(where: str, dtype: torch.dtype) -> None:
    skip_without_convolutions(dtype)
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Tanh()), torch.randn(1, CHANNELS, 90, 40)
    places = {"a row": np.s_[:, :, 41], "half of it": np.s_[:, :, :42], "some pixels": np.s_[:, :, 41, 5:25]}
    x[places[where]] *= 1e3
    module, x = module.to(dtype), x.to(dtype)
    with torch.no_grad():
        expected, actual = module(x), streamed(module, tuning=STRIPS["few rows"])(x)
        exact = module.double()(x.double())
    error, eagers = ((result.double() - exact).abs().max() for result in (actual, expected))
    assert error <= max(3 * eagers, 1e-5)


def test_what_reads_memory_as_it_lies_reads_eagers_order() -> None:
    """Upsampled and convolved at once, channels last inside."""
    torch.manual_seed(0)
    convolution, x = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), torch.randn(1, CHANNELS, 40, 40)

    def blocks(x: Tensor) -> Tensor:
        y = convolution(F.interpolate(x, scale_factor=2.0))
        return y.as_strided((CHANNELS, 20, 20, 4, 4), (6400, 320, 4, 80, 1)) * 2

    with torch.no_grad():
        assert_same(streamed(blocks)(x), blocks(x), 1e-5)


@strips
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_farther_from_float64_than_eager(tuning: Tuning, dtype: torch.dtype) -> None:
    skip_without_convolutions(dtype)
    module, x = block(dtype), torch.randn(1, CHANNELS, 40, 30).to(dtype)
    with torch.no_grad():
        expected, actual = module(x), streamed(module, tuning=tuning)(x)
        exact = module.double()(x.double())
    error, eagers = ((result.double() - exact).square().mean() for result in (actual, expected))
    assert actual.dtype == dtype
    assert error**0.5 <= 1.05 * eagers**0.5


def test_kernels_are_kept_for_a_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[Tensor]] = []
    make: Callable[[Tensor, int], list[Tensor]] = winograd.kernels
    monkeypatch.setattr(winograd, "kernels", lambda *args: kept.append(made := make(*args)) or made)
    module, x = block(), torch.randn(1, CHANNELS, 70, 17)
    with torch.no_grad():
        streamed(module, tuning=STRIPS["few rows"])(x)
        assert len(kept) == 1  # for all of its strips
        kept.clear()
        streamed(module, tuning=STRIPS["one row, kernels not kept"])(x)
        assert not kept


@pytest.mark.parametrize("offset", [0.0, 1e4, -3e5])
@pytest.mark.parametrize("outlier", [0.0, 60.0, 1e6])
def test_statistics_of_channels_last(offset: float, outlier: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 24, 9) * torch.rand(32, 1, 1) + offset
    x[:, :, 0, 0] += outlier
    x = x.contiguous(memory_format=torch.channels_last)
    statistics = Statistics(8, 2)
    for strip in x.split(5, 2):
        statistics.add(strip.contiguous(memory_format=torch.channels_last))
    groups = x.double().reshape(2, 8, -1)
    assert bool(((statistics.mean - groups.mean(-1)).abs() < 1e-6 * groups.std(-1)).all())
    torch.testing.assert_close(statistics.variance, groups.var(-1, unbiased=False), rtol=1e-6, atol=0)
