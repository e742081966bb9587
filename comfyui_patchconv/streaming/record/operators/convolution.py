"""Convolutions: rows of the input around the rows that are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ....conv import doubled, videos, winograd
from ....conv.halo import Axis
from ...graph.node import Node, Span, Step
from ...graph.steps import Convolve, ConvolveTransposed, Pieces, Resample
from ..held import Held
from .common import OperatorCall, dim_of, each

_CONVOLVE = (F.conv1d, F.conv2d, videos.conv3d)
_CONVOLVE_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

_axis = cache(Axis.of)
_USUAL, _ALONE = Axis(3, 1, 1, 1, 1), Axis(1, 1, 1, 0, 0)


def convolution(call: OperatorCall) -> Optional[Node]:
    """`conv1d`, `conv2d`, `conv3d`, and `convolution`, which may be transposed."""
    given = call.given()
    input, weight, bias = given["input"], given["weight"], given.get("bias")
    if given.get("transposed"):
        return transposed(call)
    dim = _dim(input, weight)
    if dim is None:
        return None
    sides = len(input.shape) - 2
    stride, dilation = each(given.get("stride", 1), sides), each(given.get("dilation", 1), sides)
    padding, groups = given.get("padding", 0), given.get("groups", 1)
    paddings = [padding] * sides if isinstance(padding, str) else each(padding, sides)
    try:
        axes = [_axis(int(k), s, d, p) for k, s, d, p in zip(weight.shape[2:], stride, dilation, paddings)]
    except ValueError:
        return None
    axis = axes[dim - 2]
    if axis.output_size(input.shape[dim]) < 1:
        return None
    if _is_doubled(input, weight, axes, groups, call.spec.dtype):
        return _doubled(call, input, weight, bias)
    run, inputs = _Run.of(given, axes, dim)
    elements = prod(call.spec.shape)
    step: Convolve
    if _halves_products(input, weight, axis, groups, call.spec.dtype) and elements >= _LEAST_PIXELS * weight.shape[0]:
        step = _OfThreeRows(axis, input.shape[dim], dim, run, weight)
    else:
        step = Convolve(axis, input.shape[dim], dim, run, weight_bytes=_bytes(weight), work=prod(weight.shape[1:]))
    step.widened = _widened(call.spec.dtype, call.device)
    if sides == 3 and videos.of_images(call.device, call.spec.dtype):
        step.copies, step.workspace = 1, step.weight_bytes
    samples = 1 if any(one > 1 for one in dilation) else input.shape[0]
    columns = samples * prod(call.spec.shape[2:]) * prod(weight.shape[1:])
    alone = all(axis == _ALONE for axis in axes)
    _count_columns(step, call, input.bytes, 0 if alone else columns, groups)
    if step.bytes_beside and type(step) is Convolve:
        rows = call.spec.shape[dim]
        each_row = -(-step.bytes_beside // rows)
        step.call = _in_blocks(run, axis, dim, max(_COLUMNS_AT_ONCE // each_row, 1))
        step.copies, step.workspace = 1, min(max(_COLUMNS_AT_ONCE, each_row), step.bytes_beside)
    return call.node(step, inputs, [dim, *(None,) * (len(inputs) - 1)], dim)


CUDNN = torch.ops.aten.cudnn_convolution.default
"""What ComfyUI calls itself for videos, with the versions that PyTorch does not ask it with."""


def usual(
    self: Any, weight: Any, padding: Any, stride: Any, dilation: Any, groups: int, *_: Any, **__: Any
) -> tuple[Any, tuple[Any, ...]]:
    """The same as `CUDNN` of these arguments, by the operator that knows all devices."""
    return torch.ops.aten.convolution.default, (
        self, weight, None, stride, padding, dilation, False, [0] * len(padding), groups,
    )  # fmt: skip


class _Run:
    """Convolves rows of the input, padded along them already: the pieces are these, and what weights are nodes.

    inner: the padding on the other sides; more: what `F.pad` adds where that is uneven.
    """

    def __init__(
        self, convolve: Any, values: Callable[[Pieces], Any], arguments: tuple[Any, ...], more: Sequence[int]
    ) -> None:
        self._convolve, self._values, self._arguments, self._more = convolve, values, arguments, more

    @classmethod
    def of(cls, given: dict[str, Any], axes: Sequence[Axis], dim: int) -> tuple[_Run, list[Node]]:
        """For the arguments of a call, and what it reads."""
        inner = [0 if side == dim - 2 else one.before for side, one in enumerate(axes)]
        uneven = [(0, 0) if side == dim - 2 else (0, one.after - one.before) for side, one in enumerate(axes)]
        more = [value for pair in reversed(uneven) for value in pair]
        inputs, values = _weights(given["input"], given["weight"], given.get("bias"))
        strides, dilations = ([getattr(axis, name) for axis in axes] for name in ("stride", "dilation"))
        arguments = strides, inner, dilations, given.get("groups", 1)
        return cls(_CONVOLVE[len(axes) - 1], values, arguments, more if any(more) else ()), inputs

    def __call__(self, pieces: Pieces) -> Tensor:
        piece, kernel, shift = self._operands(pieces)
        if _widened(piece.dtype, piece.device) > 1:
            kernel = kernel.float()  # not kept: all weights at once would take twice their memory
            return self.by(_ordered(piece.float(), kernel.shape), kernel, _wide(shift)).to(piece.dtype)
        return self.by(_ordered(piece, kernel.shape), kernel, shift)

    def by(self, piece: Tensor, kernel: Tensor, shift: Optional[Tensor]) -> Tensor:
        """The convolution by another kernel."""
        return self._convolve(piece, kernel, shift, *self._arguments)

    def by_three_rows(self, pieces: Pieces, made: Callable[[Tensor], list[Tensor]], dim: int) -> Optional[Tensor]:
        """The same by kernels of one row, which are `made` of the weight; None where that costs digits."""
        piece, kernel, shift = self._operands(pieces)
        ordered = _ordered(piece.float(), kernel.shape)
        wide = winograd.convolve(ordered, made(kernel), _wide(shift), dim, self.by)
        return wide.to(piece.dtype) if winograd.keeps_digits(wide, dim) else None

    def _operands(self, pieces: Pieces) -> tuple[Tensor, Tensor, Optional[Tensor]]:
        piece = F.pad(pieces[0], self._more) if self._more else pieces[0]
        return piece, *self._values(pieces)


def _ordered(piece: Tensor, weight: Sequence[int]) -> Tensor:
    """A piece in the order in which a CPU convolves it fastest: images with their channels last, where there are many.

    What follows keeps that order, so few pieces have to be copied. weight: the shape of what it is convolved by.
    """
    computes = piece.dtype == torch.float32 or (piece.dtype in _HALVES and _computes(piece.dtype))
    image = piece.dim() == 4 and piece.device.type == "cpu" and computes
    many = weight[0] >= _LEAST_CHANNELS and weight[1] == piece.shape[1]
    return piece.contiguous(memory_format=torch.channels_last) if image and many else piece


def _wide(shift: Optional[Tensor]) -> Optional[Tensor]:
    return None if shift is None else shift.float()


def _widened(dtype: torch.dtype, device: torch.device) -> int:
    """How many times the bytes of what it is given a convolution computes in: twice on a CPU without half precision."""
    return 2 if dtype in _HALVES and device.type == "cpu" and not _computes(dtype) else 1


_COLUMNS_AT_ONCE = 8 << 20
"""Bytes beside its result that a convolution takes at once where a CPU copies to each pixel what its window has."""


def _in_blocks(run: Callable[[Pieces], Tensor], axis: Axis, dim: int, at_once: int) -> Callable[[Pieces], Tensor]:
    """The same convolution of padded rows, so many rows of the result at once."""

    def call(pieces: Pieces) -> Tensor:
        piece, *others = pieces
        rows = (piece.shape[dim] - axis.span) // axis.stride + 1
        if rows <= at_once:
            return run(pieces)
        spans = ((first, min(first + at_once, rows)) for first in range(0, rows, at_once))
        parts = [
            run([piece.narrow(dim, low * axis.stride, (high - 1 - low) * axis.stride + axis.span), *others])
            for low, high in spans
        ]
        return torch.cat(parts, dim)

    return call


def _by_columns(dtype: torch.dtype) -> bool:
    """Whether a CPU convolves real numbers of this type by a product of matrices, for which it copies to each pixel all
    that its window has: oneDNN, which needs no such copies, takes float32 and half precision alone."""
    mkldnn: Any = torch.backends.mkldnn
    there = mkldnn.is_available() and getattr(mkldnn, "enabled", True)
    return dtype not in (torch.float32, *_HALVES) or not there


def _count_columns(step: Step, call: OperatorCall, read: int, columns: int, groups: int) -> None:
    """Note what a CPU's convolution takes beside its result. read: bytes of its input. columns: numbers of all windows,
    of the samples that are convolved at once."""
    if call.device.type != "cpu":
        return
    dtype, made = call.spec.dtype, call.spec.nbytes
    real = dtype.to_real() if dtype.is_complex else dtype
    beside = 0
    few_rows = dtype.is_complex and len(call.spec.shape) == 5  # of a video, which are left to a product
    if _by_columns(real) or few_rows:
        beside = columns * (4 if real in _HALVES else real.itemsize) + (made if groups > 1 else 0)
    if dtype.is_complex:  # three of real numbers, and what is made of these
        beside = max(5 * made, 2 * made + beside)
    step.bytes_beside = beside
    step.copies = max(step.copies, -(-beside // max(read, made, 1)))


_LEAST_CHANNELS = 64
"""In and out, from which a CPU convolves faster with channels last: in bfloat16 by AMX in a third of the time."""


_LEAST_PIXELS = 1024
"""Of a map, below which making the kernels takes as long as what they save."""


def _halves_products(input: Node, weight: Any, axis: Axis, groups: int, dtype: torch.dtype) -> bool:
    """Whether a convolution is one that a CPU does faster as `_OfThreeRows`."""
    usual = axis.kernel == 3 and axis.stride == axis.dilation == groups == 1 and len(input.shape) > 3
    if not usual or input.device.type != "cpu" or min(weight.shape[:2]) < winograd.least_channels():
        return False
    return dtype == torch.float32 or _widened(dtype, input.device) > 1


class _OfThreeRows(Convolve):
    """A convolution by a kernel of three rows: while strips follow, by kernels of one row each, which it keeps.

    Where that costs digits a strip is convolved by the weight, and so are all that follow where it often does.
    """

    def __init__(self, axis: Axis, rows: int, dim: int, run: _Run, weight: Any) -> None:
        products = prod(weight.shape[1:])
        super().__init__(axis, rows, dim, self._either, weight_bytes=_bytes(weight), work=products * 2 // 3)
        self.kernel_bytes = weight.shape[0] * products // 3 * winograd.PRODUCTS * 4
        self.rows_together = winograd.ROWS
        self._run, self._kept, self._kernels = run, False, None
        self._strips = self._refused = 0

    def begin(self) -> None:
        self._kept, self._strips, self._refused = True, 0, 0

    def end(self) -> None:
        self._kept, self._kernels = False, None

    def _made(self, weight: Tensor) -> list[Tensor]:
        if self._kernels is None:
            self._kernels = winograd.kernels(weight, self.dim)
        return self._kernels

    def _either(self, pieces: Pieces) -> Tensor:
        piece, *others = pieces
        rows = piece.shape[self.dim] - 2
        done = rows // winograd.ROWS * winograd.ROWS if self._kept else 0
        if not done:
            return self._run(pieces)
        first = self._run.by_three_rows([piece.narrow(self.dim, 0, done + 2), *others], self._made, self.dim)
        self._strips += 1
        if first is None:
            self._refused += 1
            self._kept = self._refused < 2 or 4 * self._refused < self._strips
            return self._run(pieces)
        if done == rows:
            return first
        return torch.cat((first, self._run([piece.narrow(self.dim, done, rows - done + 2), *others])), self.dim)


_HALVES = (torch.bfloat16, torch.float16)


@cache
def _computes(dtype: torch.dtype) -> bool:
    """Whether this CPU convolves in half precision itself. Where it does not, PyTorch has a kernel for it that takes 8
    to 100 times as long as one in float32 (Zen 3, torch 2.13)."""
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        return bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):  # a torch that cannot say
        return True


def has_better(node: Node) -> bool:
    """Whether what is recorded here is faster than the operator itself, or takes less, also where it comes whole."""
    if isinstance(node.step, _Doubled):
        return True
    if not isinstance(node.step, (Convolve, ConvolveTransposed)) or not node.step.weight_bytes:  # a pool
        return False
    if node.device.type != "cpu":
        return node.step.copies > 0
    return len(node.shape) == 5 or node.step.widened > 1


def _weights(input: Node, weight: Any, bias: Any) -> tuple[list[Node], Callable[[Sequence[Tensor]], Any]]:
    """The inputs of a convolution, and what gives its weight and bias once their pieces are there."""
    inputs = [input]
    places: list[Any] = []
    for value in (weight, bias):
        if isinstance(value, Node):
            inputs.append(value)
            places.append(len(inputs) - 1)
        else:
            places.append(value)

    def values(pieces: Sequence[Tensor]) -> list[Any]:
        return [
            pieces[place] if isinstance(place, int) else place.tensor if isinstance(place, Held) else None
            for place in places
        ]

    return inputs, values


def _bytes(weight: Any) -> int:
    return prod(weight.shape) * (weight.itemsize if isinstance(weight, Node) else weight.dtype.itemsize)


def _dim(input: Any, weight: Any) -> Optional[int]:
    """Along which a convolution's input is read; None where it is none that is known."""
    if not isinstance(input, Node) or len(input.shape) != len(weight.shape) or len(input.shape) not in (3, 4, 5):
        return None
    return dim_of(input, (0, 1))


def transposed(call: OperatorCall) -> Optional[Node]:
    """`conv_transpose1d`, `2d`, `3d`, and the transposed `convolution`."""
    given = call.given()
    input, weight, bias = given["input"], given["weight"], given.get("bias")
    dim = _dim(input, weight)
    if dim is None:
        return None
    sides = len(input.shape) - 2
    stride, padding, added, dilation = (
        each(given.get(name, default), sides)
        for name, default in (("stride", 1), ("padding", 0), ("output_padding", 0), ("dilation", 1))
    )
    side, groups = dim - 2, given.get("groups", 1)
    axis = Axis.of(int(weight.shape[dim]), stride[side], dilation[side], padding[side])
    convolve, inputs, values = _CONVOLVE_TRANSPOSED[sides - 1], *_weights(input, weight, bias)
    inner = [0 if place == side else one for place, one in enumerate(padding)]

    def run(pieces: Sequence[Tensor]) -> Tensor:
        kernel, shift = values(pieces)
        return convolve(pieces[0], kernel, shift, stride, inner, added, groups, dilation)

    work = max(prod(weight.shape[2:]) * weight.shape[0] // prod(stride), 1)
    step = ConvolveTransposed(axis, input.shape[dim], dim, run, weight_bytes=_bytes(weight), work=work)
    _count_columns(step, call, input.bytes, prod(input.shape[2:]) * prod(weight.shape[1:]), groups)
    return call.node(step, inputs, [dim, *(None,) * (len(inputs) - 1)], dim)


def _is_doubled(input: Node, weight: Any, axes: Sequence[Axis], groups: int, dtype: torch.dtype) -> bool:
    """Whether a convolution follows nearest upsampling such that `_Doubled` is its equal.

    Not where half precision is computed: sums of kernels would be rounded once more than eager's. Not on other devices:
    what they do with infinities can be seen there only by waiting for the result.
    """
    step = input.step
    usual = len(axes) == 2 and axes[0] == axes[1] == _USUAL
    fits = (
        usual
        and isinstance(step, Resample)
        and step.repeats == (1, 1, 2, 2)
        and step.dim == 2
        and isinstance(weight, Held)
    )
    if not fits or groups > 1 or input.device.type != "cpu":
        return False
    return dtype in (torch.float32, torch.float64) or _widened(dtype, input.device) > 1


def _doubled(call: OperatorCall, input: Node, weight: Held, bias: Any) -> Optional[Node]:
    small = next(iter(input.inputs))
    if isinstance(bias, Node):
        return None
    step = _Doubled(weight, bias, small.shape[2])
    step.widened = _widened(call.spec.dtype, call.device)
    _count_columns(step, call, small.bytes, 4 * prod(small.shape), 1)
    return call.node(step, [small], [2], 2)


class _Doubled(Step):
    """Nearest 2x upsampling and a 3x3 convolution with padding 1 behind it, of the small map.

    A quarter of the multiplications, and no upsampled map. Where a value is infinite sums of kernels are not what eager
    sums: such a strip is upsampled.
    """

    def __init__(self, weight: Held, bias: Any, rows: int) -> None:
        self.weight, self.bias, self.rows = weight, bias, rows
        self.weight_bytes = self.workspace = 4 * prod(weight.shape)
        self.work = prod(weight.shape[1:]) // 4
        self._kernels: list[Tensor] = []

    def end(self) -> None:
        self._kernels = []

    def needs(self, first: int, last: int) -> Sequence[Span]:
        return ((max(first // 2 - 1, 0), min((last - 1) // 2 + 2, self.rows)),)

    def compute(self, first: int, last: int, pieces: Sequence[Tensor]) -> Tensor:
        low, high = first // 2, (last - 1) // 2 + 1
        above, below = int(low == 0), int(high == self.rows)
        piece = F.pad(pieces[0], (0, 0, above, below)) if above or below else pieces[0]
        bias = None if self.bias is None else self.bias.tensor
        wide = _ordered(piece.float() if piece.dtype in _HALVES else piece, self.weight.shape)
        weight = self.weight.tensor.to(wide.dtype)
        bias = None if bias is None else bias.to(wide.dtype)
        self._kernels = self._kernels or doubled.kernels(weight)
        result = doubled.convolve(wide, self._kernels, bias)
        if not bool(result.sum().isfinite()):
            large = F.interpolate(wide, scale_factor=2.0, mode="nearest")[:, :, 1:-1]
            result = F.conv2d(large, weight, bias, padding=(0, 1))
        return result.narrow(2, first - 2 * low, last - first).to(piece.dtype)


TABLE: dict[str, Callable[[OperatorCall], Optional[Node]]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed),
}
