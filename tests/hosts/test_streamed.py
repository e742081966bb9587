"""What runs instead of a decoder in a host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor, nn

from comfyui_patchconv.hosts.memory_estimates import OF_FREE, StreamEstimate
from comfyui_patchconv.hosts.streamed import StreamedAtOnce, StreamedForward

from .vae import VAE, Holder


@pytest.fixture
def vae() -> VAE:
    torch.manual_seed(0)
    return VAE().requires_grad_(False)


def test_what_is_free_is_asked_when_a_decode_begins(vae: VAE) -> None:
    asked: list[int] = []
    calls: list[int] = []
    streamed = StreamedForward(
        vae.decoder.forward, 0, lambda _: asked.append(1) or 1000 * len(asked), on_call=lambda: calls.append(1)
    )
    z = torch.randn(1, 4, 24, 16)
    for _ in range(2):
        assert_same(streamed(z), vae.decoder(z), 1e-6)
    assert (len(asked), len(calls), streamed._streamed.budget) == (1, 2, int(OF_FREE * 1000))
    streamed.start()
    streamed(z)
    assert (len(asked), streamed._streamed.budget) == (2, int(OF_FREE * 2000))


def test_what_is_free_is_asked_of_the_device_that_a_call_names() -> None:
    asked: list[str] = []
    conv = nn.Conv2d(3, 3, 3, device="meta")

    def encode(x: Tensor, device: Any) -> Tensor:
        return conv(x.to(device))

    streamed = StreamedForward(encode, 0, lambda device: asked.append(str(device)) or 1 << 30)
    with torch.no_grad():
        streamed(torch.zeros(1, 3, 8, 8), device=torch.device("meta"))
    assert asked == ["meta"]


def test_a_budget_is_kept_and_nothing_free_is_no_lack_of_one(vae: VAE) -> None:
    z = torch.randn(1, 4, 8, 8)
    for budget, free, expected in ((500, 10**9, 500), (0, 0, 1)):
        streamed = StreamedForward(vae.decoder.forward, budget, lambda _, free=free: free)
        streamed(z)
        assert streamed._streamed.budget == expected


class Wide(nn.Module):
    """Strips that suit a CPU are much of what its decode takes, and smaller ones take less."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 32, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(32, 32, 3, padding=1),
            nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU(),
            nn.Conv2d(32, 3, 3, padding=1),
        )  # fmt: skip

    def decode(self, z: Tensor) -> Tensor:
        return self.layers(z)


def test_where_it_is_free_no_more_is_taken_than_the_host_was_told() -> None:
    """Without a budget of the user's: the host is told what takes least, however much is free in the end."""
    holder: Any = Holder(VAE())
    holder.first_stage_model = model = Wide().requires_grad_(False)
    z = torch.randn(1, 4, 256, 256)
    told = StreamEstimate(holder, "decode", lambda *_: 1e15, budget=0).expected(tuple(z.shape), z.dtype).peak
    for free, most in ((1 << 40, told), (told, OF_FREE * told)):
        streamed = StreamedForward(model.decode, 0, lambda _, free=free: free)
        streamed(z)
        assert streamed._streamed.last is not None
        assert streamed._streamed.last.peak <= most


def test_what_strips_would_not_help_is_told(vae: VAE) -> None:
    """A latent of a few pixels is decoded as eager does; the second time without being looked at."""
    told: list[bool] = []
    streamed = StreamedForward(vae.decoder.forward, 0, lambda _: 1 << 40, on_ran=told.append)
    small, large = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 1024, 1024)
    for z in (small, small, large):
        streamed(z)
    assert told == [True, True, False]


class AtOnce(StreamEstimate):
    answer = True

    def at_once(self, input: Tensor) -> bool:
        return self.answer


@pytest.mark.parametrize("at_once", [True, False])
def test_all_of_a_decode_at_once_where_the_estimate_says_so(vae: VAE, at_once: bool) -> None:
    """And one question of the host begins both, the decode and its part."""
    z, expected = torch.randn(1, 4, 24, 16), vae.decode(torch.zeros(1, 4, 8, 8))
    expected = vae.decode(z)
    calls: list[Any] = []
    part = StreamedForward(vae.decoder.forward, 10**6, lambda _: 0, on_call=lambda: calls.append(1))
    estimate = AtOnce(Holder(vae), "decode", lambda *_: 1.0, budget=0, part="decoder.forward", starts=[part.start])
    estimate.answer = at_once
    vae.decoder.forward = part
    whole = StreamedAtOnce(vae.decode, part, estimate)
    assert_same(whole(z), expected, 1e-6)
    assert len(calls) == 1
    budgets = [one._streamed.budget for one in (whole, part)]
    assert budgets == ([10**6, None] if at_once else [None, 10**6])
    estimate(tuple(z.shape), z.dtype)
    assert [one._streamed.budget for one in (whole, part)] == [None, None]
    assert_same(whole(z, **{}), expected, 1e-6)
