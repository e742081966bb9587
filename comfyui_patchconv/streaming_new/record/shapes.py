"""What an operator's results look like: their shapes, strides and types, and whether they are views of an argument.

Asked of the operator itself, on tensors without values, and remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor


class Spec(NamedTuple):
    """A tensor without its values. alias: the place of the argument that it is a view of; None for memory of its own."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    alias: Optional[int] = None

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset(), tensor.dtype)

    def empty(self) -> Tensor:
        """A tensor of this sort on the meta device."""
        strides = self.strides
        if not self.offset:
            return torch.empty_strided(self.shape, strides, dtype=self.dtype, device="meta")
        reach = 1 + sum((side - 1) * stride for side, stride in zip(self.shape, strides)) if 0 not in self.shape else 0
        memory = torch.empty(self.offset + reach, dtype=self.dtype, device="meta")
        return memory.as_strided(self.shape, strides, self.offset)


_MOST = 1 << 14
"""Answers that are remembered."""

_known: dict[Any, Optional[tuple[Any, ...]]] = {}


def specs_of(func: Any, args: Any, kwargs: dict[str, Any], spec: Callable[[Any], Optional[Spec]]) -> Any:
    """What `func(*args, **kwargs)` returns, as `Spec`s: one, or a tuple of several; None where that is not known.

    spec: the `Spec` of an argument that is a tensor, None for any other.
    """
    found: list[Spec] = []

    def key_of(value: Any) -> Any:
        sort = spec(value)
        if sort is not None:
            found.append(sort)
            return sort
        if isinstance(value, (list, tuple)):
            return tuple(map(key_of, value))
        if isinstance(value, torch.device):
            return "device"
        return type(value), value

    try:
        key = (func, key_of(args), tuple((name, key_of(value)) for name, value in kwargs.items()) if kwargs else ())
        if key in _known:
            return _known[key]
    except TypeError:  # an argument that cannot be remembered
        return None
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = answer = _asked(func, args, kwargs, spec)
    return answer


def _asked(func: Any, args: Any, kwargs: dict[str, Any], spec: Callable[[Any], Optional[Spec]]) -> Any:
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def empty(value: Any) -> Any:
        sort = spec(value)
        if sort is not None:
            tensor = sort.empty()
            storages.setdefault(tensor.untyped_storage()._cdata, len(kept))
            kept.append(tensor)
            return tensor
        if isinstance(value, (list, tuple)):
            return type(value)(map(empty, value))
        return torch.device("meta") if isinstance(value, torch.device) else value

    try:
        result = func(*map(empty, args), **{name: empty(value) for name, value in kwargs.items()})
    except Exception:  # no implementation without values, or arguments that eager refuses, too
        return None
    several = isinstance(result, (list, tuple))
    results = tuple(result) if several else (result,)
    if not all(isinstance(one, Tensor) and one.layout is torch.strided for one in results):
        return None
    answer = tuple(Spec.of(one)._replace(alias=storages.get(one.untyped_storage()._cdata)) for one in results)
    return answer if several else answer[0]
