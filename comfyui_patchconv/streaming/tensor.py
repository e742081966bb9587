"""A tensor whose operations wait until a normalisation, an unknown operator or the end asks for their result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from . import engine, operators
from .graph import Node

_SEVERAL = ("split", "split_with_sizes", "chunk", "unbind")
_VIEWS = (*_SEVERAL, *operators.ARRANGING, "slice", "narrow", "select", "unsqueeze", "squeeze")


class CannotStreamError(RuntimeError):
    """A write through a view of a deferred map: the computation has to run plain."""


class _Hold:
    """A tensor's claim on its node, given back when the tensor goes."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.viewed = False
        node.users += 1

    def become(self, node: Node) -> None:
        node.users += 1
        self.node.users -= 1
        self.node = node

    def __del__(self) -> None:
        self.node.users -= 1


class LazyTensor(Tensor):
    """Stands for the feature map of a node; its shape, type and device are known, its values may not be yet."""

    _hold: _Hold
    report: dict[str, int]

    @staticmethod
    def __new__(cls, hold: _Hold, report: dict[str, int]) -> LazyTensor:
        node = hold.node
        tensor = Tensor._make_wrapper_subclass(cls, node.shape, dtype=node.dtype, device=node.device)
        tensor._hold = hold
        tensor.report = report
        return tensor

    @classmethod
    def of(cls, node: Node, report: dict[str, int]) -> LazyTensor:
        return cls(_Hold(node), report)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        state = "stored" if self._hold.node.rows is not None else "deferred"
        return f"LazyTensor({tuple(self.shape)}, {self.dtype}, {state})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        first: Any = args[0] if args else None
        if name in operators.SAME and isinstance(first, LazyTensor):
            return LazyTensor(first._hold, first.report)  # one map: what is written into either is seen in both
        lazy = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, LazyTensor)]
        in_place = name.endswith("_") and not name.startswith("_") and isinstance(first, LazyTensor)
        if in_place and first._hold.viewed:
            raise CannotStreamError(f"{name} writes through a view")
        nodes = None
        if kwargs.get("out") is None:
            deferred = tree_map(
                lambda value: value._hold.node if isinstance(value, LazyTensor) else value, (args, kwargs)
            )
            nodes = operators.build(func, *deferred)
            del deferred
        report = lazy[0].report
        if nodes is None:
            return _whole(func, name, first if in_place else None, args, kwargs, report)
        if in_place:
            if nodes[0].shape != tuple(first.shape) or nodes[0].dtype != first.dtype:
                return _whole(func, name, first, args, kwargs, report)
            first._hold.become(nodes[0])
            return first
        results = [LazyTensor.of(node, report) for node in nodes]
        if name in _VIEWS:
            for tensor in (*results, *lazy):
                tensor._hold.viewed = True
        return results if name in _SEVERAL else results[0]


def evaluated(value: Any) -> Any:
    """`value`, or the tensor that it stands for; outside inference mode none that belongs to it."""
    if isinstance(value, LazyTensor):
        value = engine.whole(value._hold.node)
    own = isinstance(value, Tensor) and value.is_inference() and not torch.is_inference_mode_enabled()
    return value.clone() if own else value


def _whole(func: Any, name: str, target: Any, args: Any, kwargs: Any, report: dict[str, int]) -> Any:
    """Run `func` on evaluated tensors; feature maps that come of it are lazy again."""
    report[name] = report.get(name, 0) + 1
    args, kwargs = tree_map(evaluated, (args, kwargs))
    if target is not None:
        args = (args[0].clone(), *args[1:])  # other steps may read the stored map as it is
    result = func(*args, **kwargs)
    if target is not None:
        target._hold.become(operators.leaf(result))
        return target
    return tree_map(lambda value: _lazy_again(value, report), result)


def _lazy_again(value: Any, report: dict[str, int]) -> Any:
    maps = isinstance(value, Tensor) and not isinstance(value, LazyTensor) and value.dim() in (4, 5)
    return LazyTensor.of(operators.leaf(value), report) if maps and value.is_floating_point() else value
