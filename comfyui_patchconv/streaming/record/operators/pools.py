"""Pools: averages and largest values of windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from operator import floordiv
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ....conv.halo import Axis
from ...graph.node import Node, Step
from ...graph.steps import Convolve, Windows
from .common import OperatorCall, default_dim, dim_of, each, sides_of

_AVERAGE: tuple[Callable[..., Any], ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_LARGEST: tuple[Callable[..., Any], ...] = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)

_ADAPTIVE: tuple[Callable[..., Any], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_ADAPTIVE_LARGEST: tuple[Callable[..., Any], ...] = (
    F.adaptive_max_pool1d,
    F.adaptive_max_pool2d,
    F.adaptive_max_pool3d,
)

_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d")


def pool(call: OperatorCall) -> Optional[Node]:
    """Average and largest of a window."""
    given = call.given()
    input = given["self"]
    sides = sides_of(call)
    if not isinstance(input, Node) or len(input.shape) != sides + 2:
        return None
    dim = dim_of(input, (0, 1))
    if dim is None or given.get("ceil_mode"):
        return None
    largest = call.name.startswith("max")
    kernel, padding = each(given["kernel_size"], sides), each(given.get("padding", 0), sides)
    dilation = each(given.get("dilation", 1), sides)
    stride = each(given["stride"], sides) if given.get("stride") else kernel
    if any(padding) and not largest and not given.get("count_include_pad", True):
        return None
    side = dim - 2
    axis = Axis.of(kernel[side], stride[side], dilation[side], padding[side])
    if axis.output_size(input.shape[dim]) < 1:
        return None
    inner = [0 if place == side else one for place, one in enumerate(padding)]
    func, rest = call.func, (False, True, *_divisor(given))

    def run(pieces: Sequence[Tensor]) -> Tensor:
        if largest:
            return _LARGEST[sides - 1](pieces[0], kernel, stride, inner, dilation)
        return func(pieces[0], kernel, stride, inner, *rest)

    fill = 0.0 if not largest else float("-inf") if input.dtype.is_floating_point else torch.iinfo(input.dtype).min
    step = Convolve(axis, input.shape[dim], dim, run, work=prod(kernel), fill=fill)
    if largest and sides > 1:
        _note_places(step, input, call)
    return call.node(step, [input], [dim], dim)


def _note_places(step: Step, input: Node, call: OperatorCall) -> None:
    """PyTorch's operators of largest values make their places, in 8 bytes each, whether they are asked for or not."""
    step.bytes_beside = 8 * prod(call.spec.shape)
    step.copies = -(-step.bytes_beside // max(input.bytes, call.spec.nbytes))


def _divisor(given: dict[str, Any]) -> tuple[Any, ...]:
    return (given["divisor_override"],) if given.get("divisor_override") is not None else ()


def adaptive_pool(call: OperatorCall) -> Optional[Node]:
    """An adaptive average or largest value."""
    input, sizes = call.args[0], call.args[1]
    sides = sides_of(call)
    if not isinstance(input, Node) or len(input.shape) != sides + 2:
        return None
    dim, sizes = default_dim(input.shape, (0, 1)) if input.flexible else input.dim, each(sizes, sides)
    if dim is None or dim < 2 or any(size < 1 for size in sizes) or sizes[dim - 2] == 1:
        return None
    largest = "max" in call.name
    if any(rows % size for rows, size in zip(input.shape[2:], sizes)):
        func, row = (_ADAPTIVE_LARGEST if largest else _ADAPTIVE)[sides - 1], [*sizes]
        row[dim - 2] = 1
        work = prod(-(-whole // made) for whole, made in zip(input.shape[2:], sizes))
        step: Step = Windows(input.shape[dim], sizes[dim - 2], dim, lambda piece: func(piece, row), work)
    else:  # windows of one size, which do not overlap
        func, kernel = (_LARGEST if largest else _AVERAGE)[sides - 1], [*map(floordiv, input.shape[2:], sizes)]
        axis = Axis(kernel[dim - 2], kernel[dim - 2])
        step = Convolve(axis, input.shape[dim], dim, lambda pieces: func(pieces[0], kernel), work=prod(kernel))
    if largest:
        _note_places(step, input, call)
    return call.node(step, [input], [dim], dim)


TABLE: dict[str, Callable[[OperatorCall], Optional[Node]]] = dict.fromkeys(_POOLS, pool)
