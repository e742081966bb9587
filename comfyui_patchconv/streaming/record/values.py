"""The values of deferred tensors: when they are demanded, and what the program has of them then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from ..errors import CannotEstimateError
from ..graph.node import Node, ancestors, dense_strides, in_order
from .arguments import mapped, tensors_in
from .held import is_ordinary
from .lazy import Cell, LazyTensor, View
from .marks import plain
from .program import Program
from .shapes import Spec

_COPIED = 4
"""Copies may take one of so many parts of what eager's maps take."""

_LEAST_COPIED = 1 << 20
"""Bytes of copies that are always kept."""


class Evaluate(Protocol):
    """Stores nodes: plans them and runs the plan. keep: nodes on the way to them that the program may still ask for."""

    def __call__(self, roots: Sequence[Node], keep: Sequence[Node]) -> None: ...


class Values(Program):
    """Has the values of a program's tensors. evaluate: stores nodes. budget: bytes that these may take; None for any
    number, and where ranks have budgets of their own, for all evaluate at once. note_made: called with large nodes that
    are stored without it."""

    evaluate: Evaluate
    budget: Optional[int] = None
    note_made: Optional[Callable[[Node], None]] = None

    def store(self, nodes: Iterable[Node]) -> None:
        """Have the values of nodes."""
        roots = list(dict.fromkeys(node for node in nodes if node.tensor is None))
        if roots:
            self.evaluate(roots, self._kept(roots))

    def _kept(self, roots: Sequence[Node]) -> list[Node]:
        """What the program may still ask for of the way to `roots`, for itself or for what it is computed into."""
        live: set[Node] = set()
        for tensor in self.held():
            cell, known = tensor.view_.cell, tensor.view_._known
            live.update(node for node in (cell.value, known) if node is not None and node.tensor is None)
        way = set(ancestors(roots))
        kept = live & way
        for node in ancestors(live - way):
            if node not in way:
                kept.update(source for source in node.inputs if source in way)
        return sorted(kept.difference(roots), key=lambda node: node.serial)

    def before_write(self, tensor: Tensor) -> None:
        """Something is about to be written to the memory of `tensor`: deferred steps that read it get a copy, which
        eager does not have. So that a call takes no more than eager, the copies that it keeps may take a part of what
        eager's maps take, or of a budget; where they would take more, the steps are evaluated first."""
        with self._lock:
            most = self.eager_peak if self.budget is None else min(self.eager_peak, self.budget)
            if not self.phantom and self.memory.copies_more(tensor, max(most // _COPIED, _LEAST_COPIED)):
                self.store(self._reading(tensor))
            self.memory.before_write(tensor)

    def _reading(self, tensor: Tensor) -> list[Node]:
        """The nodes of the program's tensors that are made of the memory of `tensor`: of weights, which steps hold, it
        is not known which these are, so it is all of them."""
        cells = (one.view_.cell for one in self.held())
        roots = [cell.value for cell in cells if cell.value is not None and cell.value.tensor is None]
        readers = self.memory.readers_of(tensor)
        if not all(isinstance(reader, Node) for reader in readers):
            return roots
        made = set(readers)
        for node in ancestors(roots):
            if not made.isdisjoint(node.inputs):
                made.add(node)
        return [root for root in roots if root in made]

    def real(self, tensor: LazyTensor) -> Tensor:
        """The values of a deferred tensor, in the memory that it shares with others if that is real."""
        if tensor.view_.cell.real is not None:
            return tensor.view_.real()
        node = tensor.view_.node()
        self.store([node])
        return self._laid_out(node.tensor, tensor.view_.spec)

    def _laid_out(self, value: Tensor, spec: Spec) -> Tensor:
        """A value in the order in which eager has it in memory: what operators give goes by that. A write may have left
        it in another."""
        dense = dense_strides(spec.shape, spec.strides)
        if dense is None or in_order(value, spec.strides):
            return _with_strides(value, spec.strides)
        with self.as_called():
            laid = torch.empty_strided(spec.shape, dense, dtype=value.dtype, device=value.device)
        return laid.copy_(value)

    def with_values(self, values: Any) -> Any:
        """Arguments with ordinary tensors, which nothing else will write to, in the place of deferred ones."""

        def copied(value: Any) -> Any:
            if not isinstance(value, LazyTensor):
                return value
            if self.phantom:
                raise CannotEstimateError("the program looks at values")
            with self._lock, torch.no_grad():
                return self.real(value).clone()

        return mapped(copied, values)

    def real_or_same(self, value: Any) -> Any:
        return self.real(value) if isinstance(value, LazyTensor) else value

    def _make_real(self, tensors: Iterable[LazyTensor]) -> None:
        """Give the cells of these tensors memory that others can reach."""
        cells = list(dict.fromkeys(tensor.view_.cell for tensor in tensors if tensor.view_.cell.real is None))
        self.store([cell.value for cell in cells if cell.value is not None])
        for cell in cells:
            node = cell.value
            assert node is not None
            whole = cell.whole
            kept: Tensor = node.tensor
            cell.value = None
            mine = kept.shape == whole.shape and kept.stride() == whole.strides
            if not mine or self._is_shared(node, cell):
                with self.as_called():
                    kept = torch.empty_strided(whole.shape, whole.strides, dtype=whole.dtype, device=node.device)
                kept.copy_(node.tensor)
            else:
                self.memory.watch(node)
            cell.real = kept

    def _is_shared(self, node: Node, cell: Cell) -> bool:
        """Whether the memory of `node`, the value of `cell`, is that of other nodes or cells, or the program's, too."""
        if node.home is not None:
            return True
        storage = node.tensor.untyped_storage()._cdata
        if self.memory.is_read(node.tensor, but_by=node):
            return True
        for other in {one.view_.cell for one in self.held()}:
            if other is cell:
                continue
            value = other.real if other.real is not None else other.value.tensor if other.value is not None else None
            if value is not None and value.untyped_storage()._cdata == storage:
                return True
        return False

    def become_ordinary(self, tensors: Sequence[LazyTensor], gives: bool = False) -> None:
        """Make ordinary tensors of deferred ones, the same objects, where torch can; from torch 2.3 on.

        gives: others may write to their memory from now on without an operator.
        """
        with self._lock:
            self._make_real(tensors)
            for tensor in tensors if gives else ():
                self.memory.give(tensor.view_.real())
            for tensor in tensors:
                self.replace_by(tensor, tensor.view_.real())

    def replace_by(self, tensor: LazyTensor, real: Tensor) -> None:
        """Make an ordinary tensor of a deferred one, the same object, that has the memory of `real`."""
        mine = real.detach()  # never the caller's own object
        self._tensors.pop(id(tensor), None)
        _become(tensor, mine)

    def finish(self, only_computed: bool = False) -> None:
        """The call is over: what the program still has becomes ordinary, all evaluated in one go. only_computed: what
        is not computed yet stays deferred."""
        held = self.held()
        self.become_ordinary([one for one in held if _has_memory(one.view_.cell)] if only_computed else held)

    # Operators that look at values

    def now(self, func: Any, args: Any, kwargs: dict[str, Any], spec: Any = None) -> Any:
        """Run an operator on values; tensors that come of it are deferred ones again. spec: see `_again`."""
        tensors = tensors_in((args, kwargs))
        lazies = [value for value in tensors if isinstance(value, LazyTensor)]
        name = func.overloadpacket.__name__
        if name == "_has_compatible_shallow_copy_type":  # `plain.data = map`, which would take memory that is not there
            return False
        if self.phantom:
            raise CannotEstimateError(f"{name} looks at values")
        nodes = [value.view_.node() for value in lazies]
        if any(node.tensor is None and node.bytes >= self.small for node in nodes):
            self.report[name] = self.report.get(name, 0) + 1
        self.store(nodes)
        del nodes
        values = {id(value): plain(self.real(value)) for value in lazies}
        result = self._result(func, args, kwargs, values)
        made = {one.untyped_storage()._cdata for one in tensors_in([result]) if is_ordinary(one)}
        shown = [
            one for one in lazies if one.view_.cell.real is None and values[id(one)].untyped_storage()._cdata in made
        ]
        if shown:  # it gives views, which are to be of what is written to
            self._make_real(shown)
            values = {id(value): plain(self.real(value)) for value in lazies}
            result = self._result(func, args, kwargs, values)
        ordinary = {
            one.untyped_storage()._cdata for one in tensors if not isinstance(one, LazyTensor) and is_ordinary(one)
        }
        return mapped(lambda value: self._again(value, lazies, values, ordinary, spec), result)

    def _result(self, func: Any, args: Any, kwargs: Any, values: dict[int, Tensor]) -> Any:
        with self.as_called():
            return func(
                *mapped(lambda value: values.get(id(value), value), args),
                **mapped(lambda value: values.get(id(value), value), kwargs),
            )

    def _again(
        self, value: Any, lazies: list[LazyTensor], values: dict[int, Tensor], ordinary: set[int], spec: Any = None
    ) -> Any:
        """A tensor that came of some, deferred: a view of one of them, or memory of its own.

        ordinary: whose memory is that of tensors that were none: what looks into that is none either. spec: what
        eager's looks like, where that is known.
        """
        if not isinstance(value, Tensor) or not is_ordinary(value):
            return value
        storage = value.untyped_storage()._cdata
        if storage in ordinary:
            return value
        for one in lazies:
            if values[id(one)] is value:
                return one
        for one in lazies:
            if values[id(one)].untyped_storage()._cdata == storage:
                self._make_real([one])
                real = one.view_.cell.real
                assert real is not None
                if real.untyped_storage()._cdata != storage:  # memory of its own now
                    with self.as_called():
                        value = value.clone()
                    break
                return self._view_of_memory(one, value)
        known = isinstance(spec, Spec) and spec.alias is None and spec.shape == value.shape
        if known and spec.strides != value.stride():
            with self.as_called():
                kept = torch.empty_strided(spec.shape, spec.strides, dtype=value.dtype, device=value.device)
            value = kept.copy_(value)
        node = self.node(None, (), (), Spec.of(value), value.device, None)
        node.tensor = value.detach()
        made = self.own(node, Spec.of(value)._replace(offset=0))
        if self.note_made is not None and node.bytes >= self.small:
            self.note_made(node)
        return made

    def _view_of_memory(self, one: LazyTensor, value: Tensor) -> LazyTensor:
        """A deferred tensor that shows what `value` does, which lies in the memory of `one`."""
        place, shown = int(value.storage_offset()), one.view_
        spec = Spec.of(value)._replace(offset=place - int(shown.real().storage_offset()) + shown.spec.offset)
        where = tuple(value.shape), tuple(value.stride()), place
        return LazyTensor(View(shown.cell, spec, shown.device, shown, torch.ops.aten.as_strided.default, where))


def _has_memory(cell: Cell) -> bool:
    return cell.real is not None or (cell.value is not None and cell.value.tensor is not None)


def _with_strides(value: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values with eager's strides of dimensions of one place, by which some operators tell what lies last."""
    alike = [one == other or side == 1 for one, other, side in zip(value.stride(), strides, value.shape)]
    if value.stride() == tuple(strides) or not all(alike):
        return value
    return value.as_strided(value.shape, strides, value.storage_offset())


def _become(tensor: Any, real: Tensor) -> None:
    """Make an ordinary tensor of a deferred one. It stays what it is, and computes as `real` does, with a torch that
    cannot do that, and where something has a weak reference to it, as a profiler that records shapes has."""
    swap: Optional[Callable[[Tensor, Tensor], None]] = getattr(torch._C, "_swap_tensor_impl", None)
    if swap is None:
        return
    kept = {name: tensor.__dict__.pop(name) for name in ("original_", "view_") if name in tensor.__dict__}
    try:
        swap(tensor, real)
    except RuntimeError:
        tensor.__dict__.update(kept)
    else:
        tensor.__class__ = Tensor
