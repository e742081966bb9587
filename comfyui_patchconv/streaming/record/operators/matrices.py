"""Products of matrices and attention: rows of one factor, all of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ...graph import attention
from ...graph.node import Node
from ...graph.steps import RowLocal
from ..memory import Held
from .common import Call, default_dim, dim_of, fixed_dim, over, row_local


def linear(call: Call) -> Optional[Node]:
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


def product(call: Call) -> Optional[Node]:
    """`matmul`, `bmm`, `mm`, `baddbmm`, `addmm`: along the rows of the first factor or the columns of the second."""
    place = 1 if call.name in ("baddbmm", "addmm") else 0
    one, other = call.args[place], call.args[place + 1]
    count = len(call.spec.shape)
    if len(one.shape) < 2 or len(other.shape) < 2 or count < 2 or (place and isinstance(call.args[0], Node)):
        return None
    back = _along(one, other, call.spec.shape)
    if back is None or (place and call.args[0].shape and prod_of(call.args[0].shape) > 1):
        return None
    dim = count - back
    inputs, apply = over(call.args, call.kwargs)
    dims: list[Optional[int]] = []
    for node in inputs:
        follows = node is (one if back == 2 else other) if back < 3 else len(node.shape) >= back
        inner = len(node.shape) - back
        dims.append(inner if follows and inner >= 0 and (back < 3 or node.shape[inner] != 1) else None)
    if not any(place is not None for place in dims) or (back == 2 and one is other):
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


def prod_of(shape: Sequence[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


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


def scaled_dot_product(call: Call) -> Optional[Node]:
    """Attention of queries `[…, pixels, C]`: any rows of them with all keys and values, and their rows of a mask."""
    given = {"dropout_p": 0.0, "is_causal": False, "attn_mask": None, "enable_gqa": False} | call.given()
    query, key, value, mask = given["query"], given["key"], given["value"], given["attn_mask"]
    if given["dropout_p"] or not isinstance(query, Node) or not len(query.shape) == len(key.shape) == len(value.shape):
        return None
    count, dim = len(query.shape), _dim_of_queries(query)
    if dim is None:
        return None
    if dim != count - 2:  # windows that lie one behind the other: each by itself
        return None if given["is_causal"] else _windows(call, query, key, value, mask, dim)
    causal, keys = given["is_causal"], key.shape[-2]
    if isinstance(mask, Held) and len(mask.shape) > 1 and mask.shape[-2] != 1:
        mask = call.recorder.source(mask.tensor)
    inputs, apply = over((query, key, value, mask), {})
    options = {"scale": given.get("scale")} | ({"enable_gqa": True} if given["enable_gqa"] else {})
    usual = count == 4 and mask is None and not causal and not given["enable_gqa"]
    usual = usual and query.shape[:2] == key.shape[:2] == value.shape[:2]

    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Optional[Tensor], first: int) -> Tensor:
        given: Any = options
        if usual:
            return attention.attend(q, k, v, options["scale"])
        if causal:
            rows = torch.ones(q.shape[-2], keys, dtype=torch.bool, device=q.device).tril(first)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rows, **given)

    dims = [dim if node is query and not place else None for place, node in enumerate(inputs)]
    if isinstance(mask, Node) and len(mask.shape) > 1 and mask.shape[-2] != 1:
        dims[-1] = len(mask.shape) - 2

    def run(pieces: Sequence[Tensor], first: int, last: int) -> Tensor:
        return apply(lambda q, k, v, rows: attend(q, k, v, rows, first), pieces)

    step = RowLocal(run, sum(one is not None for one in dims))
    step.work = 2 * keys
    step.workspace = attention.bytes_of_scores(*(_like(one, call) for one in (query, key, value))) if count == 4 else 0
    step.least_rows = attention.least_rows(1, call.device)
    return call.node(step, inputs, dims, dim)


def _dim_of_queries(query: Node) -> Optional[int]:
    """Along which queries `[…, pixels, C]` come in rows: their pixels, unless they come along another already."""
    count, dim = len(query.shape), fixed_dim(query)
    dim = count - 2 if dim is None and query.shape[-2] > 1 else dim
    return default_dim(query.shape, (count - 1,)) if dim is None or dim == count - 1 else dim


def _like(value: Any, call: Call) -> Any:
    return attention.Shape(tuple(value.shape), call.spec.dtype, call.device)


def _windows(call: Call, query: Node, key: Any, value: Any, mask: Any, dim: int) -> Optional[Node]:
    if mask is not None or not all(isinstance(one, Node) and one.shape[dim] == query.rows for one in (key, value)):
        return None
    inputs, apply = over(call.args, call.kwargs)
    func = call.func
    step = RowLocal(lambda pieces, first, last: apply(func, pieces), len(inputs))
    return call.node(step, inputs, [dim] * len(inputs), dim)


TABLE: dict[str, Callable[[Call], Optional[Node]]] = {
    "linear": linear,
    **dict.fromkeys(("matmul", "bmm", "mm", "baddbmm", "addmm"), product),
    "scaled_dot_product_attention": scaled_dot_product,
}
