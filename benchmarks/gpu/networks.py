"""Networks of real layouts with random weights, in plain PyTorch: a machine without a network has no other packages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two convolutions behind a group norm each, and what goes past them. `[B, C, H, W]` to `[B, out, H, W]`."""

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels, 1e-6), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, out, 1e-6), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.shortcut(x) + y


class Attention(nn.Module):
    """One head between all pixels. `[B, C, H, W]` each way."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        found = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.out(found.reshape(x.shape))


class Up(nn.Module):
    """Twice the height and width, by nearest upsampling and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Down(nn.Module):
    """Half the height and width: a convolution of stride 2 behind a row and a column of zeros."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def _middle(channels: int, groups: int) -> list[nn.Module]:
    return [Residual(channels, channels, groups), Attention(channels, groups), Residual(channels, channels, groups)]


def _end(channels: int, out: int, groups: int) -> list[nn.Module]:
    return [nn.GroupNorm(groups, channels, 1e-6), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)]


class Autoencoder(nn.Module):
    """Stable Diffusion's VAE as LDM has it: `[B, latent, H/8, W/8]` to `[B, 3, H, W]` and back, with four widths.

    quant: whether convolutions of 1x1 stand around the latent, which Flux's has none of.
    """

    def __init__(
        self, latent: int = 4, widths: Sequence[int] = (128, 256, 512, 512), layers: int = 2, groups: int = 32,
        quant: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        up, top = [*reversed(widths)], widths[-1]
        parts: list[nn.Module] = [nn.Conv2d(latent, top, 3, padding=1), *_middle(top, groups)]
        for number, (before, width) in enumerate(zip([top, *up], up)):
            parts += [Residual(before if layer == 0 else width, width, groups) for layer in range(layers + 1)]
            parts += [Up(width)] if number < len(up) - 1 else []
        self.decoder = nn.Sequential(*parts, *_end(widths[0], 3, groups))
        parts = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for number, (before, width) in enumerate(pairwise([widths[0], *widths])):
            parts += [Residual(before if layer == 0 else width, width, groups) for layer in range(layers)]
            parts += [Down(width)] if number < len(widths) - 1 else []
        self.encoder = nn.Sequential(*parts, *_middle(top, groups), *_end(top, 2 * latent, groups))
        self.quant = nn.Conv2d(2 * latent, 2 * latent, 1) if quant else nn.Identity()
        self.post_quant = nn.Conv2d(latent, latent, 1) if quant else nn.Identity()

    def decode(self, latent: Tensor) -> Tensor:
        """The image of a latent."""
        return self.decoder(self.post_quant(latent))

    def encode(self, image: Tensor) -> Tensor:
        """The mean of the latent of an image."""
        return self.quant(self.encoder(image)).chunk(2, 1)[0]


class Dense(nn.Module):
    """Five convolutions, each of which reads all before it; a part of their result is added to what came in."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        sizes = [(channels + number * growth, growth if number < 4 else channels) for number in range(5)]
        self.convs = nn.ModuleList(nn.Conv2d(before, out, 3, padding=1) for before, out in sizes)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for conv in self.convs[:-1]:
            maps.append(F.leaky_relu(conv(torch.cat(maps, 1)), 0.2))
        return x + 0.2 * self.convs[-1](torch.cat(maps, 1))


class Esrgan(nn.Module):
    """ESRGAN's generator, as RealESRGAN x4plus has it: `[B, 3, H, W]` to `[B, 3, 4H, 4W]`."""

    def __init__(self, channels: int = 64, blocks: int = 23, growth: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(*(Dense(channels, growth) for _ in range(3))) for _ in range(blocks))
        self.body, self.up1, self.up2, self.high = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(4))
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = y = self.first(x)
        for block in self.blocks:
            y = y + 0.2 * block(y)
        y = first + self.body(y)
        for conv in (self.up1, self.up2):
            y = F.leaky_relu(conv(F.interpolate(y, scale_factor=2.0, mode="nearest")), 0.2)
        return self.last(F.leaky_relu(self.high(y), 0.2))
