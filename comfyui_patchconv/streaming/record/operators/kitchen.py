"""Operators of `comfy_kitchen`, which ComfyUI's newer autoencoders of videos call on GPUs: fused norms and pads, and
convolutions that add a residual. They are known by name: nothing here imports the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ....conv.halo import Axis
from ...graph.node import Node, Span
from ...graph.steps import Convolve, Pad, Pieces, Reduce, RowLocal
from ..held import Held
from ..shapes import Spec
from .common import OperatorCall, default_dim, dim_of, each, fixed_dim, tensor_of
from .norms import GroupMoments

_LAST = torch.channels_last_3d
"""The order that these give their results in, and take what they are given fastest in."""


def group_norm_silu_pad3d(call: OperatorCall) -> Optional[Node]:
    """Each frame's group norm, SiLU, and padding: `(left, right, top, bottom)`, and frames of zeros in front."""
    given = call.given()
    input, weight, bias, stats = given["x"], given.get("weight"), given.get("bias"), given.get("stats")
    if not isinstance(input, Node) or any(isinstance(one, Node) for one in (weight, bias, stats)):
        return None
    dim = fixed_dim(input)
    dim = default_dim(input.shape, (0, 1, 2)) if dim is None or dim < 3 else dim
    left, right, top, bottom, front = given["pad"]
    mode = "constant" if given.get("zero_pad") else "reflect"
    sides = {3: (top, bottom), 4: (left, right)}
    if dim is None or min(given["pad"]) < 0 or (mode == "reflect" and max(sides[dim]) >= input.shape[dim]):
        return None
    normed = input
    if weight is not None or given["silu"]:
        normed = _normed(call, input, dim, given)
    before, after = sides[dim]
    inner = (*sides[4], 0, 0) if dim == 3 else (0, 0, *sides[3])

    def run(piece: Tensor) -> Tensor:
        piece = F.pad(piece, (*inner, 0, 0), mode) if any(inner) else piece
        piece = F.pad(piece, (0, 0, 0, 0, front, 0)) if front else piece
        return piece.contiguous(memory_format=_LAST)

    return call.node(Pad(before, after, mode, 0.0, input.shape[dim], dim, run), [normed], [dim], dim)


def _normed(call: OperatorCall, input: Node, dim: int, given: dict[str, Any]) -> Node:
    """What is padded then."""
    groups, silu, eps = given["num_groups"], given["silu"], given["eps"]
    weight, bias, stats = given.get("weight"), given.get("bias"), given.get("stats")
    batch, channels, frames = input.shape[:3]
    wide = torch.promote_types(input.dtype, torch.float32)
    inputs: list[Node] = [input]
    if weight is not None and stats is None:
        lines = batch * frames, channels
        spec = Spec((4, prod(lines)), (prod(lines), 1), 0, wide)
        device = call.device
        reduce = Reduce(lambda: _MomentsOfFrames(groups, lines, weight, bias, eps, wide, device))
        reduce.name = call.name
        inputs.append(call.recorder.node(reduce, [input], [dim], spec, device, None))

    def run(pieces: Sequence[Tensor], first: int, last: int) -> Tensor:
        result = pieces[0].to(wide)
        if weight is not None:
            made = pieces[1][2:] if stats is None else _line_of(stats, weight, bias, groups)
            scale, shift = (one.view(batch, frames, channels).transpose(1, 2)[..., None, None] for one in made)
            result = torch.addcmul(shift, result, scale)
        return (F.silu(result) if silu else result).to(pieces[0].dtype)  # rounded once, as the kernel does

    step = RowLocal(run, 1, cheap=True)
    step.name = call.name
    spec = Spec(input.shape, input.strides, 0, input.dtype)
    return call.recorder.node(step, inputs, [dim, *(None,) * (len(inputs) - 1)], spec, call.device, dim)


class _MomentsOfFrames(GroupMoments):
    """The line of a group norm whose samples are frames: pieces are `[N, C, T, H, W]`."""

    def add(self, piece: Tensor) -> None:
        super().add(piece.transpose(1, 2).flatten(0, 1))


def _line_of(stats: Held, weight: Held, bias: Optional[Held], groups: int) -> tuple[Tensor, Tensor]:
    """What each channel of each frame, `[N·T, C]`, is multiplied by and added to, of means and reciprocal deviations
    `[N·T, groups, 2]`."""
    scale, shift = weight.tensor.float(), tensor_of(bias)
    mean, deviation = (one.repeat_interleave(len(scale) // groups, 1) for one in stats.tensor.float().unbind(-1))
    scale = deviation * scale
    return scale, -mean * scale if shift is None else shift.float() - mean * scale


def fp16_conv3d(call: OperatorCall) -> Optional[Node]:
    """A convolution without padding, and a residual on top."""
    given = call.given()
    input, weight, bias, residual = (given.get(name) for name in ("x", "weight", "bias", "residual"))
    if not isinstance(input, Node) or isinstance(weight, Node) or isinstance(bias, Node) or weight is None:
        return None
    dim = dim_of(input, (0, 1))
    if dim is None:
        return None
    stride, func = each(given["stride"], 3), call.func
    axis = Axis.of(int(weight.shape[dim]), stride[dim - 2], 1, 0)
    if axis.output_size(input.shape[dim]) < 1:
        return None
    inputs: list[Node] = [input]
    if residual is not None:
        inputs.append(residual if isinstance(residual, Node) else call.recorder.source(residual.tensor))

    def run(pieces: Pieces) -> Tensor:
        rest = pieces[1] if len(pieces) > 1 else None
        return func(pieces[0].contiguous(memory_format=_LAST), weight.tensor, tensor_of(bias), rest, stride)

    kind = Convolve if residual is None else _WithResidual
    weight_bytes = prod(weight.shape) * weight.dtype.itemsize
    step = kind(axis, input.shape[dim], dim, run, weight_bytes=weight_bytes, work=prod(weight.shape[1:]))
    return call.node(step, inputs, [dim] * len(inputs), dim)


class _WithResidual(Convolve):
    """A convolution to which rows of a second input are added."""

    def needs(self, first: int, last: int) -> Sequence[Span]:
        return (*super().needs(first, last), (first, last))


TABLE: dict[str, Callable[[OperatorCall], Optional[Node]]] = {
    "group_norm_silu_pad3d": group_norm_silu_pad3d,
    "fp16_conv3d": fp16_conv3d,
}
