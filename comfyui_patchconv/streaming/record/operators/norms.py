"""Norms: statistics of the whole map, gathered in one pass over it, and one multiply-add per channel in another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ...graph.node import Node
from ...graph.statistics import Statistics, in_float64
from ...graph.steps import Reduce, ScaleAndShift
from ..held import Held
from ..shapes import Spec
from .common import OperatorCall, default_dim, fixed_dim, row_local, tensor_of


def group_norm(call: OperatorCall) -> Optional[Node]:
    """`group_norm`, and `native_group_norm`'s first result."""
    given = call.given()
    input, groups, weight, bias, eps = _group_norm_arguments(call, given)
    return _normalised(call, input, groups, weight, bias, eps)


def _group_norm_arguments(call: OperatorCall, given: dict[str, Any]) -> tuple[Any, ...]:
    if call.name == "native_group_norm":
        return given["input"], given["group"], given.get("weight"), given.get("bias"), given["eps"]
    return given["input"], given["num_groups"], given.get("weight"), given.get("bias"), given.get("eps", 1e-5)


def instance_norm(call: OperatorCall) -> Optional[Node]:
    given = call.given()
    input = given["input"]
    if not given["use_input_stats"] or given.get("running_mean") is not None or not isinstance(input, Node):
        return None
    return _normalised(call, input, input.shape[1], given.get("weight"), given.get("bias"), given["eps"])


def _normalised(call: OperatorCall, input: Any, groups: int, weight: Any, bias: Any, eps: float) -> Optional[Node]:
    if not isinstance(input, Node) or len(input.shape) < 3 or isinstance(weight, Node) or isinstance(bias, Node):
        return None
    dim = fixed_dim(input)
    dim = default_dim(input.shape, (0, 1)) if dim is None or dim < 2 else dim
    if dim is None:
        return None
    batch, channels = input.shape[:2]
    wide = torch.promote_types(call.spec.dtype, torch.float32)
    spec = Spec((4, batch * channels), (batch * channels, 1), 0, wide)
    shape, device = input.shape, call.device

    def gather(batch: int) -> tuple[Reduce, tuple[int, ...]]:
        of_batch = batch, *shape[1:]
        step = Reduce(
            lambda: GroupMoments(groups, of_batch, weight, bias, eps, wide, device), moments=True, part=gather
        )
        step.name = call.name
        return step, (4, batch * channels)

    reduce, _ = gather(batch)
    line = call.recorder.node(reduce, [input], [dim], spec, call.device, None)
    return call.node(ScaleAndShift(_line_by_line), [input, line], [dim, None], dim)


def _line_by_line(pieces: Sequence[Tensor], first: int, last: int) -> Tensor:
    """Each channel times its factor, and what is added to it: one pass, in half precision too."""
    piece, (mean, variance, scale, shift) = pieces
    if piece.device.type == "cpu" and bool(mean.any()):
        return _by_differences(piece, mean, scale, shift)
    apart = piece.shape[0] > 1 and piece.stride(1) == 1  # samples whose channels lie last
    if piece.device.type in ("cpu", "cuda") and not apart:
        samples = piece.reshape(1, -1, *piece.shape[2:])
        return F.batch_norm(samples, mean, variance, scale, shift, False, 0.0, 0.0).view(piece.shape)
    shape = (*piece.shape[:2], *(1,) * (piece.dim() - 2))
    result = torch.addcmul(shift.view(shape), piece.to(scale.dtype), scale.view(shape))
    return result.to(piece.dtype)


def _by_differences(piece: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The same where the mean is subtracted first. The CPU's kernel does not: it multiplies and adds at once, and has
    left what the product of mean and factor lost when it was rounded."""
    shape = (*piece.shape[:2], *(1,) * (piece.dim() - 2))
    result = piece.to(scale.dtype) - mean.view(shape)
    return result.mul_(scale.view(shape)).add_(shift.view(shape)).to(piece.dtype)


_FAR = 8.0
"""Means of so many deviations: from there on they are subtracted first, which takes a map and half of the time more."""


class GroupMoments:
    """Gathers the statistics of a group norm, and makes of them what each channel is multiplied by and added to."""

    def __init__(
        self, groups: int, shape: Sequence[int], weight: Optional[Held], bias: Optional[Held], eps: float,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        batch, self.channels = shape[:2]
        self.statistics = Statistics(groups, batch)
        self.numbers = self.statistics.numbers
        self.weight, self.bias, self.eps, self.dtype, self.device = weight, bias, eps, dtype, device

    def add(self, piece: Tensor) -> None:
        self.statistics.add(piece)

    def add_moments(self, moments: Tensor, elements: int) -> None:
        self.statistics.add_moments(moments, elements)

    def state(self) -> Tensor:
        return self.statistics.state()

    def merge(self, states: Sequence[Tensor]) -> None:
        self.statistics.merge(states, self.device)

    def result(self, like: Tensor) -> None:
        """Write it to `like`, `[4, N·C]`: a mean, a variance of 1, the factors, and what is added. The mean is 0 but on
        a CPU, of groups that vary little."""
        statistics, each = self.statistics, self.channels // self.statistics.groups
        scale, mean = (statistics.variance + self.eps).rsqrt(), statistics.mean
        far = (mean.abs() * scale > _FAR) & (self.device.type == "cpu")
        scale, mean, far = (value.repeat_interleave(each, 1) for value in (scale, mean, far))
        weight, bias = tensor_of(self.weight), tensor_of(self.bias)
        scale = scale if weight is None else scale * in_float64(weight)
        # Rounded as eager rounds it: what is subtracted from a map that varies little has its pixels' own error then.
        scale, subtracted = scale.to(self.dtype), mean.to(self.dtype)
        shift = torch.where(far, -(scale * (mean - subtracted)).to(self.dtype), -(scale * subtracted))
        shift = shift if bias is None else shift + in_float64(bias).to(self.dtype)
        like[0].copy_(torch.where(far, subtracted, 0.0).reshape(-1))
        like[1].fill_(1.0)
        like[2].copy_(scale.reshape(-1))
        like[3].copy_(shift.reshape(-1))


def batch_norm(call: OperatorCall) -> Optional[Node]:
    given = call.given()
    trains = given.get("training", given.get("train", False))
    node = given.get("input")
    if trains or not isinstance(node, Node) or (not node.flexible and node.dim == 1):
        return None
    return row_local(call, excluded=(1,), aligned=False)


def over_last(call: OperatorCall) -> Optional[Node]:
    """`layer_norm`, `rms_norm`: over the last dimensions."""
    given = call.given()
    input, sizes = given["input"], given["normalized_shape"]
    if not isinstance(input, Node):
        return None
    count = len(input.shape)
    return row_local(call, excluded=range(count - len(sizes), count), aligned=False)


TABLE: dict[str, Callable[[OperatorCall], Optional[Node]]] = {
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
    "layer_norm": over_last,
    "rms_norm": over_last,
}
