"""A tensor whose operations wait until a normalisation, an unknown operator or the end asks for their result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from . import engine, operators, tokens
from .aliases import Hold, looks
from .errors import CannotStreamError
from .graph import Blank, Node
from .rows import Rows
from .run import Run
from .scores import Scores

_VIEWS = (
    *tokens.SEVERAL, *(name for name in operators.ARRANGING if name != "repeat"), "slice", "narrow", "select",
    "unsqueeze", "squeeze",
)  # fmt: skip

_BLANK = ("empty_like", "new_empty")
"""What makes a map for others to write parts of: its rows wait as well."""

_NEW = (
    *_BLANK, "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full",
)  # fmt: skip
"""What makes a tensor of its own, whatever the values of its argument: nothing to put off."""


class LazyTensor(Tensor):
    """Stands for the feature map of a node; its shape, type and device are known, its values may not be yet.

    _layout: None for the map as it is, else how this tensor looks at it (see `tokens`).
    """

    _hold: Hold
    _layout: Optional[Tensor]

    @staticmethod
    def __new__(cls, hold: Hold, layout: Optional[Tensor] = None) -> LazyTensor:
        node = hold.node
        shape = node.shape if layout is None else tokens.shape_of(layout)
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=node.dtype, device=node.device)
        tensor._hold, tensor._layout = hold, layout
        return tensor

    @classmethod
    def of(cls, node: Node, layout: Optional[Tensor] = None, original: Optional[Tensor] = None) -> LazyTensor:
        return cls(Hold(node, original), layout)

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
        if in_place:
            first._hold.require_writable(name)
        if name in _NEW:
            return _new(func, name, args, kwargs, lazy[0])
        results = None if any(tensor._hold.exposed for tensor in lazy) else _deferred(func, args, kwargs, lazy)
        if results is None:
            run = lazy[0]._hold.node.run
            return _whole(func, name, first if in_place else None, args, kwargs, run)
        if in_place:
            result = results[0]
            if (result.shape, result.dtype, result.device) != (first.shape, first.dtype, first.device):
                return _whole(func, name, first, args, kwargs, first._hold.node.run)
            first._hold.write(result._hold.node)
            return first
        if name in _VIEWS and isinstance(first, LazyTensor):
            _link(first, results, func, args[1:], kwargs)
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


def _new(func: Any, name: str, args: Any, kwargs: Any, like: LazyTensor) -> Tensor:
    """A tensor of its own, of the shape, type and device of `like` unless others are given."""
    run, args = like._hold.node.run, tree_map(_without_values, args)
    if name in _BLANK and run.plan.blanks:
        with _disable_current_modes():
            shape = func(*tree_map(operators.as_meta, args), **{**kwargs, "device": torch.device("meta")})
        if shape.dim() in (4, 5) and shape.is_floating_point():
            device = operators.placed(kwargs.get("device") or like.device, like.device)
            return LazyTensor.of(Node(run, shape.shape, shape.dtype, device, Blank(shape, device)))
    return func(*args, **kwargs)


def _link(base: LazyTensor, results: list[LazyTensor], func: Any, args: Any, kwargs: Any) -> None:
    """`results` are views of `base`: a write into one of them is seen in all."""
    known: Any = [None] * len(results)
    if all(tensor._layout is None for tensor in (base, *results)):
        with _disable_current_modes():
            known = looks(func, base.shape, *tree_map(_without_values, (args, kwargs)))
    for result, look in zip(results, known):
        base._hold.link(result._hold, look)
        result._hold.laid_out = result._layout is not None


def _node(value: Any) -> Any:
    return value._hold.node if isinstance(value, LazyTensor) else value


def _viewed(value: Any) -> Any:
    if not isinstance(value, LazyTensor):
        return value
    node = value._hold.node
    return node, tokens.layout_of(node) if value._layout is None else value._layout


def finish(tensors: list[LazyTensor], written: Iterable[tuple[Tensor, Hold]]) -> None:
    """Evaluate what a computation returns or leaves behind, and what it has `written` to its arguments, in one pass."""
    written = list(written)
    holds = [tensor._hold for tensor in tensors if tensor._hold not in [hold for _, hold in written]]
    engine.finish([hold.node for hold in holds], [(tensor, hold.node) for tensor, hold in written])
    for tensor, hold in written:
        hold.become(Node.of(tensor, hold.node.run, counted=False))


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
    elif target is not None:
        run.origins.before_write(args[0], name)
    result = func(*args, **kwargs)
    if target is not None:
        if not target._hold.exposed:
            target._hold.write(Node.of(result, run))
            run.note(0, 0, 0)
        return target
    result = tree_map(lambda value: _lazy_again(value, run, lazy), result)
    run.note(0, 0, 0)
    return result


def is_plain_map(value: Any) -> bool:
    """Whether a value is a feature map that is not deferred."""
    tensor = isinstance(value, Tensor) and type(value) is not LazyTensor
    return tensor and value.dim() in (4, 5) and value.is_floating_point()


class PlainMaps:
    """Maps that something evaluated whole left plain, deferred again, and who reads them: before something is written
    to one, its readers get a copy of it as it is."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._nodes: dict[int, dict[Any, ref[Node]]] = {}  # by the storage, then by where in it a map lies

    def defer(self, value: Tensor) -> Tensor:
        """A plain map, deferred; anything else as it is."""
        if not is_plain_map(value):
            return value
        nodes = self._nodes.setdefault(value.untyped_storage()._cdata, {})
        place = value.storage_offset(), value.shape, value.stride(), value.dtype
        node = nodes[place]() if place in nodes else None
        if node is None or node.rows is None or not node.rows.is_complete:  # a pass gives rows up as it reads them
            node = Node.of(value.detach(), self._run, counted=False, of_map=False)
            nodes[place] = ref(node)
        return LazyTensor.of(node)

    def before_write(self, storage: int) -> None:
        """Something is about to be written to the memory of a storage."""
        for reference in self._nodes.pop(storage, {}).values():
            node = reference()
            if node is not None and node.rows is not None:
                node.rows = Rows.of(node.rows.whole().clone(), self._run)


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
            if hold.viewed or hold.others:
                run.origins.stands_alone(value)
            _expose(hold, run)
        return value
    result = LazyTensor.of(Node.of(value, run))
    for hold in owners:
        for one in (hold, *hold.others, result._hold):
            one.viewed = True
    return result


def _shares_memory(value: Tensor, node: Node) -> bool:
    stored = None if node.rows is None else node.rows.tensor
    return stored is not None and stored.untyped_storage()._cdata == value.untyped_storage()._cdata


def _expose(hold: Hold, run: Run) -> None:
    """From now on the tensor may change from outside; what waits for the map keeps a copy of it as it is."""
    hold.exposed, node = True, hold.node
    if node.users > 1:
        stored = engine.whole(node)
        hold.become(Node.of(stored, run))
        node.rows = Rows.of(stored.clone(), run)
