"""An upscale model, and what describes it as `spandrel` does for hosts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Network(nn.Module):
    """A few blocks as ESRGAN has them."""

    def __init__(self, channels: int = 3, width: int = 8, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        for conv in self.body:
            x = x + 0.2 * F.leaky_relu(conv(x), 0.2)
        return self.last(F.interpolate(x, scale_factor=self.scale)) + 0.5


class Descriptor:
    """As `spandrel.ImageModelDescriptor`."""

    def __init__(self, network: nn.Module, **options: Any) -> None:
        self._model = network
        self.architecture = SimpleNamespace(name="Small")
        self.purpose = options.get("purpose", "SR")
        self.scale = options.get("scale", 2)
        self.input_channels = options.get("input_channels", 3)
        self.output_channels = options.get("output_channels", 3)
        self.supports_half = self.supports_bfloat16 = True

    @property
    def model(self) -> nn.Module:
        return self._model

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        return self.model(image).clamp_(0, 1)


def upscaler(**options: Any) -> Descriptor:
    """One with random weights."""
    torch.manual_seed(0)
    network = Network(options.get("input_channels", 3), options.get("width", 8), int(options.get("scale", 2)))
    return Descriptor(network.requires_grad_(False).eval(), **options)
