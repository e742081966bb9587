"""Small convolutional networks: random ones, and one for a video's frames."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def random_network(seed: int, device: torch.device | str = "cpu") -> tuple[list[Any], int]:
    """Operators drawn from `seed`, each a function of a map and an earlier map of its shape; and the channels.

    device: where their weights lie, which are the same everywhere.
    """
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    channels = draw.choice([2, 4])

    def weights(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device) / shape[1] ** 0.5

    def convolution() -> Any:
        k, d = draw.choice([1, 3, 5]), draw.choice([1, 2])
        weight, bias = weights(channels, channels, k, k), weights(1, channels)[0]
        return lambda x, old: F.conv2d(x, weight, bias, padding=d * (k // 2), dilation=d)

    def down() -> Any:
        weight = weights(channels, channels, 3, 3)
        return lambda x, old: F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2) if x.shape[-2] > 6 else x

    def transposed() -> Any:
        kernel, stride, padding, added, dilation = draw.choice(
            [(4, 2, 1, 0, 1), (3, 2, 1, 1, 1), (3, 1, 1, 0, 1), (2, 2, 0, 0, 1), (1, 3, 0, 2, 1), (3, 3, 0, 1, 2)]
        )
        weight, bias = weights(channels, channels, kernel, kernel), weights(1, channels)[0]
        return lambda x, old: (
            F.conv_transpose2d(x, weight, bias, stride, padding, added, 1, dilation) if x.shape[-2] < 30 else x
        )

    def norm() -> Any:
        weight, bias = weights(1, channels)[0], weights(1, channels)[0]
        return lambda x, old: F.group_norm(x, 2, weight, bias)

    def padded() -> Any:
        mode, top, bottom = (
            draw.choice(["constant", "reflect", "replicate", "circular"]),
            draw.randint(0, 2),
            draw.randint(0, 2),
        )
        weight = weights(channels, channels, top + bottom + 1, 3)
        return lambda x, old: F.conv2d(F.pad(x, (1, 1, top, bottom), mode), weight) if min(x.shape[-2:]) > 2 else x

    def smooth() -> Any:
        options = {"mode": draw.choice(["bilinear", "bicubic"]), "align_corners": draw.choice([False, False, True])}
        factor = draw.choice([2.0, 2.0, 4.0, (2.0, 3.0), 1.5])
        return lambda x, old: F.interpolate(x, scale_factor=factor, **options) if x.shape[-2] < 30 else x

    def average() -> Any:
        kernel, stride, padding = draw.choice([(2, None, 0), (3, 1, 1), (3, 2, 1), (2, 1, 0)])
        counted, ceil = draw.choice([True, True, False]), draw.choice([False, False, True])
        return lambda x, old: F.avg_pool2d(x, kernel, stride, padding, ceil, counted) if x.shape[-1] > 6 else x

    def written() -> Any:
        count, filled = draw.randint(1, channels - 1), draw.choice([True, False])

        def write(x: Tensor, old: Tensor) -> Tensor:
            y = torch.empty_like(x) if filled else x * 2
            if filled:
                y[:, :count], y[:, count:] = x[:, -count:] * 2, x[:, :-count]
            first, rest = y.split([count, channels - count], 1)
            if old.shape == x.shape:
                first.add_(old[:, :count])
            y.unsqueeze(2)[:, -1].mul_(3)
            return y + 1 if count > 1 else rest.sum(1, keepdim=True) + y

        return write

    makers = [
        written, convolution, convolution, convolution, norm, down, transposed, padded, smooth, average,
        lambda: lambda x, old: F.silu(x),
        lambda: lambda x, old: F.silu(x.clone(), inplace=True),
        lambda: lambda x, old: x + old if old.shape == x.shape else x,
        lambda: lambda x, old: old.mul_(0.5).add_(x) if old.shape == x.shape else x,
        lambda: lambda x, old: torch.cat([x, old], 1)[:, ::2] if old.shape == x.shape else x,
        lambda: lambda x, old: F.interpolate(x, scale_factor=2.0, mode="nearest") if x.shape[-2] < 40 else x,
        lambda: lambda x, old: F.normalize(x, dim=1),
        lambda: lambda x, old: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2) if x.shape[-2] < 40 else x,
        lambda: lambda x, old: x - x.mean((2, 3), keepdim=True),
        lambda: lambda x, old: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    ]  # fmt: skip
    return [draw.choice(makers)() for _ in range(draw.randint(2, 12))], channels


def run_network(operators: list[Any], x: Tensor, holds: int) -> Tensor:
    """The operators in turn, each also given the map from `holds` operators before."""
    maps = [x]
    for operator in operators:
        maps.append(operator(maps[-1], maps[max(len(maps) - holds, 0)].clone()))
        del maps[: max(len(maps) - holds - 1, 0)]
    return maps[-1]


class Frames(nn.Module):
    """Convolutions over frames, each of which keeps its last two for the next chunk."""

    def __init__(self, layers: int = 4, channels: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(channels, channels, 3, padding=(0, 1, 1)) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        kept = [x.new_zeros(*x.shape[:2], 2, *x.shape[3:]) for _ in self.layers]
        results = []
        for chunk in x.split(2, 2):
            for index, layer in enumerate(self.layers):
                frames = torch.cat([kept[index], chunk], 2)
                kept[index], chunk = frames[:, :, -2:], F.silu(layer(frames))
            results.append(chunk[:, :1])
        return torch.cat(results, 2)
