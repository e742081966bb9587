"""Reductions: of each row by itself where they leave the rows what they are, else gathered in a pass over all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Optional

import torch
from torch import Tensor

from ...graph.node import Node
from ...graph.statistics import Moments, has_float64
from ...graph.steps import Reduce, RowLocal
from .common import OperatorCall, default_dim, dim_of, each, fixed_dim, over, sides_of

_GATHERED = ("mean", "sum", "amax", "amin", "linalg_vector_norm", "norm", "var", "std")
_OTHERS = ("all", "any", "logsumexp", "prod", "argmax", "argmin")


def reduction(call: OperatorCall) -> Optional[Node]:
    given = call.given()
    input = given.get("self", given.get("input"))
    if not isinstance(input, Node):
        return None
    count = len(input.shape)
    dims = given.get("dim")
    dims = range(count) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = sorted({dim % count for dim in dims}) if count else []
    keeps = bool(given.get("keepdim"))
    dim = fixed_dim(input)
    dim = default_dim(input.shape) if dim is None else dim
    if dim is None:
        return None
    if dim in dims:
        return _gathered(call, input, given, dims, dim)
    inputs, apply = over(call.args, call.kwargs)
    if len(inputs) > 1:
        return None
    to = dim if keeps else dim - sum(1 for one in dims if one < dim)
    func = call.func
    return call.node(RowLocal(lambda pieces, first, last: apply(func, pieces), 1, cheap=True), inputs, [dim], to)


def _gathered(call: OperatorCall, input: Node, given: dict[str, Any], dims: list[int], dim: int) -> Optional[Node]:
    name, order = call.name, given.get("ord", given.get("p", 2))
    if name not in _GATHERED or (name in ("linalg_vector_norm", "norm") and order not in (None, 2, 2.0)):
        return None
    if input.dtype.is_complex or (not input.dtype.is_floating_point and name != "sum"):
        return None
    correction = given.get("correction", 1 if given.get("unbiased", True) else 0)
    correction = 1 if correction is None else correction
    shape, size = call.spec.shape, prod(input.shape[one] for one in dims)
    to, floating = call.spec.dtype, input.dtype.is_floating_point
    whole = to if to is torch.bool or (floating and not to.is_floating_point and not to.is_complex) else None
    integers, device = not floating or whole is not None, call.device

    def make(shape: Sequence[int]) -> _Gathered:
        return _Gathered(name, dims, size, shape, correction, integers, device, whole)

    return call.recorder.node(_step(name, make, dims, shape), [input], [dim], call.spec, call.device, None)


def _step(name: str, make: Callable[[Sequence[int]], _Gathered], dims: Sequence[int], shape: Sequence[int]) -> Reduce:
    """A reduction over `dims` to a result of `shape`, which `make` makes what gathers it."""

    def part(samples: int) -> tuple[Reduce, tuple[int, ...]]:
        fewer = samples, *shape[1:]
        return _step(name, make, dims, fewer), fewer

    step = Reduce(lambda: make(shape), part=None if 0 in dims else part)
    step.name = name
    return step


class _Gathered:
    """A reduction, gathered piece by piece: sums in float64, variances merged with the term between pieces.

    whole: the type of whole numbers that a sum is asked for in, which each value is made of before it is added; None
    for another type.
    """

    def __init__(
        self, name: str, dims: list[int], size: int, shape: Sequence[int], correction: float, integers: bool,
        device: torch.device, whole: Optional[torch.dtype] = None,
    ) -> None:  # fmt: skip
        self.name, self.dims, self.size, self.shape, self.correction = name, dims, size, shape, correction
        self.numbers = 1 + prod(shape) * (2 if name in ("var", "std") else 1)
        self._integers, self._device, self._whole = integers, device, whole
        self._value: Optional[Tensor] = None
        self._moments: Optional[Moments] = None

    def add(self, piece: Tensor) -> None:
        if self.name in ("amax", "amin"):
            self._join(getattr(torch, self.name)(piece, self.dims, True))
            return
        piece = piece if self._whole is None else piece.to(self._whole)
        wide = piece.double() if piece.dtype.is_floating_point and has_float64(piece.device) else piece
        if self.name in ("sum", "mean"):
            part = wide.sum(self.dims, True)
        elif self.name in ("linalg_vector_norm", "norm"):
            part = wide.square().sum(self.dims, True)
        else:
            count = prod(wide.shape[dim] for dim in self.dims)
            squares, mean = torch.var_mean(wide, self.dims, correction=0, keepdim=True)
            self._join_moments(Moments(count, mean, squares * count))
            return
        self._join(part)

    def state(self) -> Tensor:
        if self._moments is not None:
            count, *parts = self._moments
        elif self._value is not None:
            count, parts = 1, [self._value]
        else:
            return torch.zeros(self.numbers, dtype=torch.float64)
        flat = torch.cat([part.reshape(-1).cpu() for part in parts])
        flat = flat.double() if flat.is_floating_point() else flat.long().view(torch.float64)  # integers bit by bit
        return torch.cat((torch.tensor([count], dtype=torch.float64), flat))

    def merge(self, states: Sequence[Tensor]) -> None:
        self._value = self._moments = None
        for state in states:
            if not state[0]:
                continue
            values = state[1:].view(torch.int64) if self._integers else state[1:]
            values = values.to(self._device) if has_float64(self._device) else values
            if self.name in ("var", "std"):
                self._join_moments(Moments(int(state[0]), *values.view(2, *self.shape)))
            else:
                self._join(values.view(self.shape))

    def _join(self, part: Tensor) -> None:
        join = {"amax": torch.maximum, "amin": torch.minimum}.get(self.name, torch.add)
        self._value = part if self._value is None else join(self._value, part)

    def _join_moments(self, more: Moments) -> None:
        self._moments = more if self._moments is None else self._moments.merged(more)

    def result(self, like: Tensor) -> None:
        value = self._variance() if self._moments is not None else self._value
        assert value is not None
        if self.name == "mean":
            value = value / self.size
        elif self.name in ("linalg_vector_norm", "norm", "std"):
            value = value.sqrt()
        like.copy_(value.reshape(self.shape))

    def _variance(self) -> Tensor:
        assert self._moments is not None
        squares, divisor = self._moments.squares, self.size - self.correction
        return squares / divisor if divisor > 0 else squares * float("nan" if self.size <= 1 else "inf")


def pooled_to_one(call: OperatorCall) -> Optional[Node]:
    """An adaptive average, or largest value, over the whole image."""
    input, sizes = call.args[0], call.args[1]
    sides = sides_of(call)
    if not isinstance(input, Node) or len(input.shape) != sides + 2 or any(size != 1 for size in each(sizes, sides)):
        return None
    dims = list(range(2, sides + 2))
    dim = dim_of(input, (0, 1))
    if dim is None:
        return None
    size, shape, device = prod(input.shape[2:]), call.spec.shape, call.device

    def make(shape: Sequence[int]) -> _Gathered:
        return _Gathered("amax" if "max" in call.name else "mean", dims, size, shape, 0, False, device)

    step = _step(call.name, make, dims, shape)
    return call.recorder.node(step, [input], [dim], call.spec, call.device, None)


TABLE: dict[str, Callable[[OperatorCall], Optional[Node]]] = dict.fromkeys((*_GATHERED, *_OTHERS), reduction)
