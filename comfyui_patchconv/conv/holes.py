"""A network on an image with holes: what lies in them has no effect. It works for any encoder.

While `Holes` is active, convolutions and statistics of group norms count valid pixels only, attention sees no others,
and the mask follows the image through paddings and strides.

A window that reaches into a hole gets the mean of the valid pixels beside it for what is missing, channel by channel.
Scaling what is left by N / s, as in `partial`, stands for that only in a network that was trained with it: in
others it makes an edge of every hole, anew in every layer. Beside a hole, the latent of an SD encoder with random
weights was 7 to 10 times as far from that of the whole image as grey in the hole puts it; by means it is 0.5 to 0.7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .blocks import block, put
from .fill import around
from .forward import TiledForward
from .partial import WHEN_LARGE
from .patch import CONVOLUTIONS, unpatched
from .tiling import Convolution, Tiling, padding_of

Result = TypeVar("Result")
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
_KINDS: dict[int, Any] = {4: nn.Conv2d, 5: nn.Conv3d}


def with_holes(
    model: nn.Module,
    forward: Callable[[Tensor], Result],
    image: Tensor,
    mask: Tensor,
    tiling: Tiling = WHEN_LARGE,
) -> Result:
    """`forward(image)`, a call of `model` or of a part of it, for an image with holes.

    image: `[1, C, H, W]`, or `[1, C, T, H, W]` with the same holes in all frames.
    mask: 1 where valid, 0 in holes, `[H, W]`. Without holes the result is that of `forward` itself, bit by bit.
    tiling: how the convolutions are cut. What `convert_model` has put on `model` is taken off meanwhile.

    The result does not depend on pixels in holes, in no bit. Where a hole is in the result there is nothing of worth.
    Gradients are off where there are holes.
    Raises ValueError for a batch, or a mask of another size.
    """
    if image.dim() not in _KINDS or image.shape[0] != 1 or mask.shape != image.shape[-2:]:
        raise ValueError(
            f"image is {tuple(image.shape)} and mask {tuple(mask.shape)}: give one image [1, C, H, W], or one video "
            "[1, C, T, H, W], and a mask [H, W] of its height and width."
        )
    valid = mask.to(image.device) > 0
    if valid.all():
        return forward(image)
    holes = Holes(valid, tiling)
    with torch.no_grad(), unpatched(model), _attending(model, holes), holes:
        return forward(image.masked_fill(~valid, 0.0))  # nothing later can leak what is in a hole


class Holes(TorchFunctionMode):
    """The mode in which `with_holes` runs a network; knows the mask of each height and width that has come up."""

    takes_whole_maps = True
    """Another thread may patch the network meanwhile: a strip of a map is none whose mask is known."""

    def __init__(self, valid: Tensor, tiling: Tiling) -> None:
        super().__init__()
        self.tiling = tiling
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._put(valid.to(torch.float32)[None, None])
        self._suspended = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = None if self._suspended else _HANDLERS.get(func)
        kwargs = kwargs or {}
        return func(*args, **kwargs) if handler is None else handler(self, func, *args, **kwargs)

    def mask_of(self, image: Any) -> Optional[Tensor]:
        """The mask `[1, 1, H, W]` of a map of the network; None if all of it is valid, or if it is no image.

        Maps of one size share it: what is added to or beside another has the same holes.
        """
        if not isinstance(image, Tensor) or image.dim() not in _KINDS:
            return None
        size = tuple(image.shape[-2:])
        if size not in self._masks:
            self._put(self._derived(*size))
        mask = self._masks[size]
        return mask if mask.numel() else None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The mode does nothing within the block: for what is computed of valid positions alone."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    def _put(self, mask: Tensor) -> None:
        """The mask of its size from now on; an empty one says that nothing is left to mask."""
        self._masks[tuple(mask.shape[-2:])] = mask if not bool(mask.all()) else mask[:0]

    def _derived(self, height: int, width: int) -> Tensor:
        """The mask of a size that no convolution or padding made: valid is a position that covers valid pixels only."""
        known = [size for size in self._masks if size[0] >= height and size[1] >= width]
        size = min(known, key=lambda size: size[0] * size[1]) if known else max(self._masks)
        mask = self._masks[size]
        if not mask.numel():
            return mask.new_ones(1, 1, height, width)
        if not known:
            return F.interpolate(mask, (height, width))
        return 1 - F.adaptive_max_pool2d(1 - mask, (height, width))

    def _convolution(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        bias: Optional[Tensor] = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        kind = _KINDS.get(weight.dim())
        if kind is None or input.dim() != weight.dim():
            return func(input, weight, bias, stride, padding, dilation, groups)
        channels, kernel = (input.shape[1], weight.shape[0]), tuple(weight.shape[2:])
        module = kind(*channels, kernel, stride, padding, dilation, groups, bias=False, device="meta")
        mask = self.mask_of(input)
        if mask is not None:
            input = _continued(input, mask, _reach(module))
        output = TiledForward(module, self.tiling)(input, weight, bias)
        if mask is not None and output.shape[-2:] != input.shape[-2:]:
            self._put(_centres(module, mask))
        return output

    def _pad(self, func: Any, input: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Tensor:
        mask = self.mask_of(input)
        output = func(input, pad, mode, value)
        if mask is not None and output.shape[-2:] != input.shape[-2:] and min(pad) >= 0:
            edges = [*pad, 0, 0, 0, 0][:4]
            self._put(F.pad(mask, edges, "replicate" if mode == "constant" else mode))
        return output

    def _group_norm(
        self,
        func: Any,
        input: Tensor,
        num_groups: int,
        weight: Optional[Tensor] = None,
        bias: Optional[Tensor] = None,
        eps: float = 1e-5,
        *args: Any,
    ) -> Tensor:
        mask = self.mask_of(input)
        if mask is None:
            return func(input, num_groups, weight, bias, eps, *args)
        if input.dim() == 5:
            mask = mask.unsqueeze(2).expand(-1, -1, input.shape[2], -1, -1)
        output = torch.empty_like(input)
        each = input.shape[1] // num_groups
        count = (mask.sum() * each).clamp(min=1)
        for first in range(0, input.shape[1], each):  # a group at a time: in float32, and little beside the output
            group = input[:, first : first + each].float()
            mean = (group * mask).sum() / count
            group = group - mean
            variance = (group * mask).square_().sum() / count
            group.mul_((variance + eps).rsqrt())
            for values, apply in ((weight, group.mul_), (bias, group.add_)):
                if values is not None:
                    apply(values[first : first + each].float().view(-1, *[1] * (input.dim() - 2)))
            output[:, first : first + each] = group
        return output


def _reach(module: Convolution) -> int:
    """How many pixels beyond a valid one a window that is centred there, or half there, may read."""
    sides = list(zip(module.kernel_size, module.stride, module.dilation))[-2:]
    return max(dilation * (kernel - 1) // (2 if stride == 1 else 1) for kernel, stride, dilation in sides)


def _continued(image: Tensor, mask: Tensor, reach: int) -> Tensor:
    """The map with valid pixels that go on into holes for `reach` pixels, by means of those nearby.

    In place where it can be: nothing else reads what is in a hole.
    """
    if not reach:
        return image
    if 0 in image.stride():  # frames or channels that are one and the same memory
        image = image.clone()
    holes = mask[0, 0] == 0
    rows, columns = (around(holes.any(dim), reach) for dim in (1, 0))
    part = image[..., rows, columns]
    maps, valid = (part.flatten(1, 2) if part.dim() == 5 else part), mask[..., rows, columns].to(image.dtype)
    found, known = maps, valid
    for _ in range(reach):
        count = F.avg_pool2d(known, 3, 1, 1)
        mean = F.avg_pool2d(found * known, 3, 1, 1).div_(count.clamp(min=1e-3))
        found = torch.where(known > 0, found, mean)
        known = (count > 0).to(known.dtype)
    part.copy_(found.view_as(part))
    return image


def _centres(module: Convolution, mask: Tensor) -> Tensor:
    """The mask behind a convolution: a position is valid if half of its window's middle, one stride wide, is."""
    sides = list(zip(module.kernel_size, module.stride, module.dilation, padding_of(module)))[-2:]
    middle = mask.new_zeros(1, 1, *(kernel for kernel, *_ in sides))
    first = [max(kernel - stride, 0) // 2 for kernel, stride, *_ in sides]
    middle[..., first[0] : first[0] + sides[0][1], first[1] : first[1] + sides[1][1]] = 1
    padded = F.pad(mask, [edge for *_, pad in reversed(sides) for edge in pad], "replicate")
    strides, dilations = zip(*((stride, dilation) for _, stride, dilation, _ in sides))
    found = F.conv2d(padded, middle / middle.sum(), None, strides, 0, dilations)
    return (found > 0.499).to(mask.dtype)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.conv2d: Holes._convolution,
    F.conv3d: Holes._convolution,
    F.pad: Holes._pad,
    F.group_norm: Holes._group_norm,
    torch.group_norm: Holes._group_norm,
}


def _attending(model: nn.Module, holes: Holes) -> AbstractContextManager[None]:
    """Give the attention of `model` valid positions only, as a row of pixels: it does not see where they are."""

    def change() -> None:
        for module in list(_attention(model)):
            put(module, "forward", _Attended(module.forward, holes))

    return block(model, "forward", change)


def _attention(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that are called attention and hold no convolution over more than one pixel."""
    mixes = any(max(one.kernel_size) > 1 for one in module.modules() if isinstance(one, CONVOLUTIONS))
    if _ATTENTION.search(type(module).__name__) and not mixes:
        yield module
        return
    for child in module.children():
        yield from _attention(child)


class _Attended:
    """Stands in for the `forward` of an attention block while a network runs on an image with holes."""

    def __init__(self, forward: Callable[..., Tensor], holes: Holes) -> None:
        self.forward, self.holes = forward, holes

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mask = self.holes.mask_of(input) if self.holes in _get_current_function_mode_stack() else None
        if mask is None:  # as in the calls of other threads
            return self.forward(input, *args, **kwargs)
        kept = mask.flatten().nonzero().flatten()
        if not len(kept):
            return input
        pixels = input.flatten(-2)
        with self.holes.suspended():
            seen = self.forward(pixels.index_select(-1, kept).unsqueeze(-2), *args, **kwargs)
        return pixels.index_copy(-1, kept, seen.squeeze(-2)).view_as(input)
