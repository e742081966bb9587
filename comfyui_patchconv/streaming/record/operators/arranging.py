"""What copies values to other places: joins, repeats, rolls; and what treats a dimension as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from ...graph.node import Node
from ...graph.steps import Cast, Join, Regroup, Resample, RowLocal
from ..held import Held
from .common import OperatorCall, candidates, default_dim, dim_of, fixed_dim, row_local
from .resample import gathered_rows


def join(call: OperatorCall) -> Optional[Node]:
    """`cat`: side by side, or one below the other."""
    given = call.given()
    parts = [one if isinstance(one, Node) else call.recorder.source(one.tensor) for one in given["tensors"]]
    count = len(call.spec.shape)
    along = given.get("dim", 0) % max(count, 1)
    parts = [part for part in parts if len(part.shape) == count]
    if len(parts) != len(given["tensors"]) or len({part.device for part in parts}) > 1:
        return None
    dim = next((one for one in map(fixed_dim, parts) if one is not None), None)
    dim = default_dim(call.spec.shape) if dim is None else dim
    if dim is None:
        return None
    dtype = call.spec.dtype
    if dim == along:
        if any(part.dtype != dtype for part in parts):
            return None
        return call.node(Join([part.shape[dim] for part in parts], dim), parts, [dim] * len(parts), dim)

    def run(pieces: Sequence[Tensor], first: int, last: int) -> Tensor:
        return torch.cat(list(pieces), along)

    step = RowLocal(run, len(parts), cheap=True, moves=True)
    return call.node(step, parts, [dim] * len(parts), dim)


def stack(call: OperatorCall) -> Optional[Node]:
    given = call.given()
    parts = [one if isinstance(one, Node) else call.recorder.source(one.tensor) for one in given["tensors"]]
    count = len(call.spec.shape)
    along = given.get("dim", 0) % count
    inner = next((one for one in map(fixed_dim, parts) if one is not None), None)
    inner = default_dim(parts[0].shape) if inner is None else inner
    if inner is None or len({part.device for part in parts}) > 1:
        return None
    dim = inner + (along <= inner)

    def run(pieces: Sequence[Tensor], first: int, last: int) -> Tensor:
        return torch.stack(list(pieces), along)

    return call.node(RowLocal(run, len(parts), cheap=True, moves=True), parts, [inner] * len(parts), dim)


def repeat(call: OperatorCall) -> Optional[Node]:
    """`repeat`, and `tile`, which may name the last dimensions alone."""
    input, times = call.args[0], call.args[1]
    if not isinstance(input, Node):
        return None
    times = [*(1,) * (len(input.shape) - len(times)), *times]
    added = len(times) - len(input.shape)
    dim = dim_of(input, [place - added for place, one in enumerate(times) if one != 1])
    if dim is None or added < 0:
        return None
    func = call.func
    step = RowLocal(lambda pieces, first, last: func(pieces[0], times), 1, cheap=True, moves=True)
    return call.node(step, [input], [dim], dim + added)


def repeat_interleave(call: OperatorCall) -> Optional[Node]:
    given = call.given()
    input, times, along = given.get("self"), given.get("repeats"), given.get("dim")
    if not isinstance(input, Node) or not isinstance(times, int) or along is None or times < 1:
        return None
    along %= len(input.shape)
    dim = dim_of(input)
    if dim is None:
        return None
    repeats = [times if place == along else 1 for place in range(len(input.shape))]
    up = times if dim == along else 1
    step = Resample(
        up, 1, input.shape[dim], dim, lambda piece: piece.repeat_interleave(times, along), cheap=True, repeats=repeats
    )
    return call.node(step, [input], [dim], dim)


def roll(call: OperatorCall) -> Optional[Node]:
    given = call.given()
    input, shifts, dims = given["self"], given["shifts"], given.get("dims") or ()
    shifts, dims = ([value] if isinstance(value, int) else list(value) for value in (shifts, dims))
    if not isinstance(input, Node) or len(shifts) != len(dims):
        return None
    count = len(input.shape)
    moved = {dim % count: shift for dim, shift in zip(dims, shifts)}
    dim = dim_of(input)
    if dim is None or len(moved) != len(dims):
        return None
    others = {one: shift for one, shift in moved.items() if one != dim}
    shift = moved.get(dim, 0) % input.shape[dim]

    def run(piece: Tensor) -> Tensor:
        return torch.roll(piece, list(others.values()), list(others)) if others else piece

    if not shift:
        step = RowLocal(lambda pieces, first, last: run(pieces[0]), 1, cheap=True, moves=True)
        return call.node(step, [input], [dim], dim)
    return gathered_rows(call, input, dim, lambda first, last: (first - shift, last - shift), run)


def along_a_dimension(call: OperatorCall) -> Optional[Node]:
    """Operators that need all of one dimension, or several, and treat the others place by place."""
    given = call.given()
    input = given.get("self", given.get("input"))
    dims = given.get("dim", given.get("dims"))
    if not isinstance(input, Node) or dims is None or not input.shape:
        return None
    dims = [dims] if isinstance(dims, int) else dims
    index = given.get("index")
    if isinstance(index, Node) or (isinstance(index, Held) and call.name != "index_select"):
        return None
    return row_local(call, excluded=[dim % len(input.shape) for dim in dims], aligned=False)


def indexed(call: OperatorCall) -> Optional[Node]:
    """`x[:, [2, 1, 0]]`: places along one dimension, which is none that rows lie along."""
    input, indices = call.args
    places = [place for place, index in enumerate(indices) if index is not None]
    alone = len(places) == 1 and isinstance(indices[places[0]], Held) and len(indices[places[0]].shape) == 1
    return row_local(call, excluded=places, aligned=False) if alone and isinstance(input, Node) else None


TABLE: dict[str, Callable[[OperatorCall], Optional[Node]]] = {
    "index": indexed,
    **dict.fromkeys(("cat", "concat", "concatenate"), join),
    "stack": stack,
    **dict.fromkeys(("repeat", "tile"), repeat),
    "repeat_interleave": repeat_interleave,
    "roll": roll,
    **dict.fromkeys(
        (
            "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "glu", "flip", "index_select",
            "logcumsumexp",
        ),
        along_a_dimension,
    ),
}  # fmt: skip


def cast(call: OperatorCall) -> Optional[Node]:
    """`to` another type or device, strip by strip; strips wait for their copies, for the host may read them."""
    input: Any = call.args[0]
    if not isinstance(input, Node):
        return None
    dim, dtype, device = dim_of(input), call.spec.dtype, call.device
    if dim is None:
        return None
    step = Cast(
        lambda pieces, first, last: pieces[0].to(device, dtype), device == input.device and widens(input, dtype)
    )
    return call.node(step, [input], [dim], dim)


def widens(input: Node, dtype: torch.dtype) -> bool:
    """Whether values of `input` are the same in a type of more bytes."""
    floating = input.dtype.is_floating_point and dtype.is_floating_point
    larger = dtype.itemsize > input.itemsize > 1  # types of 8 bits are promoted to none
    return floating and larger and torch.promote_types(input.dtype, dtype) == dtype


TABLE.update(dict.fromkeys(("to", "_to_copy", "type_as", "float", "double", "half", "bfloat16"), cast))


def regroup(call: OperatorCall) -> Optional[Node]:
    """`reshape` and its like where they copy."""
    input = call.args[0]
    step = regrouped(input, call.spec.shape) if isinstance(input, Node) else None
    return None if step is None else call.node(step, [input], [step.from_dim], step.to_dim)


def regrouped(input: Node, shape: Sequence[int]) -> Optional[Regroup]:
    """How rows of `input` become rows of a tensor of `shape`: those that it comes in, or else those along another
    dimension, for which it has to be stored."""
    dim = fixed_dim(input)
    if dim is None:
        return None
    dims = (dim, *(one for one in candidates(len(input.shape)) if one != dim and input.shape[one] > 1))
    steps = (Regroup.between(input.shape, one, shape) for one in dims)
    return next((step for step in steps if step is not None), None)


def same(call: OperatorCall) -> Optional[Node]:
    """`contiguous` and its like where they copy: the values as they are."""
    input = call.args[0]
    dim = dim_of(input) if isinstance(input, Node) else None
    if dim is None or input.dtype != call.spec.dtype:
        return None
    step = RowLocal(lambda pieces, first, last: pieces[0], 1, moves=True)
    return call.node(step, [input], [dim], dim)


TABLE.update(dict.fromkeys(("reshape", "flatten", "_reshape_copy", "unflatten", "view_copy", "ravel"), regroup))
TABLE.update(dict.fromkeys(("contiguous", "lift_fresh_copy", "detach_copy", "alias_copy"), same))
