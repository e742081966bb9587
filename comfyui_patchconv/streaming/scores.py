"""Attention in single steps, `bmm`, scale, softmax, `bmm`, without its matrix of scores."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from . import operators
from .attention import attend
from .errors import CannotStreamError


class Scores(Tensor):
    """`[B, queries, keys]`: the product of queries `[B, queries, C]` and keys `[B, C, keys]`, not computed yet.

    scale: a factor. normalised: a softmax over the keys follows. turned: the last two dimensions are exchanged.
    viewed: there is a view of it. What else is done to it computes it first.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    normalised: bool
    turned: bool
    viewed: bool

    @staticmethod
    def __new__(
        cls, queries: Tensor, keys: Tensor, scale: float = 1.0, normalised: bool = False, turned: bool = False
    ) -> Scores:
        shape = [queries.shape[0], queries.shape[1], keys.shape[2]]
        shape = [shape[0], shape[2], shape[1]] if turned else shape
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=queries.dtype, device=queries.device)
        tensor.queries, tensor.keys = queries, keys
        tensor.scale, tensor.normalised, tensor.turned, tensor.viewed = scale, normalised, turned, False
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Scores({tuple(self.shape)}, {self.dtype}, deferred)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if operators.writes(name) and isinstance(args[0], Scores):
            return args[0].written(name, args, kwargs)
        result = _next(name, args, kwargs)
        if result is not None:
            return result
        if name == "bmm" and any(not issubclass(one, (Scores, FakeTensor)) for one in types):
            return NotImplemented  # the values are deferred too: first it is their turn
        args, kwargs = tree_map(lambda value: value.computed() if isinstance(value, Scores) else value, (args, kwargs))
        return func(*args, **kwargs)

    def written(self, name: str, args: Any, kwargs: Any) -> Scores:
        """Itself, scaled in place. Raises CannotStreamError for any other write."""
        result = _next(name[:-1], args, kwargs)
        if self.viewed or not isinstance(result, Scores) or result.turned != self.turned:
            raise CannotStreamError(f"{name} writes into scores")
        self.scale, self.normalised = result.scale, result.normalised
        return self

    def computed(self) -> Tensor:
        scores = torch.bmm(self.queries, self.keys) * self.scale
        scores = scores.softmax(2) if self.normalised else scores
        return scores.transpose(1, 2) if self.turned else scores

    def with_values(self, values: Tensor) -> Tensor:
        """`[B, queries, C]` of values `[B, keys, C]`."""
        keys, values = self.keys.transpose(1, 2).contiguous(), values.contiguous()
        return attend(self.queries[:, None], keys[:, None], values[:, None], self.scale)[:, 0]


def _next(name: str, args: Any, kwargs: Any) -> Optional[Tensor]:
    """The next step on the way, or None where it is none."""
    first, second = (*args, None, None)[:2]
    if name == "bmm" and not kwargs:
        if isinstance(first, Scores) and type(second) is Tensor and first.normalised and not first.turned:
            return first.with_values(second)
        if isinstance(second, Scores) and type(first) is Tensor and second.normalised and second.turned:
            return second.with_values(first.transpose(1, 2)).transpose(1, 2)
        return None
    if not isinstance(first, Scores) or len(args) > 3:
        return None
    scale, normalised, turned = first.scale, first.normalised, first.turned
    if name in ("mul", "div") and isinstance(second, (int, float)) and not normalised:
        scale = scale * second if name == "mul" else scale / second
    elif name in ("softmax", "_softmax") and not normalised and not turned and args[1:] in ((2,), (-1,)) and not kwargs:
        normalised = True
    elif _exchanges(name, args[1:]) and not kwargs:
        turned = not turned
    else:
        return None
    result = Scores(first.queries, first.keys, scale, normalised, turned)
    if turned != first.turned:
        first.viewed = result.viewed = True
    return result


def _exchanges(name: str, args: tuple[Any, ...]) -> bool:
    if name == "permute":
        return [dim % 3 for dim in args[0]] == [0, 2, 1]
    return name == "transpose" and len(args) == 2 and {dim % 3 for dim in args} == {1, 2}
