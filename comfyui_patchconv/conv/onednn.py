"""Calls of oneDNN where torch would leave a strip, or kernels of one pixel, to a slower kernel of its own."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .autocast import autocast_state

_SMALL = 20480
"""Batch x channels x frames x rows up to which torch leaves a 3-D convolution in float32 on a CPU to a kernel that
copies its input once for each place in the kernel, whatever the width (`ConvParams::use_mkldnn`)."""

_CHANNELS = {"AVX512": 16, "AVX2": 8}
"""By the widest instructions of a processor: a vector of float32."""


@cache
def channels_together() -> int:
    """Channels that lie side by side in maps as oneDNN convolves them: these have whole blocks of so many, even of one
    channel. 1 where nothing is known of this processor."""
    try:
        capability = torch.backends.cpu.get_cpu_capability()
    except (AttributeError, RuntimeError):  # a torch that cannot say
        return 1
    return next((count for name, count in _CHANNELS.items() if capability.startswith(name)), 1)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv3d`; on a CPU by oneDNN for small inputs too.

    96 channels, 4 frames, 40x256: 0.021 s instead of 0.127 s, without 27 copies of the input.
    """
    small = is_small(input) and input.numel() > 0 and groups == 1
    given = all(isinstance(value, (tuple, list)) for value in (stride, padding, dilation))  # as modules give them
    if not (small and given and applies(input)):
        return F.conv3d(input, weight, bias, stride, padding, dilation, groups)
    return torch.mkldnn_convolution(input, weight, bias, padding, stride, dilation, groups)


def of_pixels(input: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    """`torch.nn.functional.conv2d` by a kernel of one pixel; on a CPU by oneDNN on one thread, too.

    There torch leaves it to a kernel that multiplies matrices, which takes 1.5 times as long for 256 and 512 channels
    that lie last (AVX-512), and gives other values than with more threads.
    """
    if input.numel() == 0 or not applies(input):
        return F.conv2d(input, weight, bias)
    return torch.mkldnn_convolution(input, weight, bias, (0, 0), (1, 1), (1, 1), 1)


def is_small(input: Tensor) -> bool:
    """Whether torch leaves a video to the kernel that copies."""
    return input.dim() == 5 and torch.Size(input.shape[:4]).numel() <= _SMALL


def applies(input: Tensor) -> bool:
    """Whether oneDNN takes convolutions of tensors such as `input`, and nobody is there to be told of `conv3d`:
    autocast knows convolutions by their usual names alone."""
    backend: Any = torch.backends.mkldnn
    _, casts = autocast_state("cpu")
    usable = backend.is_available() and getattr(backend, "enabled", True) and not casts
    usable = usable and not torch._C._len_torch_function_stack()
    return usable and input.device.type == "cpu" and input.dtype == torch.float32
