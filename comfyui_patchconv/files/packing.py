"""Latents as hosts keep them, where they are not the VAE's own: Flux.2's, LTX-Video's, and what a TAESD decodes."""

from __future__ import annotations

from typing import Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 2
"""Pixels of the VAE's own latent to one of the packed latent, on either side."""

_EPS = 1e-4


class Packing(nn.Module):
    """Flux.2's, between the VAE's own latents `[B, C, h, w]` and packed ones `[B, 4 * C, h / 2, w / 2]`: four pixels
    make one, normalised.

    mean, variance: of the packed latents, `[4 * C]`; used in float32, whatever the VAE computes in.
    """

    side = SIDE
    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1))
        self.register_buffer("deviation", (variance.float() + _EPS).sqrt().view(1, -1, 1, 1))

    @property
    def channels(self) -> int:
        """Of a packed latent."""
        return self.mean.shape[1]

    def pack(self, latent: Tensor) -> Tensor:
        """The packed latent of the VAE's own, which has even sides."""
        return (F.pixel_unshuffle(latent.float(), SIDE) - self.mean) / self.deviation

    def unpack(self, latent: Tensor) -> Tensor:
        """The VAE's own latent of a packed one."""
        return F.pixel_shuffle(latent.float() * self.deviation + self.mean, SIDE)


class Scaling(nn.Module):
    """Between what a TAESD decodes, latents as a diffusion model has them, and those of the VAE that it stands for.

    channels: of both. scale, shift: the TAESD's are `(latent - shift) * scale`.
    """

    side = 1

    def __init__(self, channels: int, scale: float, shift: float) -> None:
        super().__init__()
        self.channels, self.scale, self.shift = channels, scale, shift

    def pack(self, latent: Tensor) -> Tensor:
        """The VAE's latent of a TAESD's."""
        return latent.float() / self.scale + self.shift

    def unpack(self, latent: Tensor) -> Tensor:
        """A TAESD's latent of the VAE's."""
        return (latent.float() - self.shift) * self.scale


class Statistics(nn.Module):
    """LTX-Video's, between the VAE's own latents `[B, C, …]` and those that are normalised by channels.

    mean, deviation: of the VAE's own, `[C]`; used in float32. noise: what part of a normalised latent noise takes the
    place of before it is decoded, drawn from `seed`, the same for each.
    """

    side = 1
    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.noise, self.seed = noise, seed
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", deviation.float())

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.mean.shape[0]

    def pack(self, latent: Tensor) -> Tensor:
        """The normalised latent of the VAE's own."""
        return (latent.float() - self._of(self.mean, latent)) / self._of(self.deviation, latent)

    def unpack(self, latent: Tensor) -> Tensor:
        """The VAE's own latent of a normalised one."""
        latent = latent.float()
        if self.noise:
            drawn = torch.randn(latent.shape, generator=torch.Generator().manual_seed(self.seed))
            latent = latent * (1 - self.noise) + drawn.to(latent.device) * self.noise
        return latent * self._of(self.deviation, latent) + self._of(self.mean, latent)

    @staticmethod
    def _of(values: Tensor, latent: Tensor) -> Tensor:
        return values.view(1, -1, *[1] * (latent.dim() - 2))


def packing_of(vae: nn.Module) -> Optional[Union[Packing, Scaling, Statistics]]:
    """What `load_vae` found of a VAE whose latents hosts keep in another form; None for others."""
    found = getattr(vae, "packing", None)
    return found if isinstance(found, (Packing, Scaling, Statistics)) else None
