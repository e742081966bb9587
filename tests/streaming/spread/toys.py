"""Small networks in which there is what spreads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Two convolutions behind norms, and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions):
            y = convolution(F.silu(norm(y)))
        return x + y


class Attention(nn.Module):
    """Between all pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.all = nn.GroupNorm(4, channels), nn.Conv2d(channels, 3 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)


class Decoder(nn.Module):
    """As those of latent images: a middle with attention, then twice the size at each level."""

    def __init__(self, channels: int = 8, levels: int = 2) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        self.middle = nn.Sequential(Block(channels), Attention(channels), Block(channels))
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, channels, 3, padding=1), Block(channels))
            for _ in range(levels)
        )
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.first(x))
        for level in self.levels:
            x = level(x)
        return self.last(F.silu(self.norm(x)))


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().requires_grad_(False).eval()
