"""What each operator of the program adds to the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

from ..errors import CannotEstimateError
from ..graph.node import Node
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
    spec_of,
    tensors_in,
    written_by,
)
from .held import is_ordinary
from .lazy import LazyTensor, View, recorder_of
from .marks import marks_of, plain
from .program import SMALL
from .schema import Operator, draws, gives_back, looks, operator_of, written_unsaid
from .shapes import Spec, load, specs_of
from .values import Evaluate
from .writes import Writes

_AS_ANOTHER = frozenset({"expand_as", "reshape_as", "to", "type_as", "view_as"})
"""What gives its first argument the looks of another, whose values it does not read."""

_BY_SIZES = {
    "expand_as": torch.ops.aten.expand.default,
    "reshape_as": torch.ops.aten.reshape.default,
    "view_as": torch.ops.aten.view.default,
}
"""What shows its argument in the shape of another, and what does so by numbers."""

_OF_MEMORY = frozenset({"as_strided", "as_strided_copy", "as_strided_scatter"})
"""What goes by places in memory, whatever of it its argument shows."""

_LARGE = 1 << 20
"""Bytes of an ordinary map from which what a decoder does to maps is deferred, though no argument is."""


class Recorder(Writes, TorchDispatchMode):
    """Records what happens to deferred tensors within its `with` block.

    evaluate: stores nodes. deferred: how many operators were called that rows are known of. For the others see
    `Program`.
    """

    def __init__(self, evaluate: Evaluate, report: dict[str, int], phantom: bool = False, small: int = SMALL) -> None:
        TorchDispatchMode.__init__(self)
        Writes.__init__(self, report, phantom, small)
        load()
        self.evaluate = evaluate
        self.deferred = 0

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
            return (self._by_cudnn if func is operators.CUDNN else self.call)(func, args, kwargs)
        operator = operator_of(func)
        if operator.written or operator.unsaid:
            for value in (*written_by(operator, args, kwargs), *written_unsaid(func, args, kwargs)):
                if value.layout is torch.strided:
                    self.before_write(value)
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
        return func(*mapped(self.real_or_same, args), **mapped(self.real_or_same, kwargs))

    def _weight(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A weight that the program makes anew at each call: deferred, for eager has one at a time, and a plan counts
        those that a pass reads. None where it is small, or has a gradient, and is to be made now."""
        tensors = tensors_in(args)
        if not are_usual(tensors) or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return None
        specs, small = specs_of(func, args, kwargs, spec_of), self.small
        if specs is None:  # torch 2.1 cannot say without values, nor make any on the meta device
            specs, small = _of_weight_norm(func, tensors), 0 if self.phantom else small
        several = (specs,) if isinstance(specs, Spec) else specs
        if not several or several[0].nbytes < small:
            return None
        device = self.somewhere(tensors[0].device)
        operands = self.operands(args), self.operands(kwargs)
        if isinstance(specs, Spec):
            return self.own(self.whole(func, *operands, specs, device), specs)
        nodes = self.parts(func, *operands, several, device)
        return tuple(self.own(node, spec) for node, spec in zip(nodes, several))

    def _phantom_again(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.device.type == "meta":
            return self.phantom_of(Spec.of(value), self.device, counted=False)
        return value

    def _phantom_made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A new tensor of the program's, in an estimate: one that is large takes no memory."""
        specs = specs_of(func, args, {**kwargs, "device": torch.device("meta")}, spec_of)
        if not isinstance(specs, Spec) or specs.nbytes < _LARGE:
            return func(*args, **kwargs)
        device = self.somewhere(device_given(kwargs, torch.device("cpu")))
        return self.own(views.constant(self, specs, device, 0), specs)

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What `func` returns, deferred tensors being among its arguments."""
        with self._lock:
            operator = operator_of(func)
            if operator.written:
                self.writes_unsaid(func, args, kwargs)
                return self.write(func, operator, args, kwargs)
            tensors = tensors_in(args)
            if kwargs:
                tensors += tensors_in(kwargs)
            if not are_usual(tensors):
                return self.now(func, args, kwargs)
            if operator.name in _OF_MEMORY:
                args, kwargs = self._with_memory(operator, args, kwargs)
            if operator.name in operators.LIKE:
                return self._like(func, operator, args, kwargs)
            if operator.name in _AS_ANOTHER and not isinstance(args[0], LazyTensor):
                return func(args[0], *mapped(_alike, args[1:]), **mapped(_alike, kwargs))
            if self.writes_unsaid(func, args, kwargs):
                return self.now(func, args, kwargs)
            if looks(func, args) or (operator.draws and draws(func, args, kwargs)):
                return self.now(func, args, kwargs)
            specs = specs_of(func, args, kwargs, spec_of)
            if specs is None:
                return self.now(func, args, kwargs)
            if isinstance(specs, Spec):
                if specs.alias is not None:
                    return self._view(specs, None, func, args, kwargs, tensors)
                node = self.compute(func, args, kwargs, specs)
                return self.now(func, args, kwargs, specs) if node is None else self.own(node, specs)
            if all(spec.alias is not None for spec in specs):
                if any(spec.alias for spec in specs) or not isinstance(args[0], LazyTensor):
                    return self.now(func, args, kwargs)
                return [self._view(spec, place, func, args, kwargs, tensors) for place, spec in enumerate(specs)]
            self.deferred += operators.knows(func)
            nodes = operators.build_several(self, func, self.operands(args), self.operands(kwargs), specs)
            if nodes is None and self.phantom:
                nodes = self.parts(func, self.operands(args), self.operands(kwargs), specs, None)
            if nodes is None:
                return self.now(func, args, kwargs)
            return tuple(self.own(node, spec) for node, spec in zip(nodes, specs))

    def _by_cudnn(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A convolution that is asked of cuDNN, whatever the device: it is one as any other."""
        with self._lock:
            same, given = operators.usual(*args, **kwargs)
            specs = specs_of(same, given, {}, spec_of) if are_usual(tensors_in(args)) else None
            node = self.compute(same, given, {}, specs) if isinstance(specs, Spec) else None
            if node is None or not isinstance(specs, Spec):
                return self.now(func, args, kwargs)
            return self.own(node, specs)

    def compute(self, func: Any, args: Any, kwargs: dict[str, Any], spec: Spec) -> Optional[Node]:
        """The node of what `func` returns; None where it is better computed at once."""
        sources: list[Node] = []
        args, kwargs = self.operands(args, sources), self.operands(kwargs, sources) if kwargs else {}
        stored = all(node.tensor is not None for node in sources)
        self.deferred += operators.knows(func)
        if stored and not self.phantom and max(spec.nbytes, *(node.bytes for node in sources)) < self.small:
            return None
        device = self.somewhere(device_of(func, args, kwargs, sources))
        node = operators.build(self, func, args, kwargs, spec, device)
        if node is not None:
            return node
        if stored and not self.phantom:
            return None
        return self.whole(func, args, kwargs, spec, device)

    # Views

    def _view(
        self, spec: Spec, place: Optional[int], func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Any]
    ) -> Any:
        base = tensors[spec.alias or 0]
        if not isinstance(base, LazyTensor):
            return self.now(func, args, kwargs)
        operator = operator_of(func)
        if operator.name in ("resolve_conj", "resolve_neg") and any(marks_of(base.view_)):
            return self.call(torch.ops.aten.clone.default, args, {})
        if args[0] is base and gives_back(operator, base.view_.spec, spec):
            return base
        if args[0] is not base:  # the view of an argument that is not the first
            return self.now(func, args, kwargs)
        parent: View = base.view_
        given: Any = args[1:]
        if operator.name in _BY_SIZES:  # not of a tensor that may become another, or be let go
            func, given, kwargs = _BY_SIZES[operator.name], (spec.shape,), {}
        if operator.name == "select" and _shows_conjugates(parent):  # `z.conj().imag = y`, for which a mark decides
            assert parent.parent is not None
            func, given, kwargs, parent = _PARTS[given[1]], (), {}, parent.parent
        view = View(parent.cell, spec._replace(alias=None), parent.device, parent, func, given, kwargs, place)
        return LazyTensor(view)

    def _with_memory(self, operator: Operator, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments of an operator that goes by places in memory: what it is asked of is all of that, so far as
        this is deferred, else a part of what is there."""
        given = dict(zip(operator.names, args)) | kwargs
        base = given["self"]
        if not isinstance(base, LazyTensor) or base.view_.parent is None or base.view_.cell.real is not None:
            return args, kwargs
        view = base.view_
        alike = view.spec.dtype == view.cell.whole.dtype and not view.spec.dtype.is_complex
        if alike and operator.name != "as_strided_scatter":
            offset = given.get("storage_offset")
            whole = LazyTensor(View(view.cell, view.cell.whole, view.device))
            return (whole, given["size"], given["stride"], view.spec.offset if offset is None else offset), {}
        if not self.phantom:
            self._make_real([base])
        return args, kwargs

    def look(self, view: View, parent: Node) -> Node:
        """What `view` shows, where its parent shows `parent`."""
        if view.func.overloadpacket.__name__ == "as_strided" and parent.dtype == view.spec.dtype:
            return views.strided(self, view, parent)
        args = self.operands(view.args)
        node = views.build(self, view, parent, args)
        if node is None:
            func, place = view.func, view.place
            called = func if place is None else lambda *given, **named: func(*given, **named)[place]
            inputs, call = operators.over((parent, *args), view.kwargs)
            name = func.overloadpacket.__name__
            if parent.dim is not None:
                self.report[name] = self.report.get(name, 0) + 1
            step = Whole(lambda pieces: plain(call(called, pieces)))
            step.name = name
            node = self.node(step, inputs, (None,) * len(inputs), view.spec, parent.device, None)
        return node

    # Tensors that look like others

    def _like(self, func: Any, operator: Operator, args: Any, kwargs: dict[str, Any]) -> Any:
        """A new tensor that takes its looks from a deferred one, and none of its values."""
        specs = specs_of(func, args, {**kwargs, "device": torch.device("meta")}, spec_of)
        device = device_given(kwargs, args[0].view_.device if isinstance(args[0], LazyTensor) else args[0].device)
        device = self.somewhere(device)
        if not isinstance(specs, Spec):
            return self.now(func, args, kwargs)
        usual = kwargs.get("memory_format") in (None, torch.preserve_format)
        if operator.name.endswith("_like") and usual and is_dense(spec_of(args[0])):  # also in dimensions of one place
            specs = specs._replace(strides=spec_of(args[0]).strides)  # type: ignore[union-attr]
        fill = operators.LIKE[operator.name]
        large = fill is not None and specs.nbytes >= self.small
        if large or self.phantom:
            node = views.constant(self, specs, device, fill(args, kwargs) if fill is not None else 0)
            if node is not None:
                return self.own(node, specs)
        with self.as_called():
            made = torch.empty_strided(specs.shape, specs.strides, dtype=specs.dtype, device=device)
        operators.fill_like(operator.name, made, args, kwargs)
        node = self.node(None, (), (), specs, made.device, None)
        node.tensor = made
        return self.own(node, specs)


_PARTS = (torch.ops.aten.real.default, torch.ops.aten.imag.default)
"""What shows the real and the imaginary parts, by their places in what `view_as_real` gives."""


def _shows_conjugates(view: View) -> bool:
    """Whether a view is `view_as_real` of conjugates, which torch asks for where it sees no mark."""
    of_parts = view.func is torch.ops.aten.view_as_real.default
    return of_parts and view.parent is not None and marks_of(view.parent)[0]


def _of_weight_norm(func: Any, tensors: Sequence[Tensor]) -> Any:
    """What weight norm returns of a direction and a size, both dense: a weight like the one, norms like the other."""
    direction, size = (Spec.of(one)._replace(offset=0) for one in tensors)
    dense = all(one.is_contiguous() for one in tensors)
    return None if not dense else direction if func.overloadpacket.__name__ == "_weight_norm" else (direction, size)


def _alike(value: Any) -> Any:
    """What looks like a deferred tensor, and takes no memory; anything else as it is."""
    if not isinstance(value, LazyTensor):
        return value
    spec = value.view_.spec
    return torch.empty((), dtype=spec.dtype, device=value.view_.device).expand(spec.shape)
