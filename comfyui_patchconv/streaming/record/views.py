"""Views of deferred tensors: what they show, and what a write into one of them makes of what it is a view of."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ..graph.node import Node
from ..graph.steps import Cast, Overlay, Pick, RowLocal, Whole
from .held import Held
from .marks import CONJUGATING, plain
from .operators.arranging import regrouped, widens
from .operators.common import default_dim, dim_of, fixed_dim
from .shapes import Spec

_SAME = frozenset(
    """
    alias detach contiguous lift_fresh to type_as _to_copy dropout feature_dropout alpha_dropout clone expand_as view_as
    positive real resolve_conj resolve_neg data
    """.split()  # noqa: SIM905
)
_REGROUPING = frozenset(
    """
    view _unsafe_view reshape flatten unflatten unsqueeze squeeze reshape_as view_as _reshape_alias ravel
    """.split()  # noqa: SIM905
)
_PERMUTING = frozenset(
    """
    permute transpose t movedim moveaxis swapaxes swapdims numpy_T mT mH adjoint matrix_H
    """.split()  # noqa: SIM905
)


class _Part(NamedTuple):
    """A view of some places of one dimension: every `stride`-th from `start` to `stop`; dropped: of the one place."""

    dim: int
    start: int
    stop: int
    stride: int
    dropped: bool


def build(recorder: Any, view: Any, parent: Node, args: Sequence[Any]) -> Optional[Node]:
    """The node of what `view` shows, its parent showing `parent`; None if it is not known how rows come of rows."""
    spec, name = view.spec, view.func.overloadpacket.__name__
    if spec.dtype != parent.dtype:
        return None
    conjugates = name in CONJUGATING and spec.dtype.is_complex
    if parent.tensor is not None and not conjugates:
        shown = _shown(view, parent.tensor)
        return None if shown is None else recorder.source(shown)
    if name in _SAME and spec.shape == parent.shape:
        return parent
    if isinstance(parent.step, Cast) and parent.step.widens:  # of half the bytes: it may have to be stored
        narrow = next(iter(parent.inputs))
        other = copy.copy(view)
        other.spec = spec._replace(dtype=narrow.dtype)
        shown = build(recorder, other, narrow, args)
        return None if shown is None else cast(recorder, shown, spec)
    if parent.dim is None or 0 in spec.shape or conjugates:
        return None
    if name in _REGROUPING:
        return _regrouped(recorder, parent, spec)
    if name in _PERMUTING:
        order = _order(view, parent)
        return _permuted(recorder, parent, order, spec)
    if name in ("expand", "expand_as", "broadcast_to"):
        return _expanded(recorder, parent, spec)
    part = _part(view, parent.shape, args)
    return None if part is None else _cut(recorder, parent, part, spec)


def _shown(view: Any, tensor: Tensor) -> Optional[Tensor]:
    """A view of what is stored; where that lies otherwise in memory than eager's, it may be a copy."""
    name = view.func.overloadpacket.__name__
    if any(isinstance(value, Tensor) for value in view.args):
        return tensor.expand(view.spec.shape) if name == "expand_as" else tensor.reshape(view.spec.shape)
    if name in _REGROUPING:
        return tensor.reshape(view.spec.shape)
    if name in _SAME:
        return tensor if tensor.shape == view.spec.shape else None
    if name in ("as_strided", "diagonal", "unfold", "view_as_real", "view_as_complex", "real", "imag"):
        return None
    result = view.func(tensor, *view.args, **view.kwargs)
    return plain(result if view.place is None else result[view.place])


def _plain(recorder: Any, step: Any, inputs: Sequence[Node], dims: Any, spec: Spec, dim: Optional[int]) -> Node:
    return recorder.node(step, inputs, dims, spec, inputs[0].device, dim)


def _regrouped(recorder: Any, parent: Node, spec: Spec) -> Optional[Node]:
    step = regrouped(parent, spec.shape)
    return None if step is None else _plain(recorder, step, [parent], [step.from_dim], spec, step.to_dim)


def _order(view: Any, parent: Node) -> list[int]:
    """Of a view with dimensions exchanged, which of the parent's each of them is."""
    count = len(parent.shape)
    probe = torch.empty(tuple(range(2, 2 + count)), device="meta")
    return [side - 2 for side in view.func(probe, *view.args, **view.kwargs).shape]


def _permuted(recorder: Any, parent: Node, order: Sequence[int], spec: Spec) -> Node:
    dim = fixed_dim(parent)
    assert dim is not None
    order = list(order)
    step = RowLocal(lambda pieces, first, last: pieces[0].permute(order), 1, moves=True)
    step.samples = (True,) if order[0] == 0 else None
    return _plain(recorder, step, [parent], [dim], spec, order.index(dim))


def _expanded(recorder: Any, parent: Node, spec: Spec) -> Optional[Node]:
    dim = fixed_dim(parent)
    assert dim is not None
    to = dim - len(parent.shape) + len(spec.shape)
    if spec.shape[to] != parent.shape[dim]:
        return None
    added = len(spec.shape) - len(parent.shape)
    there = [None] * added + list(parent.shape)
    shape = [-1 if side == before else side for side, before in zip(spec.shape, there)]
    step = RowLocal(lambda pieces, first, last: pieces[0].expand(shape), 1, moves=True)
    step.samples = (True,) if shape[0] == -1 else None
    return _plain(recorder, step, [parent], [dim], spec, to)


def _part(view: Any, shape: Sequence[int], args: Sequence[Any]) -> Optional[_Part]:
    """Which part of one dimension a view shows."""
    name, place = view.func.overloadpacket.__name__, view.place
    named = {one.name: value for one, value in zip(view.func._schema.arguments[1:], args)} | view.kwargs
    count = len(shape)
    dim = named.get("dim", 0)
    if not isinstance(dim, int) or any(isinstance(value, (Node, Held)) for value in named.values()):
        return None
    dim %= count
    size = shape[dim]
    if name == "select":
        index = named["index"] % size
        return _Part(dim, index, index + 1, 1, True)
    if name == "unbind":
        return _Part(dim, place, place + 1, 1, True)
    if name == "slice":
        start, stop, stride = slice(named.get("start"), named.get("end"), named.get("step", 1)).indices(size)
        return _Part(dim, start, max(stop, start), stride, False)
    if name == "narrow":
        start = named["start"]
        start += size if start < 0 else 0
        return _Part(dim, start, start + named["length"], 1, False)
    if name in ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"):
        sizes = _sizes(view, size, dim, args)
        starts = [0, *accumulate(sizes)]
        return _Part(dim, starts[place], starts[place + 1], 1, False)
    return None


def _sizes(view: Any, size: int, dim: int, args: Sequence[Any]) -> list[int]:
    probe = torch.empty((1,) * dim + (size,), device="meta")
    return [one.shape[dim] for one in view.func(probe, *args, **view.kwargs)]


def _cut(recorder: Any, parent: Node, part: _Part, spec: Spec) -> Optional[Node]:
    dim, stream = part.dim, fixed_dim(parent)
    assert stream is not None
    if dim != stream:

        def run(pieces: Sequence[Tensor], first: int, last: int) -> Tensor:
            if part.dropped:
                return pieces[0].select(dim, part.start)
            return pieces[0][(slice(None),) * dim + (slice(part.start, part.stop, part.stride),)]

        to = stream - (part.dropped and dim < stream)
        step = RowLocal(run, 1, moves=True)
        step.samples = (True,) if dim else None
        return _plain(recorder, step, [parent], [stream], spec, to)
    pick = Pick(part.start, part.stride, dim)
    if not part.dropped:
        return _plain(recorder, pick, [parent], [dim], spec, dim)
    row = spec._replace(
        shape=(*spec.shape[:dim], 1, *spec.shape[dim:]), strides=(*spec.strides[:dim], 0, *spec.strides[dim:])
    )
    picked = _plain(recorder, pick, [parent], [dim], row, dim)
    step = Whole(lambda pieces: pieces[0].squeeze(dim))
    return _plain(recorder, step, [picked], [None], spec, None)


def strided(recorder: Any, view: Any, parent: Node) -> Node:
    """What `as_strided` shows of a cell, all of which is `parent`: places of memory, where it lies as in eager."""
    whole, spec = view.cell.whole, view.spec

    def run(pieces: Sequence[Tensor]) -> Tensor:
        memory = pieces[0]
        if memory.stride() != whole.strides:
            memory = memory.new_empty_strided(whole.shape, whole.strides).copy_(memory)
        return memory.as_strided(spec.shape, spec.strides, memory.storage_offset() + spec.offset - whole.offset)

    step = Whole(run)
    step.name = "as_strided"
    if parent.dim is not None:
        recorder.report[step.name] = recorder.report.get(step.name, 0) + 1
    return _plain(recorder, step, [parent], [None], spec, None)


# Writes


def scattered(recorder: Any, view: Any, before: Node, written: Node) -> Optional[Node]:
    """What the parent of `view`, which shows `before`, shows once `view` shows `written`; None if not known."""
    name, spec = view.func.overloadpacket.__name__, _spec_of(before)
    if written.dtype != before.dtype or (name in CONJUGATING and written.dtype.is_complex):
        return None
    if prod(written.shape) == 0:
        return before
    if name in ("expand", "expand_as", "broadcast_to"):
        name = "view" if prod(written.shape) == prod(before.shape) else name
    if name in _SAME and written.shape == before.shape:
        return written
    if name in _REGROUPING or name == "view":
        return _reshaped(recorder, written, spec)
    if name in _PERMUTING:
        order = _order(view, before)
        back = [order.index(dim) for dim in range(len(order))]
        return _reordered(recorder, written, back, spec)
    args = [None if isinstance(value, Tensor) else value for value in view.args]
    part = _part(view, before.shape, args)
    return None if part is None else _overlaid(recorder, before, written, part, spec)


def _spec_of(node: Node) -> Spec:
    return Spec(node.shape, node.strides, 0, node.dtype)


def _whole(recorder: Any, function: Any, inputs: Sequence[Node], spec: Spec) -> Node:
    return _plain(recorder, Whole(function), inputs, [None] * len(inputs), spec, None)


def _reshaped(recorder: Any, node: Node, spec: Spec) -> Node:
    if node.tensor is not None:
        return recorder.source(node.tensor.reshape(spec.shape))
    if node.dim is not None:
        found = _regrouped(recorder, node, spec)
        if found is not None:
            return found
    return _whole(recorder, lambda pieces: pieces[0].reshape(spec.shape), [node], spec)


def _reordered(recorder: Any, node: Node, order: list[int], spec: Spec) -> Node:
    if node.tensor is not None:
        return recorder.source(node.tensor.permute(order))
    if node.dim is not None:
        return _permuted(recorder, node, order, spec)
    return _whole(recorder, lambda pieces: pieces[0].permute(order), [node], spec)


def _overlaid(recorder: Any, before: Node, written: Node, part: _Part, spec: Spec) -> Optional[Node]:
    """`before` with a part of one dimension replaced by `written`."""
    dim, count = part.dim, len(before.shape)
    stream = fixed_dim(before)
    if stream is None and fixed_dim(written) is not None:
        stream = fixed_dim(written)
        assert stream is not None
        stream += part.dropped and dim <= stream
    stream = default_dim(before.shape) if stream is None else stream
    index = (slice(None),) * dim + (part.start if part.dropped else slice(part.start, part.stop, part.stride),)

    def put(pieces: Sequence[Tensor]) -> Tensor:
        result = pieces[0].clone()
        result[index].copy_(pieces[1])
        return result

    if stream is None:
        return _whole(recorder, put, [before, written], spec)
    if dim == stream:
        step = Overlay(part.start, part.stop, part.stride, dim, single=part.dropped)
        return _plain(recorder, step, [before, written], [dim, None if part.dropped else dim], spec, dim)
    inner = stream - (part.dropped and dim < stream)
    if written.shape[inner] != before.shape[stream] or count == 0:
        return None
    step = RowLocal(lambda pieces, first, last: put(pieces), 2, cheap=True)
    step.samples = (True, True) if dim else None
    return _plain(recorder, step, [before, written], [stream, inner], spec, stream)


def filled(recorder: Any, view: Any, operands: Sequence[Any]) -> Optional[Node]:
    """What `view` shows once `copy_`, `fill_` or `zero_` has filled it."""
    spec: Spec = view.spec
    value = operands[0] if operands else 0
    if not isinstance(value, (Node, Held)):
        return constant(recorder, spec, view.device, value)
    if isinstance(value, Held):
        value = recorder.source(value.tensor)
    if (value.shape, value.dtype, value.device) == (spec.shape, spec.dtype, view.device):
        return value
    dtype, device, shape = spec.dtype, view.device, spec.shape
    dim = fixed_dim(value)
    to = None if dim is None else dim - len(value.shape) + len(shape)
    if to is None or to < 0 or shape[to] != value.shape[value.dim or 0] or shape[to] == 1:
        to = default_dim(shape)
    if to is None:
        return _of_view(recorder, lambda pieces: pieces[0].to(device, dtype).expand(shape), value, spec, device)
    inner = to - len(shape) + len(value.shape)
    by_rows = inner >= 0 and value.shape[inner] == shape[to]
    sizes = [*shape[:to], None, *shape[to + 1 :]]

    def run(pieces: Sequence[Tensor], first: int, last: int) -> Tensor:
        return pieces[0].to(device, dtype).expand([last - first if side is None else side for side in sizes])

    step = RowLocal(run, int(by_rows), cheap=True)
    return recorder.node(step, [value], [inner if by_rows else None], spec, device, to)


def _of_view(recorder: Any, function: Any, value: Node, spec: Spec, device: torch.device) -> Node:
    return recorder.node(Whole(function), [value], [None], spec, device, None)


def cast(recorder: Any, node: Node, spec: Spec) -> Node:
    """`node` in the type of `spec`."""
    dtype, dim = spec.dtype, dim_of(node)
    if dim is None:
        return _whole(recorder, lambda pieces: pieces[0].to(dtype), [node], spec)
    step = Cast(lambda pieces, first, last: pieces[0].to(dtype), widens(node, dtype))
    return _plain(recorder, step, [node], [dim], spec, dim)


def constant(recorder: Any, spec: Spec, device: torch.device, value: Any) -> Node:
    """A tensor of one value."""
    shape, dtype = spec.shape, spec.dtype
    dim = default_dim(shape)
    if dim is None:
        step: Any = Whole(lambda pieces: torch.full(shape, value, dtype=dtype, device=device))
    else:

        def run(pieces: Sequence[Tensor], first: int, last: int) -> Tensor:
            one = torch.full((), value, dtype=dtype, device=device)
            return one.expand([*shape[:dim], last - first, *shape[dim + 1 :]])

        step = RowLocal(run, 0, moves=True)
    return recorder.node(step, (), (), spec, device, dim)
