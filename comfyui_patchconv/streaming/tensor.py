"""A tensor whose operations wait until a normalisation, an unknown operator or the end asks for their result."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from . import engine, operators, tokens
from .errors import CannotStreamError
from .graph import Node
from .rows import Rows
from .run import Run
from .scores import Scores

_VIEWS = (*tokens.SEVERAL, *operators.ARRANGING, "slice", "narrow", "select", "unsqueeze", "squeeze")

_NEW = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full")
"""What makes a tensor of its own, often to write parts of it: nothing to put off."""


class _Hold:
    """A tensor's claim on its node, given back when the tensor goes.

    viewed: other deferred tensors look at the same map; a write would have to reach them. exposed: a plain tensor
    shares the memory of the map, and may be written to at any time; nothing that reads it is put off.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.viewed = self.exposed = False
        node.users += 1

    def become(self, node: Node) -> None:
        node.users += 1
        self.node.users -= 1
        self.node = node

    def __del__(self) -> None:
        self.node.users -= 1


class LazyTensor(Tensor):
    """Stands for the feature map of a node; its shape, type and device are known, its values may not be yet.

    _layout: None for the map as it is, else how this tensor looks at it (see `tokens`).
    """

    _hold: _Hold
    _layout: Optional[Tensor]

    @staticmethod
    def __new__(cls, hold: _Hold, layout: Optional[Tensor] = None) -> LazyTensor:
        node = hold.node
        shape = node.shape if layout is None else layout.shape
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=node.dtype, device=node.device)
        tensor._hold, tensor._layout = hold, layout
        return tensor

    @classmethod
    def of(cls, node: Node, layout: Optional[Tensor] = None) -> LazyTensor:
        return cls(_Hold(node), layout)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        state = "stored" if self._hold.node.rows is not None else "deferred"
        return f"LazyTensor({tuple(self.shape)}, {self.dtype}, {state})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        first: Any = args[0] if args else None
        if isinstance(first, LazyTensor) and operators.keeps(func, args, kwargs):
            # Where plain may have a copy instead, of another memory format, a write into either runs plain.
            first._hold.viewed |= kwargs.get("memory_format") is not None
            return LazyTensor(first._hold, first._layout)  # one map: what is written into either is seen in both
        lazy = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, LazyTensor)]
        writes = operators.writes(name)
        if kwargs.get("out") is not None or (writes and not isinstance(first, LazyTensor)):
            return _into_plain(func, name, args, kwargs, lazy[0]._hold.node.run)
        in_place = writes and isinstance(first, LazyTensor)
        if in_place and first._hold.viewed:
            raise CannotStreamError(f"{name} writes through a view")
        if name in _NEW:
            return func(*tree_map(_without_values, args), **kwargs)
        results = None if any(tensor._hold.exposed for tensor in lazy) else _deferred(func, args, kwargs, lazy)
        if results is None:
            run = lazy[0]._hold.node.run
            return _whole(func, name, first if in_place else None, args, kwargs, run)
        if in_place:
            result = results[0]
            if result.shape != first.shape or result.dtype != first.dtype:
                return _whole(func, name, first, args, kwargs, first._hold.node.run)
            first._hold.become(result._hold.node)
            return first
        if name in _VIEWS:
            for tensor in (*results, *lazy):
                tensor._hold.viewed = True
        return results if name in tokens.SEVERAL else results[0]


def _deferred(func: Any, args: Any, kwargs: Any, lazy: list[LazyTensor]) -> Optional[list[LazyTensor]]:
    """What `func` returns, not computed yet; None where it has to be."""
    if all(tensor._layout is None for tensor in lazy):
        nodes = operators.build(func, *tree_map(_node, (args, kwargs)))
        if nodes is not None:
            return [LazyTensor.of(node) for node in nodes]
    viewed = tokens.build(func, *tree_map(_viewed, (args, kwargs)))
    if viewed is None:
        return None
    return [LazyTensor.of(node, None if tokens.is_map(node, layout) else layout) for node, layout in viewed]


def _node(value: Any) -> Any:
    return value._hold.node if isinstance(value, LazyTensor) else value


def _viewed(value: Any) -> Any:
    if not isinstance(value, LazyTensor):
        return value
    node = value._hold.node
    return node, tokens.layout_of(node) if value._layout is None else value._layout


def finish(tensors: list[LazyTensor]) -> None:
    """Evaluate what a computation returns or leaves behind, in one pass."""
    engine.finish([tensor._hold.node for tensor in tensors])


def evaluated(value: Any) -> Any:
    """`value`, or the tensor that it stands for; outside inference mode none that belongs to it."""
    if isinstance(value, LazyTensor):
        tensor = engine.whole(value._hold.node)
        value = tensor if value._layout is None else tokens.evaluated(tensor, value._layout)
    own = isinstance(value, Tensor) and value.is_inference() and not torch.is_inference_mode_enabled()
    return value.clone() if own else value


def _into_plain(func: Any, name: str, args: Any, kwargs: Any, run: Run) -> Any:
    """Run `func`, which writes into a tensor that is not deferred."""
    if any(isinstance(value, LazyTensor) for value in tree_flatten(kwargs.get("out"))[0]):
        raise CannotStreamError(f"{name} writes into an argument")
    run.report[name] = run.report.get(name, 0) + 1
    args, kwargs = tree_map(evaluated, (args, kwargs))
    return func(*args, **kwargs)


def _whole(func: Any, name: str, target: Any, args: Any, kwargs: Any, run: Run) -> Any:
    """Run `func` on evaluated tensors; feature maps that come of it are lazy again."""
    if target is not None and target._layout is not None:
        raise CannotStreamError(f"{name} writes through a view")
    lazy = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, LazyTensor)]
    if name == "bmm":
        engine.expect_reads([tensor._hold.node for tensor in lazy])
    args, kwargs = tree_map(evaluated, (args, kwargs))
    if name == "bmm" and not kwargs:
        return func(*args) if any(isinstance(value, Scores) for value in args) else Scores(*args)
    run.report[name] = run.report.get(name, 0) + 1
    if target is not None and not target._hold.exposed:
        args = (args[0].clone(), *args[1:])  # other steps may read the stored map as it is
    result = func(*args, **kwargs)
    if target is not None:
        if not target._hold.exposed:
            target._hold.become(Node.of(result, run))
            run.note(0, 0, 0)
        return target
    result = tree_map(lambda value: _lazy_again(value, run, lazy), result)
    run.note(0, 0, 0)
    return result


def _without_values(value: Any) -> Any:
    """A tensor of the shape, type and device of a deferred one, in next to no memory."""
    if not isinstance(value, LazyTensor):
        return value
    return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)


def _lazy_again(value: Any, run: Run, sources: list[LazyTensor]) -> Any:
    """A feature map that came of `sources`, stored; anything else as it is."""
    if not isinstance(value, Tensor) or isinstance(value, LazyTensor):
        return value
    owners = [source._hold for source in sources if _shares_memory(value, source._hold.node)]
    if value.dim() not in (4, 5) or not value.is_floating_point():
        for hold in owners:
            if hold.viewed:
                run.origins.stands_alone(value)
            _expose(hold, run)
        return value
    result = LazyTensor.of(Node.of(value, run))
    for hold in owners:
        hold.viewed = result._hold.viewed = True
    return result


def _shares_memory(value: Tensor, node: Node) -> bool:
    stored = None if node.rows is None else node.rows.tensor
    return stored is not None and stored.untyped_storage()._cdata == value.untyped_storage()._cdata


def _expose(hold: _Hold, run: Run) -> None:
    """From now on the tensor may change from outside; what waits for the map keeps a copy of it as it is."""
    hold.exposed, node = True, hold.node
    if node.users > 1:
        stored = engine.whole(node)
        hold.become(Node.of(stored, run))
        node.rows = Rows.of(stored.clone(), run)
