"""The tensor that stands for values which are computed later, and the memory that such tensors share.

A `Cell` is a piece of memory as eager would have it; a `View` is a way of looking at it; a `LazyTensor` is what the
program holds. A cell's value is a node of the graph, and a write into any view gives the cell another node. Memory that
others can reach too, an argument's or what NumPy was given, is real: it is written to at once.
"""

from __future__ import annotations

from typing import Any, Optional
from weakref import ref

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..graph.node import Node
from .marks import marks_of
from .shapes import SIMPLE, Spec


class Cell:
    """Memory that views share.

    recorder: a `Recorder`, whose module imports this one. whole: what all of it looks like. value: the node of all of
    it, while nobody else can reach it. real: the tensor of all of it, where others can. version: how often it was
    written to through views.
    """

    __slots__ = ("__weakref__", "bytes", "real", "recorder", "value", "version", "whole")

    def __init__(
        self, recorder: Any, whole: Spec, value: Optional[Node] = None, real: Optional[Tensor] = None,
        counted: bool = True,
    ) -> None:  # fmt: skip
        self.recorder, self.whole, self.value, self.real, self.version = recorder, whole, value, real, 0
        self.bytes = _bytes(whole) if counted else 0
        recorder.lives(self.bytes)

    def __del__(self) -> None:
        if hasattr(self, "bytes"):
            self.recorder.lives(-self.bytes)


def _bytes(spec: Spec) -> int:
    reach = 1
    for side, stride in zip(spec.shape, spec.strides):
        if not side:
            return 0
        reach += (side - 1) * stride
    return reach * spec.dtype.itemsize


class View:
    """A way of looking at a cell: all of it, or what the operator `func` makes of `parent`.

    place: which of several results of `func`. device: where the program has it.
    """

    __slots__ = (
        "_known", "_memory", "_version", "args", "cell", "device", "func", "kwargs", "parent", "place", "spec",
    )  # fmt: skip

    def __init__(
        self, cell: Cell, spec: Spec, device: torch.device, parent: Optional[View] = None, func: Any = None,
        args: Any = (), kwargs: Any = None, place: Optional[int] = None,
    ) -> None:  # fmt: skip
        self.cell, self.spec, self.device, self.parent = cell, spec, device, parent
        self.func, self.args, self.kwargs, self.place = func, args, kwargs or {}, place
        self._known: Optional[Node] = None
        self._version = -1
        self._memory: Optional[tuple[ref[Node], Tensor]] = None

    def node(self) -> Node:
        """What it shows now."""
        cell = self.cell
        if cell.real is not None:
            return self._node_of_memory()
        if self.parent is None:
            assert cell.value is not None
            return cell.value
        if self._version != cell.version or self._known is None:
            chain, view = [], self
            while view.parent is not None and (view._version != cell.version or view._known is None):
                chain.append(view)
                view = view.parent
            for view in reversed(chain):  # not by recursion: programs chain views by the thousand
                assert view.parent is not None
                parent = view.parent
                before: Any = cell.value if parent.parent is None else parent._known
                view.remember(cell.recorder.look(view, before))
        assert self._known is not None
        return self._known

    def remember(self, node: Node) -> None:
        """`node` is what it shows until the cell is written to."""
        self._known, self._version = node, self.cell.version

    def real(self) -> Tensor:
        """The part of a real cell's memory."""
        assert self.cell.real is not None
        if self.parent is None and self.cell.real.shape == self.spec.shape:
            return self.cell.real
        # Bits taken for another type have strides in other units, and a view may show conjugates.
        if self.spec.dtype != self.cell.real.dtype or self.cell.real.is_complex():
            parent = self.parent
            assert parent is not None
            found = self.func(parent.real(), *self.args, **self.kwargs)
            return found if self.place is None else found[self.place]
        offset = self.cell.real.storage_offset() + self.spec.offset - self.cell.whole.offset
        return self.cell.real.as_strided(self.spec.shape, self.spec.strides, offset)

    def _node_of_memory(self) -> Node:
        """Its node, held weakly: memory that no step will read need not be copied before a write."""
        if self._memory is not None:
            node = self._memory[0]()
            if node is not None and node.tensor is self._memory[1]:
                return node
        tensor = self.real().detach()
        if self.cell.recorder.memory.is_given(tensor) or tensor.is_conj() or tensor.is_neg():
            return self.cell.recorder.source(tensor.clone())
        node = self.cell.recorder.source(tensor)
        self._memory = ref(node), tensor
        return node


_without_memory = getattr(torch._C, "_set_throw_on_mutable_data_ptr", None)
"""Makes C++ code raise that asks a deferred tensor for its memory (torch 2.2 and later)."""


def _without_values(kind: type[Any], view: View) -> Any:
    spec = view.spec
    return Tensor._make_wrapper_subclass(
        kind, spec.shape, strides=spec.strides, storage_offset=spec.offset, dtype=spec.dtype, device=view.device
    )


class LazyTensor(Tensor):
    """Stands for what `view` shows. Its shape, strides, type and device are known, its values may not be yet."""

    is_deferred = True
    """For those who know no more of it: strips of a single convolution leave it alone."""

    view_: View
    original_: Tensor

    @staticmethod
    def __new__(cls, view: View) -> LazyTensor:
        # As the caller's: what is scripted may write to it, and a program may save it for gradients.
        with torch._C._InferenceMode(view.cell.recorder.inference):
            tensor = _without_values(cls, view)
        if _without_memory is not None:
            _without_memory(tensor)
        tensor.view_ = view
        view.cell.recorder.note(tensor)
        return tensor

    def as_subclass(self, cls: Any) -> Any:
        """What the method of tensors does, for which torch asks no subclass."""
        return _leave(Tensor.as_subclass, "as_subclass", (self, cls), {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(types) > 1 and not all(issubclass(kind, Tensor) for kind in types):
            return NotImplemented  # it is for the other to say
        name = getattr(func, "__name__", "")
        if name == "__get__" and func.__self__.__name__ not in _ACTING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name == "__get__" and func.__self__.__name__ == "data":
            func, name = Tensor.detach, "detach"  # torch before 2.4 has no `.data` for it in inference mode
        if name == "__set__" and func.__self__.__name__ == "data":
            return recorder_of(args).replace_data(func, *args)
        if name in _MARKS:
            (tensor,) = (*args, *(kwargs or {}).values())
            return marks_of(tensor.view_)[_MARKS[name]]
        if name in _READING:
            return func(*_with_values(args))
        if name in LEAVING or (name in ("__get__", "__set__") and func.__self__.__name__ in LEAVING):
            return _leave(func, name, args, kwargs or {})
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and _asks_for_gradients(args, kwargs)):
            return _with_gradients(func, args, kwargs or {})
        if name == "new_tensor":
            args, kwargs = (args[0], *_with_values(args[1:])), _with_values(kwargs or {})
        inference = name not in _MAKING or recorder_of(args).inference
        with (
            torch._C.DisableTorchFunctionSubclass(),
            torch._C._InferenceMode(inference),
        ):  # operators arrive whole there
            result = func(*args, **(kwargs or {}))
        out = kwargs.get("out") if kwargs else None
        return result if out is None else _as_given(out, result)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return recorder_of(args, kwargs).call(func, args, kwargs or {})


def _as_given(out: Any, result: Any) -> Any:
    """What an operator returns that was given `out=`: these objects, also where one became an ordinary tensor to take
    the result's shape, and torch returns what it was."""
    if isinstance(out, Tensor):
        return out if isinstance(result, Tensor) else result
    return type(result)(out) if isinstance(result, tuple) and len(result) == len(out) else result


_ACTING = frozenset({"data", "T", "mT", "H", "mH", "real", "imag", "grad", "__cuda_array_interface__"})
"""Attributes whose value is a tensor, or that give memory away."""

_MARKS = {"is_conj": 0, "is_neg": 1}
"""What asks for a mark, by its place in `marks_of`."""

_READING = frozenset({"__float__", "__int__", "__index__", "__bool__", "__complex__"})
"""What makes numbers of values. Constructors such as `torch.tensor` ask for them where no operator is seen."""

_MAKING = frozenset({"new", "new_tensor"})
"""What makes an ordinary tensor, by no operator that we see: it is one of the caller's mode."""

LEAVING = frozenset(
    """
    numpy tolist data_ptr __array__ __dlpack__ share_memory_ is_shared storage untyped_storage _typed_storage
    __reduce_ex__ __deepcopy__ requires_grad_ requires_grad backward register_hook retain_grad pin_memory set_
    __cuda_array_interface__ apply_ map_ map2_ swap_tensors _make_subclass to_dlpack _reduce_ex_internal
    register_post_accumulate_grad_hook __repr__ __format__ __array_wrap__ names rename_ to_sparse
    to_mkldnn is_pinned
    """.split()  # noqa: SIM905
)
"""What gives the memory of a tensor away, or makes something of the object: it becomes an ordinary tensor first."""


_GIVING = frozenset(
    {
        "numpy", "data_ptr", "__array__", "__dlpack__", "to_dlpack", "share_memory_", "storage", "untyped_storage",
        "_typed_storage", "__get__",
    }
)  # fmt: skip
"""What lets others write to the memory of a tensor without an operator."""


def recorder_of(*values: Any) -> Any:
    """The recorder of the first deferred tensor among arguments."""
    for value in values:
        kind = type(value)
        if kind is LazyTensor:
            return value.view_.cell.recorder
        if kind in SIMPLE:
            continue
        if isinstance(value, (list, tuple)):
            found = recorder_of(*value)
        elif isinstance(value, dict):
            found = recorder_of(*value.values())
        else:
            continue
        if found is not None:
            return found
    return None


def _asks_for_gradients(*values: Any) -> bool:
    """Whether a program that was called without gradients has switched them on, and computes with what wants them."""
    recorder = recorder_of(*values)
    return recorder is not None and not recorder.gradients and _wants_gradients(values)


def _wants_gradients(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_wants_gradients(one) for one in value)
    if isinstance(value, dict):
        return any(_wants_gradients(one) for one in value.values())
    return isinstance(value, Tensor) and not isinstance(value, LazyTensor) and value.requires_grad


def _with_values(args: Any) -> Any:
    """Arguments with values in the place of deferred tensors, some of which may be made where no operator is seen."""
    recorder = recorder_of(args)
    if recorder is None:
        return args
    with recorder.set_aside():
        return recorder.with_values(args)


def _with_gradients(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run eagerly what gradients are asked of. Raises RuntimeError within a transform of `torch.func`, whose tensors
    have no memory to compute into."""
    functorch: Any = getattr(torch._C, "_functorch", None)
    if functorch is not None and functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "torch.func.jvp was given a map of a streamed call, whose values are not there yet: stream the parts "
            "around it."
        )
    recorder = recorder_of(args, kwargs)
    args, kwargs = recorder.with_values((args, kwargs))
    return func(*args, **kwargs)


def _leave(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    if name == "__set__" and func.__self__.__name__ == "requires_grad" and not args[1]:
        return None
    for value in (*args, *kwargs.values()):
        if isinstance(value, LazyTensor):
            recorder = value.view_.cell.recorder
            with recorder.set_aside():
                recorder.become_ordinary([value], gives=name in _GIVING)
    target = args[0] if args and name in _RESHAPING and isinstance(args[0], LazyTensor) else None
    args = [value.view_.cell.recorder.real(value) if isinstance(value, LazyTensor) else value for value in args]
    if target is None:
        return func(*args, **kwargs)
    real = args[0].detach()
    func(real, *args[1:], **kwargs)
    target.view_.cell.recorder.show(target, real)  # an older torch could make no ordinary tensor of it
    return target


_RESHAPING = frozenset({"resize_", "resize_as_", "set_"})

_PYTHON = torch._C.DispatchKeySet(torch._C.DispatchKey.Python).add(torch._C.DispatchKey.PythonTLSSnapshot)


def take_shape(tensor: LazyTensor, like: Tensor) -> None:
    """Give a deferred tensor, which has no memory, the shape and strides of another. Raises RuntimeError for one that
    is larger."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._ExcludeDispatchKeyGuard(_PYTHON):
        try:
            Tensor.as_strided_(tensor, like.shape, like.stride(), 0)
        except RuntimeError as error:
            raise RuntimeError(
                f"a map of shape {tuple(tensor.shape)} cannot become one of {tuple(like.shape)} in place in a streamed "
                "call with this torch: update it, or stream another part."
            ) from error
