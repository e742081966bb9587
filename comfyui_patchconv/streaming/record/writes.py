"""Writes: into deferred tensors, whose cells get other nodes, and into memory that others can reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CannotEstimateError
from ..graph.node import Node, dense_strides
from . import operators, views
from .arguments import are_usual, mapped, spec_of, tensors_in, written_by
from .held import is_ordinary
from .lazy import LazyTensor, View, take_shape
from .marks import plain
from .schema import Operator, draws, operator_of, written_unsaid
from .shapes import Spec, specs_of
from .values import Values


class Writes(Values):
    """Does what operators do that write."""

    def write(self, func: Any, operator: Operator, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operator gives that writes to one or more of its arguments."""
        if operator.reshapes:
            return self._reshape(func, args, kwargs)
        targets = written_by(operator, args, kwargs)
        target: Any = targets[0] if len(targets) == 1 else None
        usual = isinstance(target, LazyTensor) and operator.functional is not None and args and args[0] is target
        if usual and target.view_.cell.real is None and self._write_deferred(func, operator, target, args, kwargs):
            return target
        return self._write_now(func, targets, args, kwargs)

    def _reshape(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operator gives that changes its argument's shape."""
        lazies = [value for value in tensors_in(args) if isinstance(value, LazyTensor)]
        originals = [value.original_ for value in lazies if hasattr(value, "original_")]
        self.become_ordinary(lazies)
        for original in originals:  # the caller's own object changes its shape, too
            func(original, *args[1:], **kwargs)
        with self.as_called():
            reals = {id(value): self.real(value).detach() for value in lazies if isinstance(value, LazyTensor)}
            result = func(*mapped(lambda value: reals.get(id(value), value), args), **kwargs)
        target = args[0]
        if not isinstance(target, LazyTensor):
            return result
        self.show(target, reals[id(target)])  # an older torch could make no ordinary tensor of it
        return target

    def show(self, target: LazyTensor, real: Tensor) -> None:
        """Have a deferred tensor that stays one be `real`, of whatever shape but as many bytes at most."""
        take_shape(target, real)
        target.view_ = self.defer(real).view_

    def writes_unsaid(self, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether an operator writes to arguments though its schema does not say so; these are made ready for it."""
        if not operator_of(func).unsaid:
            return False
        targets = written_unsaid(func, args, kwargs)
        if self.phantom:
            return bool(targets)
        self._make_real([value for value in targets if isinstance(value, LazyTensor)])
        for value in targets:
            self.before_write(self.real_or_same(value))
        return bool(targets)

    def _write_deferred(self, func: Any, operator: Operator, target: LazyTensor, args: Any, kwargs: Any) -> bool:
        """Give the cell of `target` its new value; whether that could be done."""
        if (operator.draws and draws(func, args, kwargs)) or not are_usual(tensors_in(args)) or kwargs:
            return False
        if specs_of(func, args, kwargs, spec_of) is None:  # eager refuses it, and says so
            return False
        view = target.view_
        if operator.name in ("copy_", "fill_", "zero_"):
            node = views.filled(self, view, self.operands(args[1:2]))
        else:
            spec = specs_of(operator.functional, args, kwargs, spec_of)
            if not isinstance(spec, Spec) or spec.shape != view.spec.shape:
                return False
            if not torch.can_cast(spec.dtype, view.spec.dtype):  # eager refuses it; tensors without values may not
                return False
            if spec.alias == 0:  # dropout of nothing
                return True
            operands = self.operands(args)
            node = operators.build(self, operator.functional, operands, kwargs, spec, view.device, func)
            if node is None:
                node = self.whole(operator.functional, operands, kwargs, spec, view.device)
            if spec.dtype != view.spec.dtype:
                node = views.cast(self, node, view.spec)
        if node is None:
            return False
        return self._assign(view, node)

    def _assign(self, view: View, node: Node) -> bool:
        """From now on `view` shows `node`, and other views of its cell what follows from that."""
        cell, current = view.cell, view
        while current.parent is not None:
            before = cell.value if current.parent.parent is None else current.parent.node()
            assert before is not None
            changed = views.scattered(self, current, before, node)
            if changed is None:
                return False
            current, node = current.parent, changed
        cell.value = node
        cell.version += 1
        return True

    def _write_now(self, func: Any, targets: list[Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator that writes, on real memory."""
        if self.phantom:
            raise CannotEstimateError(f"{func} writes into memory that others can reach")
        self._make_real([value for value in targets if isinstance(value, LazyTensor)])
        if func.overloadpacket.__name__ == "copy_" and self._compute_into(targets[0], args[1]):
            return targets[0]
        # What it reads is evaluated before anything is written.
        others = [value for value in tensors_in((args, kwargs)) if isinstance(value, LazyTensor)]
        self.store([value.view_.node() for value in others if value.view_.cell.real is None])
        # Apart from the cell's own, whose shape shall stay.
        reals = {id(value): self.real(value).detach() for value in others}
        name = func.overloadpacket.__name__
        if any(value.view_.cell.real is None for value in others):
            self.report[name] = self.report.get(name, 0) + 1
        for value in targets:
            if isinstance(value, Tensor):
                self.before_write(reals.get(id(value), value))
        values = {key: plain(real) for key, real in reals.items()}
        lazies = {id(values[id(value)]): value for value in others}

        def value_of(value: Any) -> Any:
            return values[id(value)] if isinstance(value, LazyTensor) else value

        with self.as_called():
            result = func(*mapped(value_of, args), **mapped(value_of, kwargs))
            written = {id(value): value for value in targets if isinstance(value, LazyTensor)}
            for key in written:
                if reals[key] is not values[key]:
                    reals[key].copy_(values[key])
        for key, value in written.items():
            if reals[key].shape != value.view_.spec.shape:
                self._take_shape(value, reals[key])
        return mapped(lambda value: lazies.get(id(value), value), result)

    def _take_shape(self, target: LazyTensor, real: Tensor) -> None:
        """`out=` of another shape than the result's takes that, in the memory that it had, which other views keep."""
        original = getattr(target, "original_", None)
        if original is not None:  # the caller's own object does so, too
            with self.as_called():
                original.set_(real)
        self.replace_by(target, real)
        if isinstance(target, LazyTensor):
            self.show(target, real.detach())

    def _compute_into(self, target: Any, source: Any) -> bool:
        """Compute a map where the program copies it to, rather than beside it; whether that could be done."""
        if not isinstance(source, LazyTensor) or source.view_.cell.real is not None:
            return False
        memory, node = self.real_or_same(target), source.view_.node()
        if node.tensor is not None or not is_ordinary(memory) or memory.requires_grad:
            return False
        alike = (*memory.shape,) == node.shape and memory.dtype == node.dtype and memory.device == node.device
        if not alike or dense_strides(memory.shape, memory.stride()) is None or self.memory.is_read(memory):
            return False
        self.before_write(memory)
        node.home = memory.detach()
        done = False
        try:
            self.store([node])
            made: Any = node.tensor
            done = made.data_ptr() == memory.data_ptr() and made.stride() == memory.stride()
        finally:
            if not done:  # eager was better, or the call was stopped: what comes later has no business there
                node.home = None
        return done

    def replace_data(self, func: Any, target: Tensor, value: Any) -> None:
        """`target.data = value`: the same object, with other memory."""
        if not (isinstance(target, LazyTensor) and self._is_alike(target, value)):
            value = self._ordinary(value)
        if not isinstance(target, LazyTensor):
            func(target, value)
            return
        original = getattr(target, "original_", None)
        if original is not None:
            value = self._ordinary(value)
            original.data = value
            value = original
        if self._is_alike(target, value):
            shown = value if isinstance(value, LazyTensor) else self.defer(value)
            target.view_ = shown.view_
            return
        self.become_ordinary([target])
        if not isinstance(target, LazyTensor):
            target.data = value
        elif target.dtype == value.dtype:
            self.show(target, value)
        else:
            raise RuntimeError(
                f"data of {value.dtype} cannot take the place of a map's of {target.dtype} in a streamed call with a "
                "torch older than 2.3: update torch, or stream another part."
            )

    def _ordinary(self, value: Any) -> Any:
        """A deferred tensor made ordinary; its values before torch 2.3, where no object becomes another."""
        if isinstance(value, LazyTensor):
            self.become_ordinary([value])
        return self.real(value).detach() if isinstance(value, LazyTensor) else value

    def _is_alike(self, target: LazyTensor, value: Any) -> bool:
        """Whether an object that was made for the one can stand for the other."""
        spec, other = target.view_.spec, spec_of(value)
        return other is not None and spec[:2] == other[:2] and spec.dtype == other.dtype
