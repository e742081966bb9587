"""A VAE with the parts that hosts know, and what a host holds one in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Half(nn.Module):
    def __init__(self, channels: tuple[int, int]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels[0], 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, channels[1], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm(self.conv_in(x))))


class VAE(nn.Module):
    """The parts that a latent diffusion VAE has."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Half((3, 4)), Half((4, 3))
        self.post_quant_conv = nn.Conv2d(4, 4, 1)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Holder:
    """As what holds a VAE in ComfyUI, Forge and reForge."""

    def __init__(self, vae: VAE) -> None:
        self.first_stage_model, self.device = vae, torch.device("cpu")
        self.memory_used_decode = lambda shape, dtype: 10_000 * shape[2] * shape[3] * dtype.itemsize
        self.memory_used_encode = lambda shape, dtype: shape[2] * shape[3] * dtype.itemsize
