"""Convolutions of videos: of images, where a device has no good one of videos; by oneDNN, where that is faster."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import onednn

VARIABLE = "PATCHCONV_CONV3D"
"""Environment variable: `auto` (images where `REFUSALS` says so), `images` (always), or `videos` (never)."""

_CHOICES = ("auto", "images", "videos")


class Refusal(NamedTuple):
    """Where PyTorch leaves convolutions of videos to a kernel that takes ten times as long, or as much memory.

    device: its type. torch, cudnn: versions from the first one on, below the second; None for any. halves: in half
    precision alone, of channels that lie first. issues: PyTorch's.
    """

    device: str
    torch: tuple[tuple[int, ...], tuple[int, ...]]
    cudnn: Optional[tuple[int, int]]
    halves: bool
    issues: str


REFUSALS = (
    Refusal("cuda", ((2, 9, 0), (2, 9, 1)), None, True, "#166643"),
    Refusal("cuda", ((2, 9, 1), (3,)), (90800, 91500), True, "#166643, #177406"),
    Refusal("mps", ((2, 1), (2, 14)), None, False, "#192213"),
)


class Versions(NamedTuple):
    """torch: its numbers. cudnn: as `torch.backends.cudnn.version()` has it; None without, as on ROCm."""

    torch: tuple[int, ...]
    cudnn: Optional[int]


@cache
def _here() -> Versions:
    numbers = tuple(int(part) for part in re.findall(r"\d+", torch.__version__.split("+")[0])[:3])
    return Versions(numbers, torch.backends.cudnn.version() if torch.version.hip is None else None)


_HALVES = (torch.float16, torch.bfloat16)


def of_images(device: torch.device, dtype: torch.dtype, here: Optional[Versions] = None) -> bool:
    """Whether convolutions of videos of `dtype` are made of such of images on `device`. here: None for these versions.

    Raises ValueError where `PATCHCONV_CONV3D` is no choice.
    """
    choice = os.environ.get(VARIABLE, "") or "auto"
    if choice not in _CHOICES:
        raise ValueError(
            f"{VARIABLE}={choice} is none of {', '.join(_CHOICES)}: set it to one of these, or to nothing."
        )
    if choice != "auto":
        return choice == "images" and dtype.is_floating_point
    return any(_applies(one, device.type, dtype, here) for one in REFUSALS)


def _applies(refusal: Refusal, device: str, dtype: torch.dtype, here: Optional[Versions]) -> bool:
    if device != refusal.device or not dtype.is_floating_point or (refusal.halves and dtype not in _HALVES):
        return False
    found = here or _here()
    if not refusal.torch[0] <= found.torch < refusal.torch[1]:
        return False
    if device == "cuda" and found.cudnn is None:
        return False
    return refusal.cudnn is None or refusal.cudnn[0] <= (found.cudnn or 0) < refusal.cudnn[1]


def conv3d(input: Tensor, weight: Tensor, *given: Any) -> Tensor:
    """`torch.nn.functional.conv3d`, by what is best at it here."""
    return by_images(input, weight, *given) if _refused(input, weight) else onednn.conv3d(input, weight, *given)


def _refused(input: Tensor, weight: Tensor) -> bool:
    """Whether a convolution of `input` is to be made of images: cuDNN takes channels that lie last, and pixels."""
    if weight.dim() != 5 or not of_images(input.device, input.dtype):
        return False
    return input.device.type != "cuda" or not (_is_last(input) or _is_last(weight) or max(weight.shape[2:]) == 1)


def _is_last(tensor: Tensor) -> bool:
    last = torch.channels_last_3d
    return tensor.dim() == 5 and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()


def by_images(
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv3d` of `[N, C, T, H, W]`, the batch optional, an output frame at a time: the frames that
    it reads are more channels of one image, so that all of them are added up, and rounded, by one `conv2d`.

    It takes one copy of the input, one of the weight, and an output frame beside the output. Raises what `conv3d` does.
    """
    if input.dim() == 4:
        return by_images(input[None], weight, bias, stride, padding, dilation, groups)[0]
    sides = [one for one in map(_three, (stride, padding, dilation)) if one is not None]
    if input.dim() != 5 or len(sides) < 3:
        return F.conv3d(input, weight, bias, stride, padding, dilation, groups)
    (step, *strides), (edge, *edges), (apart, *dilations) = sides
    span = apart * (weight.shape[2] - 1) + 1
    count = (input.shape[2] + 2 * edge - span) // step + 1
    if count < 1 or input.shape[1] != groups * weight.shape[1]:
        return F.conv3d(input, weight, bias, stride, padding, dilation, groups)  # its own error says it best
    frames = input.transpose(1, 2)
    frames = (F.pad(frames, (0, 0) * 3 + (edge, edge)) if edge else frames).contiguous()
    kernel = weight.transpose(1, 2).flatten(1, 2)
    result: Optional[Tensor] = None
    for place in range(count):
        first = place * step
        image = _as_channels(frames[:, first : first + span : apart], groups)
        image = F.conv2d(image, kernel, bias, strides, edges, dilations, groups)
        if result is None:
            result = image.new_empty((*image.shape[:2], count, *image.shape[2:]))
        result[:, :, place] = image
    assert result is not None
    return result


def _three(value: Any) -> Optional[Sequence[int]]:
    """A number for each side; None for what is said otherwise, such as the padding "same"."""
    if isinstance(value, int):
        return (value,) * 3
    return value if isinstance(value, (tuple, list)) and len(value) == 3 else None


def _as_channels(frames: Tensor, groups: int) -> Tensor:
    """`[N, T, C, H, W]` as `[N, T·C, H, W]`, the channels of a group next to each other."""
    if groups > 1:
        frames = frames.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)
    return frames.flatten(1, 2)


class _Conv3d(TorchFunctionMode):
    """Within it another function is `F.conv3d`."""

    def __init__(self, convolve: Callable[..., Tensor]) -> None:
        super().__init__()
        self._convolve = convolve

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._convolve if func is F.conv3d else func)(*args, **(kwargs or {}))


def in_strips(input: Tensor, weight: Tensor, of_large: bool = True) -> AbstractContextManager[object]:
    """Within the block `F.conv3d` is the one above, where strips of `input` need it; `of_large`: a large video's."""
    if weight.dim() == 5 and _refused(input, weight):
        return _Conv3d(by_images)
    return _Conv3d(onednn.conv3d) if of_large and input.dim() == 5 and onednn.applies(input) else nullcontext()
