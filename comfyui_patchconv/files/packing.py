"""Flux.2's latents: four pixels of the VAE's own make one of four times the channels, normalised."""

from __future__ import annotations

from typing import Optional

from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 2
"""Pixels of the VAE's own latent to one of the packed latent, on either side."""

_EPS = 1e-4


class Packing(nn.Module):
    """Between a VAE's own latents `[B, C, h, w]` and packed ones `[B, 4 * C, h / 2, w / 2]`, as hosts keep them.

    mean, variance: of the packed latents, `[4 * C]`; used in float32, whatever the VAE computes in.
    """

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


def packing_of(vae: nn.Module) -> Optional[Packing]:
    """What `load_vae` found in the file of a VAE whose latents are packed; None for others."""
    found = getattr(vae, "packing", None)
    return found if isinstance(found, Packing) else None
