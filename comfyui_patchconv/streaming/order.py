"""The order in which the elements of a strip lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def preferred(strip: Tensor) -> Tensor:
    """A strip in the order that convolutions of its device like: channels last on a CPU.

    There it spares them a copy of their input and one of their output, and other operators are no slower. What a
    convolution makes of the strip is in that order too.
    """
    if strip.device.type == "cpu" and strip.dim() == 4:
        return strip.contiguous(memory_format=torch.channels_last)
    return strip


def has_channels_last(strip: Tensor) -> bool:
    """Whether `[N, C, H, W]` lies in memory as `[N, H, W, C]`, or is a part of what does."""
    return strip.dim() == 4 and strip.stride(1) == 1 and strip.shape[1] > 1
