"""Sounds `[N, C, L]`, whose rows are their samples: networks of one dimension, in strips of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocations import allocated
from conv_helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from comfyui_patchconv.streaming import Expected, Make, Streamed, Tuning, expect, streamed

from .comparing import KEPT_ARE_ORDINARY, ONE_ROW, TUNINGS, assert_as_eager

old_weight_norm: Any = nn.utils.weight_norm
NORMS: dict[str, Callable[[nn.Module], Any]] = {"new": parametrizations.weight_norm, "old": old_weight_norm}
CPU = torch.device("cpu")


class Snake(nn.Module):
    """A sine's square added, of a learnt frequency and height for each channel, both kept as logarithms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = (value.exp()[None, :, None].to(x.device) for value in (self.alpha, self.beta))
        return x + (beta + 1e-9).reciprocal() * torch.sin(x * alpha).pow(2)


class Residual(nn.Module):
    """Two convolutions, the first dilated, beside what comes in."""

    def __init__(self, channels: int, dilation: int, norm: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        wide = nn.Conv1d(channels, channels, 7, dilation=dilation, padding=3 * dilation)
        self.layers = nn.Sequential(
            Snake(channels), norm(wide), Snake(channels), norm(nn.Conv1d(channels, channels, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Codec(nn.Module):
    """A sound's encoder and decoder as such are built: strided convolutions, and transposed ones, with weight norm."""

    def __init__(self, width: int, strides: tuple[int, ...] = (2, 4, 5), norm: str = "new") -> None:
        super().__init__()
        normed = NORMS[norm]
        widths = [width, *(width * 2**index for index in range(len(strides)))]
        down: list[nn.Module] = [normed(nn.Conv1d(2, width, 7, padding=3))]
        up: list[nn.Module] = [Snake(width), normed(nn.Conv1d(width, 2, 7, padding=3, bias=False)), nn.Tanh()]
        for stride, small, large in zip(strides, widths, widths[1:]):
            sizes: Any = {"kernel_size": 2 * stride, "stride": stride, "padding": math.ceil(stride / 2)}
            down += [*(Residual(small, dilation, normed) for dilation in (1, 3, 9)), Snake(small)]
            down.append(normed(nn.Conv1d(small, large, **sizes)))
            block = [Snake(large), normed(nn.ConvTranspose1d(large, small, **sizes))]
            up = [*block, *(Residual(small, dilation, normed) for dilation in (1, 3, 9)), *up]
        self.encoder = nn.Sequential(*down, Snake(widths[-1]), normed(nn.Conv1d(widths[-1], 8, 3, padding=1)))
        self.decoder = nn.Sequential(normed(nn.Conv1d(8, widths[-1], 7, padding=3)), *up)
        self.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        mean, scale = self.encoder(x).chunk(2, dim=1)
        return mean + F.softplus(scale) * 0.1

    def decode(self, x: Tensor) -> Tensor:
        return self.decoder(x)


def sound(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("strides", [(2, 3), (2, 4, 5)], ids=str)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_codec_streams(strides: tuple[int, ...], norm: str, tuning: Tuning) -> None:
    """Nothing of it is evaluated whole, whatever its length is a multiple of."""
    torch.manual_seed(0)
    codec, report = Codec(4, strides, norm), dict[str, int]()
    assert_as_eager(codec.decode, sound(1, 8, 13), tuning=tuning, report=report)
    assert_as_eager(codec.encode, sound(2, 2, 211), tuning=tuning, report=report)
    assert not report


def test_a_codec_in_half_precision_is_no_farther_from_double() -> None:
    torch.manual_seed(0)
    codec = Codec(4).to(torch.bfloat16)
    x = sound(1, 8, 40).bfloat16()
    with torch.no_grad():
        eager, result = codec.decode(x), streamed(codec.decode, tuning=ONE_ROW)(x)
        exact = codec.double().decode(x.double())
    errors = [float((one.double() - exact).square().mean().sqrt()) for one in (result, eager)]
    assert errors[0] <= 1.05 * errors[1]


def counted(codec: Codec, method: str, shape: tuple[int, ...]) -> Expected:
    def run(copy: Any, make: Make) -> Any:
        return getattr(copy, method)(make(shape, counted=False))

    return expect(codec, run, device=CPU)


@pytest.mark.parametrize("method", ["decode", "encode"])
def test_memory_is_flat_as_the_sound_grows(method: str) -> None:
    """Counted, for three minutes and for nine of 48 kHz, at the widths and strides of Stable Audio's."""
    with torch.device("meta"):
        codec = Codec(128, (2, 4, 4, 8, 8))
    frames = 3 * 60 * 48_000 // 2048
    peaks = []
    for count in (frames, 3 * frames):
        shape, result = ((1, 8, count), (1, 2, 2048 * count))[:: 1 if method == "decode" else -1]
        expected = counted(codec, method, shape)
        assert expected.peak <= 0.1 * expected.eager
        peaks.append(expected.peak - 4 * math.prod(result))
    assert peaks[1] <= 1.05 * peaks[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_made_anew_are_counted(norm: str) -> None:
    """A short sound's maps are less than the weights that its call makes, of which eager has one at a time."""
    torch.manual_seed(0)
    codec, x = Codec(256, (2, 4), norm), sound(1, 8, 40)
    runner = Streamed()
    with torch.no_grad():
        codec.decode(x)  # old weight norm leaves its weights in the module
        expected, eager = allocated(lambda: codec.decode(x))
        result, taken = allocated(lambda: runner.call(codec.decode, (x,), {}))
    assert_same(result, expected, 1e-5)
    call = runner.last
    assert call is not None
    convolutions: list[Any] = [
        one for one in codec.decoder.modules() if isinstance(one, (nn.Conv1d, nn.ConvTranspose1d))
    ]
    made = sum(4 * math.prod(one.weight.shape) for one in convolutions)
    if norm == "new":
        assert taken.peak <= 1.2 * eager.peak < made
    assert taken.peak <= max(call.peak, call.eager_peak)


@KEPT_ARE_ORDINARY
def test_made_weights_that_the_program_keeps_are_ordinary() -> None:
    direction, size, kept = sound(3, 2, 5, seed=2), torch.ones(3, 1, 1), []

    def run(x: Tensor) -> Tensor:
        kept.append(torch.ops.aten._weight_norm(direction, size, 0))
        return F.conv1d(x, kept[-1], padding=2)

    x = sound(1, 2, 31)
    with torch.no_grad():
        expected = run(x)
        assert_same(streamed(run, tuning=ONE_ROW)(x), expected, 1e-6)
    assert type(kept[1]) is Tensor
    assert torch.equal(kept[0], kept[1])


def test_a_weight_whose_parameter_is_written_to_meanwhile() -> None:
    """As hosts do that keep one buffer for all weights."""
    direction, size = sound(3, 3, 5, seed=2), torch.ones(3, 1, 1)

    def run(x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.conv1d(x, torch.ops.aten._weight_norm(direction, size, 0), padding=2)
            direction.mul_(-0.5).add_(0.1)
        return x

    before = direction.clone()
    with torch.no_grad():
        expected = run(sound(1, 3, 31))
        direction.copy_(before)
        assert_same(streamed(run, tuning=ONE_ROW)(sound(1, 3, 31)), expected, 1e-5)


def test_gradients_of_made_weights() -> None:
    """Inputs that ask for none let a call be streamed; a weight that the program differentiates is made eagerly."""
    conv: Any = parametrizations.weight_norm(nn.Conv1d(2, 2, 3, padding=1))

    def run(x: Tensor) -> Tensor:
        with torch.enable_grad():
            loss = conv.weight.square().sum()
            (grad,) = torch.autograd.grad(loss, conv.parametrizations.weight.original1)
        return x * grad.abs().sum()

    x = sound(1, 2, 31)
    with torch.no_grad():
        assert_same(streamed(run, tuning=ONE_ROW)(x), run(x), 1e-5)


# Any network of one dimension

Layer = Callable[[Tensor], Tensor]


def _convolution(draw: Any, channels: int) -> tuple[Layer, int]:
    groups = draw(st.sampled_from([1, channels]))
    kernel, stride, dilation = (draw(st.integers(1, most)) for most in (5, 3, 3))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.integers(0, min((kernel - 1) * dilation, 3)))
    conv = nn.Conv1d(channels, channels, kernel, stride, padding, dilation, groups, padding_mode=mode)
    return parametrizations.weight_norm(conv) if draw(st.booleans()) else conv, channels


def _transposed(draw: Any, channels: int) -> tuple[Layer, int]:
    kernel, stride, dilation = (draw(st.integers(1, most)) for most in (6, 4, 2))
    padding = draw(st.integers(0, (kernel - 1) * dilation))
    added = draw(st.integers(0, max(stride, dilation) - 1))
    conv = nn.ConvTranspose1d(channels, channels, kernel, stride, padding, added, channels, True, dilation)
    return parametrizations.weight_norm(conv) if draw(st.booleans()) else conv, channels


def _upsampling(draw: Any, channels: int) -> tuple[Layer, int]:
    mode, factor = draw(st.sampled_from([("nearest", 2), ("nearest", 3), ("linear", 2), ("nearest-exact", 2)]))
    return (lambda x: F.interpolate(x, scale_factor=float(factor), mode=mode)), channels


def _pad(draw: Any, channels: int) -> tuple[Layer, int]:
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    mode = draw(st.sampled_from(["constant", "reflect", "replicate", "circular"]))
    return (lambda x: F.pad(x, (before, after), mode=mode)), channels


def _activation(draw: Any, channels: int) -> tuple[Layer, int]:
    return draw(
        st.sampled_from([Snake(channels), nn.ELU(), nn.GELU(), nn.Tanh(), nn.LeakyReLU(0.1), nn.SiLU()])
    ), channels


def _norm(draw: Any, channels: int) -> tuple[Layer, int]:
    layer, rms = nn.LayerNorm(channels), torch.ones(channels)
    over_channels: list[Layer] = [
        lambda x: layer(x.transpose(1, 2)).transpose(1, 2),
        nn.GroupNorm(2, channels),
        nn.BatchNorm1d(channels).eval(),
    ]
    if hasattr(F, "rms_norm"):  # torch 2.4 and newer
        over_channels.append(lambda x: F.rms_norm(x.movedim(1, -1), (channels,), rms).movedim(-1, 1))
    return draw(st.sampled_from(over_channels)), channels


def _attention(draw: Any, channels: int) -> tuple[Layer, int]:
    window = draw(st.sampled_from([0, 4]))
    linear = parametrizations.weight_norm(nn.Linear(channels, 3 * channels))

    def attend(x: Tensor) -> Tensor:
        tokens = x.transpose(1, 2)
        size = window or tokens.shape[1]
        padded = F.pad(tokens, (0, 0, 0, -tokens.shape[1] % size))
        query, key, value = linear(padded.reshape(-1, size, channels)).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(*(one[:, None] for one in (query, key, value)))
        return x + mixed.reshape(x.shape[0], -1, channels)[:, : tokens.shape[1]].transpose(1, 2)

    return attend, channels


LAYERS = [_convolution, _convolution, _transposed, _upsampling, _pad, _activation, _activation, _norm, _attention]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_random_networks_of_sound_give_eagers_result(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    channels, layers = 4, list[Layer]()
    for _ in range(data.draw(st.integers(1, 7))):
        layer, channels = data.draw(st.sampled_from(LAYERS))(data.draw, channels)
        layers.append(layer)

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    x = sound(2, 4, data.draw(st.integers(17, 41)))
    with torch.no_grad():
        try:
            expected = run(x)
        except RuntimeError:  # too short a sound for one of them
            return
        tuning = Tuning(data.draw(st.sampled_from([1, 200, 4_000])), always=True)
        assert_same(streamed(run, tuning=tuning)(x), expected, 2e-5)


def test_a_recurrent_layer_is_evaluated_whole() -> None:
    torch.manual_seed(0)
    lstm, conv = nn.LSTM(4, 4, batch_first=True), nn.Conv1d(4, 4, 5, padding=2)

    def run(x: Tensor) -> Tensor:
        return conv(lstm(conv(x).transpose(1, 2))[0].transpose(1, 2))

    report: dict[str, int] = {}
    assert_as_eager(run, sound(1, 4, 53), tuning=ONE_ROW, report=report)
    assert set(report) == {"lstm"}


# Spectrograms: linear attention over all of their pixels


def linear_attention(x: Tensor) -> Tensor:
    """Attention without a matrix of scores, as in deep compression autoencoders."""
    batch, _, height, width = x.shape
    query, key, value = x.reshape(batch, 2, -1, height * width).chunk(3, dim=2)
    query, key, value = query.relu(), key.relu(), F.pad(value, (0, 0, 0, 1), value=1.0)
    mixed = (value @ key.transpose(-1, -2)) @ query
    return (mixed[:, :, :-1] / (mixed[:, :, -1:] + 1e-15)).reshape(batch, -1, height, width)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["bands as rows", "time as rows"])
def test_linear_attention_is_gathered(turned: bool, dtype: torch.dtype, tuning: Tuning) -> None:
    torch.manual_seed(0)
    into, out = nn.Conv2d(4, 24, 3, padding=1).to(dtype), nn.Conv2d(8, 4, 3, padding=1).to(dtype)

    def run(x: Tensor) -> Tensor:
        if turned:  # bands come of a product with a filter bank: its rows are moments
            x = (x.transpose(-1, -2) @ torch.eye(x.shape[-2]).to(dtype)).transpose(-1, -2)
        return out(linear_attention(into(x)))

    report: dict[str, int] = {}
    assert_as_eager(run, sound(1, 4, 8, 21).to(dtype), tuning=tuning, report=report)
    assert not report


def test_linear_attention_stores_little() -> None:
    """Counted: of keys and values nothing is stored, but their product."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Conv2d(4, 96, 1), nn.Conv2d(32, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(linear_attention(self.into(x)))

    def run(copy: Any, make: Make) -> Any:
        return copy(make((1, 4, 512, 2048), counted=False))

    expected = expect(Attention(), run, device=CPU)
    maps = 4 * 32 * 512 * 2048
    assert expected.peak < 2 * maps  # queries, and strips
    assert expected.eager > 5 * maps


def test_linear_attention_in_single_precision_stores_half_of_it() -> None:
    """Counted: of queries that are widened for it, as in ACE-Step, what they are widened from is stored."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Conv2d(4, 96, 3, padding=1), nn.Conv2d(32, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(linear_attention(self.into(x).float()).to(x.dtype))

    def run(copy: Any, make: Make) -> Any:
        return copy(make((1, 4, 512, 2048), torch.bfloat16, counted=False))

    expected = expect(Attention(), run, device=CPU, dtype=torch.bfloat16)
    queries = 4 * 32 * 512 * 2048
    assert expected.peak < 1.1 * queries  # half of that, and strips
    assert expected.eager > 5 * queries


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_views_of_what_is_widened(tuning: Tuning) -> None:
    """Parts, other shapes and orders, behind a write and before it: the values that eager has, in eager's memory."""
    into = nn.Conv2d(4, 12, 3, padding=1).to(torch.bfloat16)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        x = into(x)
        wide = x.float()
        first, second = wide.reshape(1, 2, 6, -1).chunk(2, 1)
        turned = wide.transpose(-1, -2)[:, ::2].relu()
        second.mul_(2)
        x.add_(1)
        eight = (x * 2).to(torch.float8_e4m3fn).float()[:, 1:3] + 1  # a type that is promoted to none
        return first.exp(), wide + 1, turned, x, second.sum(-1), wide.double()[:, 3:5], eight

    assert_as_eager(run, sound(1, 4, 8, 21).to(torch.bfloat16), tuning=tuning, memory=True)
