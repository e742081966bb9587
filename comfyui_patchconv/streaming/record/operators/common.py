"""What the tables of operators share: arguments put in place, and the dimension along which a result comes in rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from ...graph.node import Node, Step
from ...graph.steps import RowLocal
from ..held import Held
from ..schema import operator_of
from ..shapes import SIMPLE, Spec


class OperatorCall(NamedTuple):
    """An operator as a program called it. Its tensors are nodes where they are deferred, else held.

    spec, device: of its result. recorder: makes nodes.
    """

    recorder: Any
    func: Any
    args: Any
    kwargs: dict[str, Any]
    spec: Spec
    device: torch.device

    @property
    def name(self) -> str:
        return operator_of(self.func).name

    def given(self) -> dict[str, Any]:
        """The arguments by name, those left out excepted."""
        return dict(zip(operator_of(self.func).names, self.args)) | self.kwargs

    def node(self, step: Step, inputs: Sequence[Node], dims: Sequence[Optional[int]], dim: Optional[int]) -> Node:
        step.name = self.name
        return self.recorder.node(step, inputs, dims, self.spec, self.device, dim)


class _Place(NamedTuple):
    """Where an argument is the piece of an input."""

    index: int


def over(args: Any, kwargs: dict[str, Any]) -> tuple[list[Node], Callable[[Any, Sequence[Tensor]], Any]]:
    """The nodes among arguments, and what calls a function with pieces in their places."""
    inputs: list[Node] = []
    positional = _placed(list(args), inputs)
    named = {name: _placed(value, inputs) for name, value in kwargs.items()}

    def call(func: Any, pieces: Sequence[Tensor]) -> Any:
        if not named:
            return func(*[_real(value, pieces) for value in positional])
        return func(
            *[_real(value, pieces) for value in positional],
            **{name: _real(value, pieces) for name, value in named.items()},
        )

    return inputs, call


class AsCalled:
    """An operator as the program called it, its tensors nodes or held. writing: the one that does the same to its first
    argument, if the program called that."""

    __slots__ = ("args", "func", "kwargs", "writing", "written")

    def __init__(self, func: Any, args: Any, kwargs: dict[str, Any], writing: Any = None) -> None:
        self.func, self.args, self.kwargs, self.writing = func, args, kwargs, writing
        self.written: Optional[Node] = args[0] if writing is not None else None

    def inputs(self) -> Sequence[Node]:
        """The nodes among its arguments."""
        return over(self.args, self.kwargs)[0]

    def compute(self, pieces: Sequence[Tensor], in_place: bool = False) -> Tensor:
        """What it gives for the values of these. in_place: those of `written` are lost."""
        return over(self.args, self.kwargs)[1](self.writing if in_place else self.func, pieces)


# Not functions within `over` that call themselves: such a one is a circle, and what it holds stays for a while.


def _placed(value: Any, inputs: list[Node]) -> Any:
    """An argument with places instead of nodes, which go to `inputs`."""
    kind = type(value)
    if kind in SIMPLE or kind is Held:
        return value
    if kind is Node:
        inputs.append(value)
        return _Place(len(inputs) - 1)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return [_placed(one, inputs) for one in value]
    return value


def _real(value: Any, pieces: Sequence[Tensor]) -> Any:
    """An argument with tensors in the places of inputs and of what is held."""
    kind = type(value)
    if kind is _Place:
        return pieces[value.index]
    if kind is Held:
        return value.tensor
    return [_real(one, pieces) for one in value] if kind is list else value


def candidates(count: int) -> Sequence[int]:
    """Dimensions along which a tensor of `count` dimensions may come in rows, the usual one first."""
    return {0: (), 3: (2, 1), 4: (2, 3, 1), 5: (3, 4, 2)}.get(count, range(max(count - 2, 0), -1, -1))


def fixed_dim(node: Node) -> Optional[int]:
    """The dimension along which a deferred tensor comes in rows; None where any will do."""
    return None if node.flexible else node.dim


def default_dim(shape: Sequence[int], excluded: Collection[int] = ()) -> Optional[int]:
    """The dimension along which a stored tensor of `shape` is read in rows."""
    return next((dim for dim in candidates(len(shape)) if shape[dim] > 1 and dim not in excluded), None)


def dim_of(node: Node, excluded: Collection[int] = ()) -> Optional[int]:
    """Along which `node` is read in rows, which is none of `excluded`."""
    dim = fixed_dim(node)
    return dim if dim is not None and dim not in excluded else default_dim(node.shape, excluded)


def aligned_dim(nodes: Sequence[Node], shape: Sequence[int], excluded: Collection[int]) -> Optional[int]:
    """Along which a result of `shape` comes in rows, whose dimensions are those of `nodes` counted from the last."""
    count = len(shape)
    for node in nodes:
        dim = fixed_dim(node)
        if dim is not None:
            place = dim - len(node.shape) + count
            if place >= 0 and place not in excluded and shape[place] == node.rows > 1:
                return place
    return default_dim(shape, excluded)


def row_local(
    call: OperatorCall, *, excluded: Collection[int] = (), aligned: bool = True, cheap: bool = True,
    moves: bool = False, work: int = 1,
) -> Optional[Node]:  # fmt: skip
    """The node of an operator whose dimensions are those of its result, counted from the last, and that treats each row
    by itself; `excluded`: dimensions of which that is not true.

    aligned: all tensors broadcast against the result, and come in rows too; else the first alone does, and the others,
    as a norm's weights of which there may be as many as the map has rows, are read whole.
    """
    inputs, apply = over(call.args, call.kwargs)
    shape = call.spec.shape
    dim = aligned_dim(inputs if aligned else inputs[:1], shape, excluded)
    if dim is None:
        return None
    back, rows = len(shape) - dim, shape[dim]
    dims = []
    for number, node in enumerate(inputs):
        place = len(node.shape) - back
        here = place >= 0 and node.shape[place] != 1 and (aligned or not number)
        if here and node.shape[place] != rows:
            return None
        dims.append(place if here else None)
    if not any(place is not None for place in dims):
        return None
    held = [one for one in flat(call.args, call.kwargs) if type(one) is Held] if aligned else []
    sliced = {id(one) for one in held if len(one.shape) >= back and one.shape[len(one.shape) - back] != 1}
    func = call.func
    if sliced:
        inputs, apply, dims = _with_rows_of(call, sliced, inputs, dims, back)
    order = [index for index, place in enumerate(dims) if place is not None]
    step = RowLocal(lambda pieces, first, last: apply(func, pieces), len(order), cheap=cheap, moves=moves)
    step.work = work
    return call.node(step, inputs, dims, dim)


def _with_rows_of(call: OperatorCall, sliced: Collection[int], inputs: list[Node], dims: list[Any], back: int) -> Any:
    """The call, with held tensors that have rows as inputs: they are stored nodes."""
    args = _noded(list(call.args), sliced, call.recorder)
    kwargs = {name: _noded(value, sliced, call.recorder) for name, value in call.kwargs.items()}
    inputs, apply = over(args, kwargs)
    places = [len(node.shape) - back for node in inputs]
    dims = [place if place >= 0 and node.shape[place] != 1 else None for node, place in zip(inputs, places)]
    return inputs, apply, dims


def _noded(value: Any, sliced: Collection[int], recorder: Any) -> Any:
    if isinstance(value, Held) and id(value) in sliced:
        return recorder.source(value.tensor)
    return [_noded(one, sliced, recorder) for one in value] if isinstance(value, (list, tuple)) else value


def flat(*values: Any) -> list[Any]:
    """The values within lists, tuples and dictionaries."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, dict):
            found.extend(flat(*value.values()))
        elif isinstance(value, (list, tuple)):
            found.extend(flat(*value))
        else:
            found.append(value)
    return found


def sides_of(call: OperatorCall) -> int:
    """Of how many sides a pool's windows are, as its name says."""
    return int(call.name.split("d_with")[0].removesuffix("d")[-1])


def each(value: Any, sides: int) -> list[int]:
    """A number for each side."""
    values = [value] if isinstance(value, int) else list(value)
    return values * sides if len(values) == 1 else values


def tensor_of(value: Any) -> Optional[Tensor]:
    """The tensor that is held; None where there is none."""
    return value.tensor if isinstance(value, Held) else None
