"""What each operator of the program adds to the graph, and what happens where a value is demanded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

from ..errors import CannotEstimateError
from ..graph.node import Node, ancestors, dense_strides, in_order
from ..graph.steps import Whole
from . import operators, views
from .arguments import (
    are_usual,
    device_given,
    device_of,
    has_no_values,
    is_dense,
    mapped,
    mixes_devices,
    nowhere,
    numel,
    spec_of,
    tensors_in,
    written_by,
)
from .lazy import Cell, LazyTensor, View, recorder_of
from .memory import Held, Memory, is_ordinary
from .schema import Operator, draws, gives_back, operator_of
from .shapes import SIMPLE, Spec, load, specs_of

_SMALL = 1 << 16
"""Bytes of results below which what is stored already is computed at once."""

_LARGE = 1 << 20
"""Bytes of an ordinary map from which what a decoder does to maps is deferred, though no argument is."""


class Evaluate(Protocol):
    """Stores nodes: plans them and runs the plan. keep: nodes on the way to them that the program may still ask for."""

    def __call__(self, roots: Sequence[Node], keep: Sequence[Node]) -> None: ...


class Recorder(TorchDispatchMode):
    """Records what happens to deferred tensors within its `with` block.

    evaluate: stores nodes. report: counts operators that are evaluated whole. phantom: tensors have no values; nothing
    can be demanded. device: where tensors of such an estimate are meant to be; its weights are on meta. small: bytes of
    results below which what is stored already is computed at once. inference, gradients: whether the caller was in
    inference mode, and had gradients on. deferred: how many operators were called that rows are known of. alive,
    eager_peak: bytes of the program's tensors now and at the worst moment, as eager has them; peak_since: at the worst
    one since somebody set it back.
    """

    def __init__(self, evaluate: Evaluate, report: dict[str, int], phantom: bool = False, small: int = _SMALL) -> None:
        super().__init__()
        load()
        self.report, self.phantom, self.memory = report, phantom, Memory()
        self.inference, self.gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._small = small
        self.eager_peak = self.peak_since = self.alive = 0
        self.deferred = 0
        self.evaluate = evaluate
        self.device = torch.device("cpu")
        self._tensors: dict[int, ref[LazyTensor]] = {}
        self._lock = threading.RLock()

    # What the program holds

    def defer(self, tensor: Tensor) -> LazyTensor:
        """An argument of the caller's: its memory is written to at once. The object may get another (`.data =`)."""
        cell = Cell(self, Spec.of(tensor), real=tensor.detach(), counted=False)
        lazy = LazyTensor(View(cell, cell.whole, tensor.device))
        lazy.original_ = tensor
        return lazy

    def phantom_of(self, like: Spec, device: torch.device, counted: bool = True) -> LazyTensor:
        """An argument that is not there yet: a tensor without values, as if on `device`."""
        node = self._node(None, (), (), like, device, None)
        node.tensor = like.empty()
        return LazyTensor(View(Cell(self, like, node, counted=counted), like, device))

    def note(self, tensor: LazyTensor) -> None:
        """The program has this tensor from now on."""
        key = id(tensor)
        self._tensors[key] = ref(tensor, lambda _: self._tensors.pop(key, None))

    def lives(self, size: int) -> None:
        """So many bytes more, or fewer, are alive."""
        self.alive = alive = self.alive + size
        if alive > self.peak_since:
            self.peak_since = alive
            if alive > self.eager_peak:
                self.eager_peak = alive

    def held(self) -> list[LazyTensor]:
        """The deferred tensors that the program has."""
        return [tensor for tensor in (one() for one in list(self._tensors.values())) if tensor is not None]

    @contextmanager
    def as_called(self) -> Iterator[None]:
        """Within the block tensors are made as the caller's own code makes them; operators arrive in inference mode."""
        with torch.inference_mode(self.inference), torch.no_grad():
            yield

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch guards modes against being compiled, at each operator; nothing is compiled here (`undisturbed`)."""
        return False

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Within the block operators do not come here first, unless the program has put a mode of its own on top."""
        if _get_current_dispatch_mode() is not self:
            yield
            return
        with _pop_mode_temporarily():
            yield

    # Operators

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):  # it takes functions, as torch.cond and flex_attention do
            return self._of_functions(func, args, kwargs)
        if recorder_of(args, kwargs) is not None:
            return self.call(func, args, kwargs)
        operator = operator_of(func)
        if operator.written:
            for value in written_by(operator, args, kwargs):
                if value.layout is torch.strided:
                    self.memory.before_write(value)
        elif operator.name in operators.OF_PARAMETERS:
            made = self._weight(func, args, kwargs)
            if made is not None:
                return made
        elif operator.name in operators.OF_MAPS and args and is_ordinary(args[0]) and not self.phantom:
            large = args[0].is_floating_point() and args[0].dim() > 2 and args[0].nbytes >= _LARGE
            if large and not args[0].requires_grad:
                return self.call(func, (self.defer(args[0]), *args[1:]), kwargs)
        if not self.phantom and operator.name in operators.FILLED and func._overloadname == "default":
            made = func(*args, **kwargs)
            self.memory.note_constant(made, operators.FILLED[operator.name](args, kwargs))
            return made
        if self.phantom and operator.name in operators.MADE:
            return self._phantom_made(func, args, kwargs)
        if self.phantom and has_no_values((args, kwargs)):  # a weight: it is where and what it should be
            args, kwargs = mapped(nowhere, args), mapped(nowhere, kwargs)
        if self.phantom and mixes_devices((args, kwargs)):  # a table that is there, and a weight that is not
            return self.call(func, mapped(self._phantom_again, args), mapped(self._phantom_again, kwargs))
        return func(*args, **kwargs)

    def _of_functions(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an operator gives that calls functions, on values."""
        if self.phantom:
            raise CannotEstimateError(f"{func} calls functions")
        return func(*mapped(self._real_or_same, args), **mapped(self._real_or_same, kwargs))

    def _weight(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A weight that the program makes anew at each call: deferred, for eager has one at a time, and a plan counts
        those that a pass reads. None where it is small, or has a gradient, and is to be made now."""
        tensors = tensors_in(args)
        specs = specs_of(func, args, kwargs, spec_of) if are_usual(tensors) else None
        gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        several = (specs,) if isinstance(specs, Spec) else specs
        if gradients or not several or numel(several[0]) * several[0].dtype.itemsize < self._small:
            return None
        device = self._somewhere(tensors[0].device)
        operands = _operands(self, args), _operands(self, kwargs)
        if isinstance(specs, Spec):
            return self._own(self.whole(func, *operands, specs, device), specs)
        nodes = self._parts(func, *operands, several, device)
        return tuple(self._own(node, spec) for node, spec in zip(nodes, several))

    def _somewhere(self, device: torch.device) -> torch.device:
        """The device that a program means, which has asked a weight of an estimate for its own."""
        return self.device if self.phantom and device.type == "meta" else device

    def _phantom_again(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == "meta":
            return self.phantom_of(Spec.of(value), self.device, counted=False)
        return value

    def _phantom_made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A new tensor of the program's, in an estimate: one that is large takes no memory."""
        specs = specs_of(func, args, {**kwargs, "device": torch.device("meta")}, spec_of)
        if not isinstance(specs, Spec) or numel(specs) * specs.dtype.itemsize < _LARGE:
            return func(*args, **kwargs)
        device = self._somewhere(device_given(kwargs, torch.device("cpu")))
        return self._own(views.constant(self, specs, device, 0), specs)

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What `func` returns, deferred tensors being among its arguments."""
        with self._lock:
            operator = operator_of(func)
            if operator.written:
                return self._write(func, operator, args, kwargs)
            tensors = tensors_in(args)
            if kwargs:
                tensors += tensors_in(kwargs)
            if not are_usual(tensors):
                return self._now(func, args, kwargs)
            if operator.name in operators.LIKE:
                return self._like(func, operator, args, kwargs)
            if operator.looks or (operator.draws and draws(func, args, kwargs)):
                return self._now(func, args, kwargs)
            specs = specs_of(func, args, kwargs, spec_of)
            if specs is None:
                return self._now(func, args, kwargs)
            if isinstance(specs, Spec):
                if specs.alias is not None:
                    return self._view(specs, None, func, args, kwargs, tensors)
                node = self.compute(func, args, kwargs, specs)
                return self._now(func, args, kwargs, specs) if node is None else self._own(node, specs)
            if all(spec.alias is not None for spec in specs):
                if any(spec.alias for spec in specs) or not isinstance(args[0], LazyTensor):
                    return self._now(func, args, kwargs)
                return [self._view(spec, place, func, args, kwargs, tensors) for place, spec in enumerate(specs)]
            nodes = operators.build_several(self, func, _operands(self, args), _operands(self, kwargs), specs)
            if nodes is None and self.phantom:
                nodes = self._parts(func, _operands(self, args), _operands(self, kwargs), specs, None)
            if nodes is None:
                return self._now(func, args, kwargs)
            return tuple(self._own(node, spec) for node, spec in zip(nodes, specs))

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any], spec: Spec) -> Optional[Node]:
        """The node of what `func` returns; None where it is better computed at once."""
        sources: list[Node] = []
        args, kwargs = _operands(self, args, sources), _operands(self, kwargs, sources) if kwargs else {}
        size = numel(spec) * spec.dtype.itemsize
        stored = all(node.tensor is not None for node in sources)
        self.deferred += operators.knows(func)
        if stored and not self.phantom and max(size, *(node.bytes for node in sources)) < self._small:
            return None
        device = self._somewhere(device_of(func, args, kwargs, sources))
        node = operators.build(self, func, args, kwargs, spec, device)
        if node is not None:
            return node
        if stored and not self.phantom:
            return None
        return self.whole(func, args, kwargs, spec, device)

    def whole(self, func: Any, args: Any, kwargs: dict[str, Any], spec: Spec, device: torch.device) -> Node:
        """The node of an operator that needs all of its arguments at once."""
        inputs, call = operators.over(args, kwargs)
        name = func.overloadpacket.__name__
        if any(node.dim is not None for node in inputs):
            self.report[name] = self.report.get(name, 0) + 1
        step = Whole(lambda pieces: call(func, pieces))
        step.name = name
        return self._node(step, inputs, (None,) * len(inputs), spec, device, None)

    def _parts(
        self, func: Any, args: Any, kwargs: dict[str, Any], specs: Sequence[Spec], device: Optional[torch.device]
    ) -> tuple[Node, ...]:
        """The nodes of an operator with several results, of which each needs all of its arguments. device: of the
        results; None for that of its first deferred argument."""
        inputs, call = operators.over(args, kwargs)
        found = []
        for place, spec in enumerate(specs):
            step = Whole(lambda pieces, place=place: call(func, pieces)[place])
            step.name = func.overloadpacket.__name__
            found.append(self._node(step, inputs, (None,) * len(inputs), spec, device or inputs[0].device, None))
        return tuple(found)

    def _node(
        self, step: Any, inputs: Sequence[Node], dims: Sequence[Optional[int]], spec: Spec, device: torch.device,
        dim: Optional[int],
    ) -> Node:  # fmt: skip
        return Node(
            step, inputs, dims, shape=spec.shape, strides=spec.strides, dtype=spec.dtype, device=device,
            itemsize=spec.dtype.itemsize, dim=dim,
        )  # fmt: skip

    node = _node

    def source(self, tensor: Tensor) -> Node:
        """A node of what is in memory that others can write to."""
        node = self._node(None, (), (), Spec.of(tensor), self._somewhere(tensor.device), None)
        node.tensor = tensor
        self.memory.watch(node)
        return node

    def constant_of(self, tensor: Tensor) -> Optional[Node]:
        """The node of a map of one value that the program has made, as many frames are padded with: its memory need not
        be kept. None where it is anything else, or small."""
        if tensor.dim() < 3 or not tensor.is_floating_point() or tensor.nbytes < self._small:
            return None
        value = self.memory.constant_in(tensor)
        return None if value is None else views.constant(self, Spec.of(tensor), tensor.device, value)

    def _own(self, node: Node, spec: Spec) -> LazyTensor:
        """A tensor with memory of its own."""
        cell = Cell(self, spec if spec.alias is None else spec._replace(alias=None), node)
        return LazyTensor(View(cell, cell.whole, node.device))

    # Views

    def _view(
        self, spec: Spec, place: Optional[int], func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Any]
    ) -> Any:
        base = tensors[spec.alias or 0]
        if not isinstance(base, LazyTensor):
            return self._now(func, args, kwargs)
        if args[0] is base and gives_back(operator_of(func), base.view_.spec, spec):
            return base
        parent = base.view_
        view = View(parent.cell, spec._replace(alias=None), parent.device, parent, func, args[1:], kwargs, place)
        if args[0] is not base:  # the view of an argument that is not the first
            return self._now(func, args, kwargs)
        return LazyTensor(view)

    def look(self, view: View, parent: Node) -> Node:
        """What `view` shows, where its parent shows `parent`."""
        args = _operands(self, view.args)
        node = views.build(self, view, parent, args)
        if node is None:
            func, place = view.func, view.place
            called = func if place is None else lambda *given, **named: func(*given, **named)[place]
            inputs, call = operators.over((parent, *args), view.kwargs)
            name = func.overloadpacket.__name__
            if parent.dim is not None:
                self.report[name] = self.report.get(name, 0) + 1
            step = Whole(lambda pieces: call(called, pieces))
            step.name = name
            node = self._node(step, inputs, (None,) * len(inputs), view.spec, parent.device, None)
        return node

    # Writes

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
        if isinstance(target, LazyTensor):
            raise RuntimeError(
                f"data of shape {tuple(value.shape)} cannot take the place of a map's of {tuple(target.shape)} in a "
                "streamed call with a torch older than 2.3: update torch, or stream another part."
            )
        target.data = value

    def _ordinary(self, value: Any) -> Any:
        """A deferred tensor made ordinary; its values before torch 2.3, where no object becomes another."""
        if isinstance(value, LazyTensor):
            self.become_ordinary([value])
        return self.real(value).detach() if isinstance(value, LazyTensor) else value

    def _is_alike(self, target: LazyTensor, value: Any) -> bool:
        """Whether an object that was made for the one can stand for the other."""
        spec, other = target.view_.spec, spec_of(value)
        return other is not None and spec[:2] == other[:2] and spec.dtype == other.dtype

    def _write(self, func: Any, operator: Operator, args: Any, kwargs: dict[str, Any]) -> Any:
        if operator.reshapes:
            lazies = [value for value in tensors_in(args) if isinstance(value, LazyTensor)]
            originals = [value.original_ for value in lazies if hasattr(value, "original_")]
            self.become_ordinary(lazies)
            for original in originals:  # the caller's own object changes its shape, too
                func(original, *args[1:], **kwargs)
            with self.as_called():
                return func(*mapped(self._real_or_same, args), **kwargs)
        targets = written_by(operator, args, kwargs)
        target: Any = targets[0] if len(targets) == 1 else None
        usual = isinstance(target, LazyTensor) and operator.functional is not None and args and args[0] is target
        if usual and target.view_.cell.real is None and self._write_deferred(func, operator, target, args, kwargs):
            return target
        return self._write_now(func, targets, args, kwargs)

    def _write_deferred(self, func: Any, operator: Operator, target: LazyTensor, args: Any, kwargs: Any) -> bool:
        """Give the cell of `target` its new value; whether that could be done."""
        if (operator.draws and draws(func, args, kwargs)) or not are_usual(tensors_in(args)) or kwargs:
            return False
        if specs_of(func, args, kwargs, spec_of) is None:  # eager refuses it, and says so
            return False
        view = target.view_
        if operator.name in ("copy_", "fill_", "zero_"):
            node = views.filled(self, view, operator.name, _operands(self, args[1:2]))
        else:
            spec = specs_of(operator.functional, args, kwargs, spec_of)
            if not isinstance(spec, Spec) or spec.shape != view.spec.shape:
                return False
            if spec.alias == 0:  # dropout of nothing
                return True
            operands = _operands(self, args)
            node = operators.build(self, operator.functional, operands, kwargs, spec, view.device)
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
        # What it reads is evaluated before anything is written.
        others = [value for value in tensors_in((args, kwargs)) if isinstance(value, LazyTensor)]
        self.store([value.view_.node() for value in others if value.view_.cell.real is None])
        reals = {id(value): self.real(value) for value in others}
        name = func.overloadpacket.__name__
        if any(value.view_.cell.real is None for value in others):
            self.report[name] = self.report.get(name, 0) + 1
        for value in targets:
            if isinstance(value, Tensor):
                self.memory.before_write(reals.get(id(value), value))
        lazies = {id(reals[id(value)]): value for value in others}

        def real_of(value: Any) -> Any:
            return reals[id(value)] if isinstance(value, LazyTensor) else value

        with self.as_called():
            result = func(*mapped(real_of, args), **mapped(real_of, kwargs))
        return mapped(lambda value: lazies.get(id(value), value), result)

    # Values

    def _now(self, func: Any, args: Any, kwargs: dict[str, Any], spec: Any = None) -> Any:
        """Run an operator on values; tensors that come of it are deferred ones again. spec: see `_again`."""
        tensors = tensors_in((args, kwargs))
        lazies = [value for value in tensors if isinstance(value, LazyTensor)]
        name = func.overloadpacket.__name__
        if self.phantom:
            raise CannotEstimateError(f"{name} looks at values")
        nodes = [value.view_.node() for value in lazies]
        if any(node.tensor is None and node.bytes >= self._small for node in nodes):
            self.report[name] = self.report.get(name, 0) + 1
        self.store(nodes)
        del nodes
        values = {id(value): self.real(value) for value in lazies}
        with self.as_called():
            result = func(
                *mapped(lambda value: values.get(id(value), value), args),
                **mapped(lambda value: values.get(id(value), value), kwargs),
            )
        ordinary = {
            one.untyped_storage()._cdata for one in tensors if not isinstance(one, LazyTensor) and is_ordinary(one)
        }
        return mapped(lambda value: self._again(value, lazies, values, ordinary, spec), result)

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
                whole = one.view_.cell.whole
                offset = value.storage_offset() - real.storage_offset() + whole.offset
                spec = Spec.of(value)._replace(offset=offset)
                root = View(one.view_.cell, whole, one.view_.device)
                return LazyTensor(View(one.view_.cell, spec, one.view_.device, root))
        known = isinstance(spec, Spec) and spec.alias is None and spec.shape == value.shape
        if known and spec.strides != value.stride():
            with self.as_called():
                kept = torch.empty_strided(spec.shape, spec.strides, dtype=value.dtype, device=value.device)
            value = kept.copy_(value)
        node = self._node(None, (), (), Spec.of(value), value.device, None)
        node.tensor = value.detach()
        return self._own(node, Spec.of(value)._replace(offset=0))

    def _like(self, func: Any, operator: Operator, args: Any, kwargs: dict[str, Any]) -> Any:
        """A new tensor that takes its looks from a deferred one, and none of its values."""
        specs = specs_of(func, args, {**kwargs, "device": torch.device("meta")}, spec_of)
        device = device_given(kwargs, args[0].view_.device if isinstance(args[0], LazyTensor) else args[0].device)
        device = self._somewhere(device)
        if not isinstance(specs, Spec):
            return self._now(func, args, kwargs)
        usual = kwargs.get("memory_format") in (None, torch.preserve_format)
        if operator.name.endswith("_like") and usual and is_dense(spec_of(args[0])):  # also in dimensions of one place
            specs = specs._replace(strides=spec_of(args[0]).strides)  # type: ignore[union-attr]
        fill = operators.LIKE[operator.name]
        large = fill is not None and numel(specs) * specs.dtype.itemsize >= self._small
        if large or self.phantom:
            node = views.constant(self, specs, device, fill(args, kwargs) if fill is not None else 0)
            if node is not None:
                return self._own(node, specs)
        with self.as_called():
            made = torch.empty_strided(specs.shape, specs.strides, dtype=specs.dtype, device=device)
        operators.fill_like(operator.name, made, args, kwargs)
        node = self._node(None, (), (), specs, made.device, None)
        node.tensor = made
        return self._own(node, specs)

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
            return value
        with self.as_called():
            laid = torch.empty_strided(spec.shape, dense, dtype=value.dtype, device=value.device)
        return laid.copy_(value)

    def with_values(self, values: Any) -> Any:
        """Arguments with ordinary tensors, which nothing else will write to, in the place of deferred ones."""

        def copied(value: Any) -> Any:
            if not isinstance(value, LazyTensor):
                return value
            with torch.no_grad():
                return self.real(value).clone()

        return mapped(copied, values)

    def _real_or_same(self, value: Any) -> Any:
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
        """Whether the memory of `node`, the value of `cell`, is that of other nodes or cells, too."""
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
                real = tensor.view_.real()
                mine = real.detach()  # never the caller's own object
                self._tensors.pop(id(tensor), None)
                _become(tensor, mine)

    def finish(self) -> None:
        """The call is over: what the program still has becomes ordinary, all evaluated in one go."""
        self.become_ordinary(self.held())


def _become(tensor: Any, real: Tensor) -> None:
    swap: Optional[Callable[[Tensor, Tensor], None]] = getattr(torch._C, "_swap_tensor_impl", None)
    if swap is None:
        return
    tensor.__dict__.pop("original_", None)
    view = tensor.__dict__.pop("view_")
    try:
        swap(tensor, real)
    except RuntimeError:
        tensor.view_ = view
        raise
    tensor.__class__ = Tensor


def _operands(recorder: Recorder, value: Any, found: Optional[list[Node]] = None) -> Any:
    """Arguments as steps take them: nodes, which go to `found`, tensors that are held, and anything else as it is."""
    kind = type(value)
    if kind in SIMPLE:
        return value
    if kind is LazyTensor:
        node = value.view_.node()
        if found is not None:
            found.append(node)
        return node
    if isinstance(value, Tensor):
        node = recorder.constant_of(value)
        if node is None:
            return recorder.memory.hold(value)
        if found is not None:
            found.append(node)
        return node
    if isinstance(value, (list, tuple)):
        for one in value:
            if type(one) not in SIMPLE:
                return type(value)([_operands(recorder, one, found) for one in value])
        return value
    if isinstance(value, dict):
        return {key: _operands(recorder, one, found) for key, one in value.items()}
    return value


__all__ = ["Evaluate", "Held", "Recorder"]
