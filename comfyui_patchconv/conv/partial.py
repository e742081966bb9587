"""Partial convolution: only valid pixels count, and what they give is scaled up to a full window.

    s = conv(m, ones)        valid taps of each window, of N
    u = clamp(s, 0, 1)       the new mask: 1 where a window holds anything valid
    y = conv(x * m, W) * (N / s) * u + b * u

Image Inpainting for Irregular Holes Using Partial Convolutions (Liu et al. 2018, arXiv 1804.07723); with a mask of
ones, Partial Convolution based Padding (arXiv 1811.11718). x * m, the scaling and the bias exist one strip at a time,
and the mask's own convolution has one channel, or one per group. Its arithmetic is in float32 at least, whatever the
image is in. No gradient flows through masks.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .autocast import without_autocast
from .forward import ConvCall, TiledForward
from .tiling import Convolution, Tiling, padding_of

WHEN_LARGE = Tiling(splits=0, threshold=0)
"""Strips wherever one of the size that suits the device is smaller than the whole."""

_TINY = 1e-8
_COUNT: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def partial_convolution(
    module: Convolution,
    input: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor] = None,
    *,
    tiling: Optional[Tiling] = None,
    copies: int = 1,
    legacy: bool = False,
) -> tuple[Tensor, Tensor]:
    """The partial convolution of `input` `[N, C, L | H, W | D, H, W]`, the batch optional, and the new mask.

    module: says the geometry; its own parameters are not used.
    mask: 1 where valid, 0 where not, `[N or 1, 1 or C, ...]`; with C channels each group of the convolution counts its
        own. The new mask has as many channels as there are groups of equal masks, and the mask's batch size. None is
        a mask of ones.
    tiling: the strips; without it those that `convert_model` has put on `module`, or else `WHEN_LARGE`.
    copies: channels that one channel of the mask stands for in `s` and `N`; tells only for masks between 0 and 1.
    legacy: add the bias and take it off again before scaling, as NVIDIA's code does: its rounding, bit by bit.
    """
    channel = -len(module.kernel_size) - 1
    mask = None if mask is None else mask.detach()
    sums = _ones(input, len(module.kernel_size)) if mask is None else mask.to(_precise(input))
    counted = 1
    if sums.shape[channel] > module.groups:
        counted = sums.shape[channel] // module.groups
        sums = sums.unflatten(channel, (module.groups, -1)).sum(channel)
    ratio, valid = _ratio_and_valid(module, sums, counted, copies)
    strips: Tiling = tiling or getattr(module._conv_forward, "tiling", WHEN_LARGE)
    return _PartialCall(module, strips, mask, ratio, valid, legacy).run(input, weight, bias), valid


def _precise(input: Tensor) -> torch.dtype:
    """The type of counts and ratios: 1e-8 is 0 in float16, and NVIDIA's code gives NaN in holes there."""
    return torch.promote_types(input.dtype, torch.float32)


@torch.no_grad()
def _ratio_and_valid(module: Convolution, sums: Tensor, counted: int = 1, copies: int = 1) -> tuple[Tensor, Tensor]:
    """N / s · u and u, each `[N or 1, groups or 1, ...]`, from a mask whose channels are sums of `counted` masks."""
    sides = len(module.kernel_size)
    edges = [edge for pad in reversed(padding_of(module)) for edge in pad]
    if any(edges):
        sums = F.pad(sums, edges, "constant" if module.padding_mode == "zeros" else module.padding_mode)
    groups = sums.shape[-sides - 1]
    ones = torch.ones(groups, 1, *module.kernel_size, dtype=sums.dtype, device=sums.device)
    with without_autocast(sums.device.type):  # halves count to 2048 (float16) or 256 (bfloat16)
        found = _COUNT[sides](sums, ones, None, module.stride, 0, module.dilation, groups)
    found *= copies
    valid = found.clamp(0, 1)
    window = float(counted * copies * math.prod(module.kernel_size))
    return found.add_(_TINY).reciprocal_().mul_(window).mul_(valid), valid


class _PartialCall(ConvCall):
    """One partial convolution. mask: None for one of ones."""

    def __init__(
        self,
        module: Convolution,
        tiling: Tiling,
        mask: Optional[Tensor],
        ratio: Tensor,
        valid: Tensor,
        legacy: bool = False,
        args: tuple[Any, ...] = (),
        kwargs: Optional[dict[str, Any]] = None,
    ) -> None:
        super().__init__(TiledForward(module, tiling), args, kwargs or {})
        self._mask, self._ratio, self._valid, self._legacy = mask, ratio, valid, legacy
        self.input_copies = 0 if mask is None else 1
        self._channel = -len(module.kernel_size) - 1
        unscaled = self.whole

        def whole(input: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
            held = input if mask is None else input * mask.to(input.dtype)
            return self._scaled(unscaled(held, weight, None), bias, self._ratio, self._valid)

        self.whole = whole

    def strip(
        self, piece: Tensor, window: Any, first: int, last: int, weight: Tensor, bias: Optional[Tensor]
    ) -> Tensor:
        if self._mask is not None:
            piece = piece * self.read(self._mask, window).to(piece.dtype)
        ratio, valid = (one.narrow(self.dim, first, last - first) for one in (self._ratio, self._valid))
        return self._scaled(super().strip(piece, window, first, last, weight, None), bias, ratio, valid)

    def of_samples(self, start: int, count: int) -> ConvCall:
        part = copy.copy(self)
        batch = self._channel - 1
        for name in ("_mask", "_ratio", "_valid"):
            value = getattr(self, name)
            if value is not None and value.shape[batch] > 1:
                setattr(part, name, value.narrow(batch, start, count))
        return part

    def _batched(self, *args: Any) -> None:
        return None  # each strip has a ratio of its own

    def _scaled(self, result: Tensor, bias: Optional[Tensor], ratio: Tensor, valid: Tensor) -> Tensor:
        """Rows of the partial convolution, in place of those of the convolution of x · m. ratio, valid: of these."""
        if bias is not None:
            bias = bias.view(-1, *[1] * (-self._channel - 1))
            if self._legacy:
                result.add_(bias).sub_(bias)
        self._each_group(result, ratio)
        if bias is not None:
            result.add_(bias)
            self._each_group(result, valid)
        return result

    def _each_group(self, result: Tensor, factor: Tensor) -> None:
        groups = factor.shape[self._channel]
        if groups > 1:
            result.unflatten(self._channel, (groups, -1)).mul_(factor.unsqueeze(self._channel))
        else:
            result.mul_(factor)


class PartialPadding(TiledForward):
    """Stands in for `_conv_forward` on one convolution as `TiledForward` does, with zeros around the image that do not
    count: its borders are scaled up to a full window (Liu et al. 2018, arXiv 1811.11718).

    Where nothing is padded with zeros, or where another extension's forward pads, it only runs in strips.
    """

    def call(self, input: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ConvCall:
        module, sides = self.module, len(self.module.kernel_size)
        padded = module.padding_mode == "zeros" and any(edge for pad in padding_of(module) for edge in pad)
        if self.inner is not None or not padded or input.dim() not in (sides + 1, sides + 2):
            return super().call(input, args, kwargs)
        ratio, valid = _ratio_and_valid(module, _ones(input, sides))
        return _PartialCall(module, self.tiling, None, ratio, valid, args=args, kwargs=kwargs)


class _Partial:
    """What `PartialConv2d` and `PartialConv3d` share; stands in front of the convolution that they are."""

    def __init__(self, *args: Any, multi_channel: bool = False, return_mask: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.multi_channel, self.return_mask = multi_channel, return_mask

    def forward(self, input: Tensor, mask_in: Optional[Tensor] = None) -> Union[Tensor, tuple[Tensor, Tensor]]:
        conv: Any = self
        channel = -len(conv.kernel_size) - 1
        if input.dim() != 1 - channel:
            raise ValueError(f"input has {input.dim()} dimensions: give {1 - channel}, [N, C, ...].")
        if mask_in is not None:
            _check_mask(mask_in, input, input.shape[1] if self.multi_channel else 1)
        output, valid = partial_convolution(conv, input, conv.weight, conv.bias, mask_in)
        if not self.return_mask:
            return output
        if self.multi_channel:
            each = conv.out_channels // valid.shape[1]
            valid = valid.unsqueeze(2).expand(input.shape[0], -1, each, *valid.shape[2:]).flatten(1, 2)
        return output, valid

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}regular_conv.weight" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}regular_conv.weight")
            state_dict.pop(f"{prefix}mask_conv.weight", None)
            if f"{prefix}bias" in state_dict:
                state_dict[f"{prefix}bias"] = state_dict[f"{prefix}bias"].flatten()
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


class PartialConv2d(_Partial, nn.Conv2d):
    """A `torch.nn.Conv2d` that counts valid pixels only; call-compatible with NVIDIA's `PartialConv2d`.

    args, kwargs: those of `torch.nn.Conv2d`. Padding of every mode treats the mask as it treats the image; zeros
        around the image are not valid.
    multi_channel: masks have the input's channels, and each group counts its own; otherwise they have one.
    return_mask: `forward` gives `(output, new mask)`.

    `forward(input [N, C, H, W], mask_in [N or 1, C or 1, H, W] or None)`: the mask holds 1 where pixels are valid and
    0 where not, in any type; None is a mask of ones. The new mask is `[N or 1, 1, H', W']`, of float32 at least, or
    with multi_channel `[N, out_channels, H', W']`. Raises ValueError for another shape.

    Loads the state dicts of NVIDIA's (which are those of `torch.nn.Conv2d`) and of `torch_pconv.PConv2d`.
    """


class PartialConv3d(_Partial, nn.Conv3d):
    """A `torch.nn.Conv3d` that counts valid pixels only, as `PartialConv2d` does; call-compatible with
    NVIDIA's `PartialConv3d`."""


class PConv2d(nn.Module):
    """Partial convolution with one mask for all channels; call-compatible with `torch_pconv.PConv2d` 0.1.1.

    in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as for `torch.nn.Conv2d`, as numbers or
        tuples.
    legacy_behaviour: round as NVIDIA's partial convolution does, at the price of two more passes over each strip.

    Its state dict has the names of `torch_pconv`, and it loads those of NVIDIA's and of `PartialConv2d` too. The
    `mask_conv` is there for that alone: masks are counted with ones.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Union[int, tuple[int, int]] = 1,
        stride: Union[int, tuple[int, int]] = 1,
        padding: Union[int, tuple[int, int]] = 0,
        dilation: Union[int, tuple[int, int]] = 1,
        bias: bool = False,
        legacy_behaviour: bool = False,
    ) -> None:
        super().__init__()
        self.regular_conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, bias=False
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = self.regular_conv.kernel_size, self.regular_conv.stride
        self.padding, self.dilation = self.regular_conv.padding, self.regular_conv.dilation
        self.use_bias, self.legacy_behaviour = bias, legacy_behaviour
        self.mask_conv = nn.Conv2d(1, 1, kernel_size, stride, padding, dilation=dilation, bias=False)
        nn.init.ones_(self.mask_conv.weight).requires_grad_(False)
        bound = 1 / math.sqrt(in_channels * math.prod(self.kernel_size))
        self.bias = nn.Parameter(torch.empty(1, out_channels, 1, 1).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution `[N, out_channels, H', W']` and the new mask `[N, H', W']` of `x` `[N, C, H, W]`.

        mask: `[N, H, W]` of 0 and 1. Raises TypeError unless both are float32 of these shapes.
        """
        if x.dim() != 4 or mask.shape != (x.shape[0], *x.shape[2:]):
            raise TypeError(
                f"x is {tuple(x.shape)} and mask {tuple(mask.shape)}: give [N, C, H, W] and [N, H, W] of the same N, "
                "H and W."
            )
        if x.dtype != torch.float32 or mask.dtype != torch.float32:
            raise TypeError(f"x is {x.dtype} and mask {mask.dtype}: give float32 for both, with 0 and 1 in the mask.")
        output, valid = partial_convolution(
            self.regular_conv,
            x,
            self.regular_conv.weight,
            None if self.bias is None else self.bias.flatten(),
            mask.unsqueeze(1),
            copies=self.in_channels,
            legacy=self.legacy_behaviour,
        )
        return output, valid[:, 0]

    def compute_masks(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the convolution is multiplied by, and the new mask, each `[N, 1, H', W']`, for one `[N, 1, H, W]`."""
        return _ratio_and_valid(self.regular_conv, mask, copies=self.in_channels)

    @torch.no_grad()
    def set_weight(self, w: Tensor) -> PConv2d:
        """Copy `w` `[out_channels, in_channels, *kernel_size]` into the weight; returns the module."""
        self.regular_conv.weight.copy_(w)
        return self

    @torch.no_grad()
    def set_bias(self, b: Tensor) -> PConv2d:
        """Copy `b`, of `out_channels` elements, into the bias; returns the module. Raises ValueError without one."""
        if self.bias is None:
            raise ValueError("this PConv2d has no bias: make it with bias=True.")
        self.bias.copy_(b.view(1, self.out_channels, 1, 1))
        return self

    def get_weight(self) -> Tensor:
        """The weight `[out_channels, in_channels, *kernel_size]`."""
        return self.regular_conv.weight

    def get_bias(self) -> Optional[Tensor]:
        """The bias `[1, out_channels, 1, 1]`, or None."""
        return self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}regular_conv.weight"] = state_dict.pop(f"{prefix}weight")
            state_dict[f"{prefix}mask_conv.weight"] = torch.ones_like(self.mask_conv.weight)
            if f"{prefix}bias" in state_dict:
                state_dict[f"{prefix}bias"] = state_dict[f"{prefix}bias"].view(1, -1, 1, 1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_mask(mask: Tensor, input: Tensor, channels: int) -> None:
    batch, *_ = input.shape
    if mask.dim() != input.dim() or mask.shape[0] not in (1, batch) or mask.shape[1:] != (channels, *input.shape[2:]):
        raise ValueError(
            f"mask_in is {tuple(mask.shape)}: for this input give {(batch, channels, *input.shape[2:])}, or 1 in place "
            f"of {batch}."
        )


def _ones(input: Tensor, sides: int) -> Tensor:
    """A mask of ones for all samples and channels of `input`."""
    shape = (1,) * (input.dim() - sides) + tuple(input.shape[-sides:])
    return torch.ones(shape, dtype=_precise(input), device=input.device)
