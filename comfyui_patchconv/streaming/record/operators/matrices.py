"""Products of matrices and attention: rows of one factor, all of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Optional

import torch
from torch import Tensor

from ...graph import attention
from ...graph.node import Node, dense_strides
from ...graph.statistics import in_float64
from ...graph.steps import Reduce, RowLocal
from ..held import Held
from ..shapes import Spec
from .common import OperatorCall, default_dim, dim_of, fixed_dim, over, row_local


def linear(call: OperatorCall) -> Optional[Node]:
    input = call.args[0]
    if not isinstance(input, Node) or len(call.args[1].shape) != 2:
        return None
    last = len(input.shape) - 1
    if not any(isinstance(value, Node) for value in call.args[1:]):
        return row_local(call, excluded=(last,), aligned=False, cheap=False, work=input.shape[-1])
    dim = dim_of(input, (last,))  # of a weight that is made anew all is read
    if dim is None:
        return None
    inputs, apply = over(call.args, call.kwargs)
    step = RowLocal(lambda pieces, first, last: apply(call.func, pieces), 1)
    step.work = input.shape[-1]
    return call.node(step, inputs, [dim, *(None,) * (len(inputs) - 1)], dim)


def product(call: OperatorCall) -> Optional[Node]:
    """`matmul`, `bmm`, `mm`, `baddbmm`, `addmm`: along the rows of the first factor or the columns of the second."""
    place = 1 if call.name in ("baddbmm", "addmm") else 0
    one, other = call.args[place], call.args[place + 1]
    count = len(call.spec.shape)
    if len(one.shape) < 2 or len(other.shape) < 2 or count < 2 or (place and isinstance(call.args[0], Node)):
        return None
    if not place and _sums_over_rows(one, other, call):
        return _summed_over_rows(call, one, other)
    back = _along(one, other, call.spec.shape)
    if back is None or (place and call.args[0].shape and prod(call.args[0].shape) > 1):
        return None
    dim = count - back
    inputs, apply = over(call.args, call.kwargs)
    dims: list[Optional[int]] = []
    for node in inputs:
        follows = node is (one if back == 2 else other) if back < 3 else len(node.shape) >= back
        inner = len(node.shape) - back
        dims.append(inner if follows and inner >= 0 and (back < 3 or node.shape[inner] != 1) else None)
    if not any(place is not None for place in dims) or (back < 3 and one is other):
        return None
    held = [value for value in (one, other) if isinstance(value, Held)]
    if back > 2 and any(len(value.shape) >= back and value.shape[len(value.shape) - back] != 1 for value in held):
        return None
    rows = sum(1 for place in dims if place is not None)
    func = call.func
    step = RowLocal(lambda pieces, first, last: apply(func, pieces), rows)
    step.work = one.shape[-1]
    step.least_rows = 1
    return call.node(step, inputs, dims, dim)


_FEWER = 4
"""How many times more values two factors have than their product, from which on it is summed rather than computed of
both at once."""


def _sums_over_rows(one: Any, other: Any, call: OperatorCall) -> bool:
    """Whether a product `[…, M, K] @ […, K, N]` sums over what rows come along, and is small: linear attention's is."""
    if not isinstance(one, Node) or not isinstance(other, Node) or one is other:
        return False
    count = len(call.spec.shape)
    if not len(one.shape) == len(other.shape) == count or one.shape[:-2] != other.shape[:-2]:
        return False
    fixed = [(fixed_dim(node), dim) for node, dim in ((one, count - 1), (other, count - 2))]
    along = [dim is not None and dim == wanted for dim, wanted in fixed]
    others = any(dim is not None and dim != wanted for dim, wanted in fixed)
    few = _FEWER * prod(call.spec.shape) <= prod(one.shape) + prod(other.shape)
    floating = one.dtype == other.dtype and one.dtype.is_floating_point
    return any(along) and not others and few and floating


def _summed_over_rows(call: OperatorCall, one: Node, other: Node) -> Node:
    """Such a product, gathered in a pass over the rows of both."""
    (m, k), n = one.shape[-2:], other.shape[-1]
    count, batch = len(one.shape), one.shape[:-2]
    strides = dense_strides((*batch, m + n, k), range(count, 0, -1))
    assert strides is not None
    spec = Spec((*batch, m + n, k), tuple(strides), 0, one.dtype)
    step = RowLocal(lambda pieces, first, last: torch.cat((pieces[0], pieces[1].mT), -2), 2, moves=True)
    both = call.recorder.node(step, [one, other], [count - 1, count - 2], spec, call.device, count - 1)
    shape = call.spec.shape
    return call.node(Reduce(lambda: _Product(m, shape)), [both], [count - 1], None)


class _Product:
    """A product of matrices, summed over what is `[…, M + N, rows]` of both: of each strip in single precision at
    least, the sum in double precision where its device has that.

    first: M. shape: the product's.
    """

    def __init__(self, first: int, shape: Sequence[int]) -> None:
        self._first, self._shape, self.numbers = first, shape, 1 + prod(shape)
        self._value: Optional[Tensor] = None

    def add(self, piece: Tensor) -> None:
        wide = piece if piece.dtype == torch.float64 else piece.float()
        one, other = wide.tensor_split((self._first,), -2)
        part = in_float64(one @ other.mT)
        self._value = part if self._value is None else self._value + part

    def state(self) -> Tensor:
        if self._value is None:
            return torch.zeros(self.numbers, dtype=torch.float64)
        return torch.cat((torch.ones(1, dtype=torch.float64), self._value.reshape(-1).cpu()))

    def merge(self, states: Sequence[Tensor]) -> None:
        parts = [state[1:].view(*self._shape) for state in states if state[0]]
        self._value = torch.stack(parts).sum(0)

    def result(self, like: Tensor) -> None:
        assert self._value is not None
        like.copy_(self._value)


def _along(one: Any, other: Any, shape: Sequence[int]) -> Optional[int]:
    """Along which dimension of the result, counted from the last, it comes in rows."""
    count = len(shape)
    for value, back in ((one, 2), (other, 1)):
        dim = fixed_dim(value) if isinstance(value, Node) else None
        if dim is not None:
            place = len(value.shape) - dim
            if place == back or (place > 2 and shape[count - place] == value.rows):
                return place
    if isinstance(one, Node) and one.shape[-2] > 1:
        return 2
    if isinstance(other, Node) and other.shape[-1] > 1 and not isinstance(one, Node):
        return 1
    return None


def einsum(call: OperatorCall) -> Optional[Node]:
    """Along one letter of the result: rows of the factors that have it, all of those that do not."""
    given = call.given()
    factors = given["tensors"]
    before, arrow, after = given["equation"].replace(" ", "").partition("->")
    letters = before.split(",")
    if not arrow or "." in before + after or len(letters) != len(factors):
        return None
    places = [
        [one.index(letter) if letter in one and factor.shape[one.index(letter)] != 1 else None for letter in after]
        for one, factor in zip(letters, factors)
    ]
    dim = _dim_of_sums(factors, places, call.spec.shape)
    if dim is None or any(one.count(after[dim]) > 1 for one in letters):
        return None
    along = [place[dim] for place in places]
    whole = [factor for factor, place in zip(factors, along) if isinstance(factor, Node) and place is None]
    if any(factor is one for factor, place in zip(factors, along) if place is not None for one in whole):
        return None
    made = [
        call.recorder.source(factor.tensor) if isinstance(factor, Held) and place is not None else factor
        for factor, place in zip(factors, along)
    ]
    inputs, apply = over((given["equation"], made), {})
    dims = [place for factor, place in zip(made, along) if isinstance(factor, Node)]
    func = call.func
    step = RowLocal(lambda pieces, first, last: apply(func, pieces), sum(place is not None for place in dims))
    sides = {
        letter: side for one, factor in zip(letters, factors) for letter, side in zip(one, factor.shape) if side != 1
    }
    step.work = prod(side for letter, side in sides.items() if letter not in after)
    return call.node(step, inputs, dims, dim)


def _dim_of_sums(factors: Any, places: Sequence[Sequence[Optional[int]]], shape: Sequence[int]) -> Optional[int]:
    """Along which a sum of products comes in rows: as a factor does already, else as a tensor of its shape would.

    places: of each factor, the dimension that is this one of the result's, for each of these.
    """
    for factor, place in zip(factors, places):
        fixed = fixed_dim(factor) if isinstance(factor, Node) else None
        if fixed is not None and fixed in place:
            return place.index(fixed)
    nodes = [place for factor, place in zip(factors, places) if isinstance(factor, Node)]
    alone = [dim for dim in range(len(shape)) if all(place[dim] is None for place in nodes)]
    return default_dim(shape, alone)


def scaled_dot_product(call: OperatorCall) -> Optional[Node]:
    """Attention of queries `[…, pixels, C]`: any rows of them with all keys and values, and their rows of a mask."""
    given = {"dropout_p": 0.0, "is_causal": False, "attn_mask": None, "enable_gqa": False} | call.given()
    query, key, value, mask = given["query"], given["key"], given["value"], given["attn_mask"]
    if given["dropout_p"] or not isinstance(query, Node) or not len(query.shape) == len(key.shape) == len(value.shape):
        return None
    count, dim = len(query.shape), _dim_of_queries(query)
    if dim is None:
        return None
    if dim != count - 2:  # windows that lie one behind the other: each by itself
        return None if given["is_causal"] else _windows(call, given, dim)
    causal, keys = given["is_causal"], key.shape[-2]
    if isinstance(mask, Held) and len(mask.shape) > 1 and mask.shape[-2] != 1:
        mask = call.recorder.source(mask.tensor)
    inputs, apply = over((query, key, value, mask), {})
    asked, options = _asked(given, call), _options(given)

    dims = [dim if node is query and not place else None for place, node in enumerate(inputs)]
    if isinstance(mask, Node) and len(mask.shape) > 1 and mask.shape[-2] != 1:
        dims[-1] = len(mask.shape) - 2

    def run(pieces: Sequence[Tensor], first: int, last: int) -> Tensor:
        start = first if causal else None
        return apply(lambda q, k, v, rows: attention.attend(q, k, v, rows, start, **options), pieces)

    in_turn = mask is None and not given["enable_gqa"] and len(inputs) == 3
    in_turn = in_turn and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    rows = sum(one is not None for one in dims)
    step = attention.Attend(run, rows, given.get("scale"), bool(causal), in_turn)
    step.work = 2 * keys
    step.workspace, step.bytes_beside = attention.bytes_of_scores(asked), attention.eager_bytes(asked)
    step.least_rows = attention.least_rows(prod(query.shape[:-2]), call.device)
    return call.node(step, inputs, dims, dim)


def _dim_of_queries(query: Node) -> Optional[int]:
    """Along which queries `[…, pixels, C]` come in rows: their pixels, unless they come along another already."""
    count, dim = len(query.shape), fixed_dim(query)
    dim = count - 2 if dim is None and query.shape[-2] > 1 else dim
    return default_dim(query.shape, (count - 1,)) if dim is None or dim == count - 1 else dim


def _options(given: dict[str, Any]) -> dict[str, Any]:
    return {"scale": given.get("scale")} | ({"enable_gqa": True} if given["enable_gqa"] else {})


def _asked(given: dict[str, Any], call: OperatorCall, apart: Optional[int] = None) -> attention.Asked:
    """What a call asks for."""
    three = given["query"], given["key"], given["value"]
    ordered = all(not isinstance(one, Node) or one.strides[-1] == 1 for one in three)
    query, key, value = (attention.Shape(tuple(one.shape), call.spec.dtype, call.device) for one in three)
    mask = given["attn_mask"]
    seen = None if mask is None else attention.Shape(tuple(mask.shape), mask.dtype, call.device)
    return attention.Asked(
        query, key, value, seen, bool(given["is_causal"]), bool(given["enable_gqa"]), ordered, apart
    )  # fmt: skip


def _windows(call: OperatorCall, given: dict[str, Any], dim: int) -> Optional[Node]:
    query, key, value, mask = given["query"], given["key"], given["value"], given["attn_mask"]
    if mask is not None or not all(isinstance(one, Node) and one.shape[dim] == query.rows for one in (key, value)):
        return None
    inputs, apply = over((query, key, value), {})
    asked, options = _asked(given, call, dim), _options(given)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.attend(q, k, v, apart=dim, **options)

    step = RowLocal(lambda pieces, first, last: apply(run, pieces), len(inputs))
    step.workspace, step.bytes_beside = attention.bytes_of_scores(asked), attention.eager_bytes(asked)
    return call.node(step, inputs, [dim] * len(inputs), dim)


TABLE: dict[str, Callable[[OperatorCall], Optional[Node]]] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "bmm", "mm", "baddbmm", "addmm"), product),
    "einsum": einsum,
    "scaled_dot_product_attention": scaled_dot_product,
}
