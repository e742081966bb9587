"""Maps with their dimensions arranged anew: pixels in one row, `[B, C, H·W]`, as attention has them, or channels last.

A map that is looked at so is still deferred. Its layout is a tensor without values whose strides say where in a
contiguous `[B, C, H, W]` each element lies; what arranges dimensions only is applied to that. Attention, linear layers
and norms on such views are steps on the map; anything else is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import gcd, prod
from typing import Any, Optional

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from . import attention, operators
from .graph import Attend, Node, Resample, RowLocal

Viewed = tuple[Node, Tensor]
"""A map and its layout."""

_ARRANGING = (*operators.ARRANGING, "unsqueeze", "squeeze", "t")
_KEEPING = (*operators.SAME, "clone")
_MERGING = ("flatten", "reshape", "view", "_unsafe_view")
SEVERAL = ("split", "split_with_sizes", "chunk", "unbind")
"""Operators with several results."""

_OF_LAST = ("linear", "layer_norm", "rms_norm")
"""Operators on the last dimension."""


def layout_of(node: Node) -> Tensor:
    """The layout of a map that is looked at as it is."""
    return torch.empty(node.shape, dtype=node.dtype, device="meta")


def shape_of(layout: Tensor) -> torch.Size:
    """The shape of what is looked at; where dimensions were merged that no stride can go through, not the layout's."""
    return getattr(layout, "merged", layout.shape)


def evaluated(tensor: Tensor, layout: Tensor) -> Tensor:
    """The values of a view, contiguous, from the whole map."""
    return tensor.contiguous().as_strided(layout.shape, layout.stride()).reshape(shape_of(layout)).contiguous()


def build(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[list[Viewed]]:
    """What `func` returns, its deferred arguments being given as `(map, layout)`; None if it has to be evaluated."""
    name = func.overloadpacket.__name__
    merged = [any(hasattr(part, "merged") for part in value) if isinstance(value, tuple) else False for value in args]
    if any(merged[1:]) or (any(merged) and name in SEVERAL):
        return None
    if name in SEVERAL:
        return _parts(func, args, kwargs)
    viewed = _one(func, name, args, kwargs)
    return None if viewed is None else [viewed]


def _one(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[Viewed]:
    if not isinstance(args[0], tuple) or len(args[0]) != 2 or not isinstance(args[0][0], Node):
        return None
    node, layout = args[0]
    if hasattr(layout, "merged"):
        return _rearranged(func, node, layout, args[1:], kwargs) if name in _MERGING else None
    if name in _ARRANGING:
        return _arranged(func, node, layout, args[1:], kwargs)
    if name in _KEEPING or (name == "dropout" and not args[2]):
        return node, layout
    if name == "slice":
        return _sliced(node, layout, *args[1:])
    if len(node.shape) == 4 and layout.dim() == 3:
        if name in _OF_LAST:
            return _over_channels(func, name, node, layout, args[1:], kwargs)
        if name == "group_norm" and _lies(layout, *_channels_first(node)):
            normal = operators.build(func, (node, *args[1:]), kwargs)
            return None if normal is None else (normal[0], layout)
    if name == "scaled_dot_product_attention":
        return _attention(args, kwargs)
    return _permuted(func, name, args, kwargs) or _pointwise(func, name, layout, args, kwargs)


def _arranged(func: Any, node: Node, layout: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[Viewed]:
    if any(isinstance(value, (Tensor, tuple)) and _holds_map(value) for value in args):
        return None
    try:
        result = func(layout, *args, **kwargs)
    except (RuntimeError, ValueError):  # ValueError: from a fake tensor
        return _rearranged(func, node, layout, args, kwargs)  # a view that these strides do not allow
    if result.numel() != layout.numel() or result.dtype != layout.dtype:
        return None
    shares = result.untyped_storage()._cdata == layout.untyped_storage()._cdata
    rows_last = tuple(result.shape[-2:]) == node.shape[-2:] and result.stride()[-2:] == (node.shape[-1], 1)
    back = (len(node.shape) > 5 or rows_last) and result.dim() in (4, 5)  # split, exchanged and merged
    back &= not is_map(node, result)
    return (node, result) if shares and not back else _rearranged(func, node, layout, args, kwargs)


def _rearranged(func: Any, node: Node, layout: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[Viewed]:
    """The values of a view in their order there, as in a pixel shuffle written as views: dimensions split, exchanged
    and merged, all at once or in turn. While they are merged in turn it is a layout still, that says so (`shape_of`).

    None where they would be other values, or where no rows of `node` are rows of the result.
    """
    meta = func(torch.empty(shape_of(layout), dtype=layout.dtype, device="meta"), *args, **kwargs)
    if meta.numel() != layout.numel() or meta.dtype != layout.dtype:
        return None
    shape, result = meta.shape, _map_of(node, layout, meta.shape)
    if result is None and len(shape) > 5 and func.overloadpacket.__name__ in _MERGING:
        layout = layout.as_strided(layout.shape, layout.stride())  # one of its own
        layout.merged = shape  # type: ignore[attr-defined]
        return node, layout
    return result


def _map_of(node: Node, layout: Tensor, shape: torch.Size) -> Optional[Viewed]:
    """A map of this shape of a view's values, where some rows of it come of some rows of `node`."""
    if len(shape) < 4 or not layout.numel():
        return None
    width, size = node.shape[-1], node.height * node.shape[-1]
    sides, strides = zip(*((side, stride) for side, stride in zip(layout.shape, layout.stride()) if side > 1))
    for side, stride in zip(sides, strides):
        unit, limit = (1, width) if stride < width else (width, size) if stride < size else (size, stride * side)
        if stride % unit or (stride and side * stride > limit):
            return None
    common = gcd(node.height, shape[-2])
    up, down = shape[-2] // common, node.height // common
    before = prod(shape[:-2])
    places = [place for place in range(len(sides)) if prod(sides[:place]) == before]
    place = next((place for place in places if (sides[place], strides[place]) == (common, down * width)), None)
    if place is None:
        return None

    def call(pieces: Sequence[Tensor]) -> Tensor:
        piece = pieces[0].contiguous()
        count = piece.shape[-2]
        steps = [stride // node.height * count if stride >= size else stride for stride in strides]
        values = piece.as_strided((*sides[:place], count // down, *sides[place + 1 :]), steps)
        return values.reshape(*shape[:-2], count // down * up, shape[-1])

    result = node.then(Resample(up, down, call), shape)
    return result, layout_of(result)


def _holds_map(value: Any) -> bool:
    return isinstance(value, Tensor) or any(isinstance(one, Node) for one in value)


def _sliced(node: Node, layout: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """A slice that takes everything, as a loop over parts of the queries makes it when one part will do."""
    everything = start in (None, 0) and (end is None or end >= layout.shape[dim]) and step == 1
    return (node, layout) if everything else None


def _parts(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[list[Viewed]]:
    """Parts of the channels of `[B, pixels, C]` or `[B, 1, pixels, C]`: queries, keys and values of one projection."""
    if not isinstance(args[0], tuple) or not isinstance(args[0][0], Node) or len(args[0][0].shape) != 4:
        return None
    node, layout = args[0]
    dims, dim = layout.dim(), kwargs.get("dim", args[2] if len(args) > 2 else 0)
    if dims not in (3, 4) or dim % dims != dims - 1 or not _lies(layout, *_of_heads(node, 1, dims)):
        return None
    sizes = [len(part) for part in func(torch.empty(node.shape[1], device="meta"), args[1], 0)]
    parts = []
    for first, size in zip(accumulate(sizes, initial=0), sizes):
        step = RowLocal(lambda pieces, first=first, size=size: pieces[0].narrow(1, first, size))
        part = node.then(step, (node.shape[0], size, *node.shape[2:]))
        parts.append((part, _meta(*_of_heads(part, 1, dims), part.dtype)))
    return parts


def _over_channels(
    func: Any, name: str, node: Node, layout: Tensor, args: Sequence[Any], kwargs: dict[str, Any]
) -> Optional[Viewed]:
    """A linear layer or a norm over the channels of `[B, pixels, C]`."""
    if not _lies(layout, *_channels_last(node)) or (name != "linear" and len(args[0]) != 1):
        return None
    if any(isinstance(value, tuple) and _holds_map(value) for value in (*args, *kwargs.values())):
        return None
    values = [operators.own(value) for value in args]

    def call(pieces: Sequence[Tensor]) -> Tensor:
        if name == "linear":
            return F.conv2d(pieces[0], values[0][:, :, None, None], *values[1:])
        return func(pieces[0].movedim(1, -1), *values, **kwargs).movedim(-1, 1)

    channels = len(values[0]) if name == "linear" else node.shape[1]
    result = node.then(RowLocal(call), (node.shape[0], channels, *node.shape[2:]))
    return result, _meta(*_channels_last(result), result.dtype)


def _permuted(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[Viewed]:
    """Operators on a map whose dimensions are in another order, which treat each row by itself all the same."""
    node, layout = args[0]
    order = _order(node, layout)
    if order is None or any(isinstance(value, (tuple, Tensor)) for value in kwargs.values()):
        return None
    row, plain = order.index(len(order) - 2), name.rstrip("_") if not name.startswith("_") else name
    if plain in operators.POINTWISE:
        func = getattr(getattr(torch.ops.aten, plain), func._overloadname)
    elif name in _OF_LAST:
        if row == len(order) - 1 or (name != "linear" and len(args[1]) != 1):
            return None
    elif name not in operators.OVER_CHANNELS or not _reduces_others(args, kwargs, row, len(order)):
        return None
    places, inputs, values = [], [], list(args)
    for place, value in enumerate(args):
        if isinstance(value, tuple) and value and isinstance(value[0], Node):
            if value[0].height != node.height or _order(*value) != order:
                return None
            places.append(place)
            inputs.append(value[0])
        elif isinstance(value, Tensor) and name not in _OF_LAST:
            side = value.dim() - len(order) + row
            if side >= 0 and value.shape[side] != 1:
                return None
        values[place] = operators.own(value)
    back = [order.index(dim) for dim in range(len(order))]

    def call(pieces: Sequence[Tensor], values: Sequence[Any] = tuple(values)) -> Tensor:
        given = list(values)
        for place, piece in zip(places, pieces):
            given[place] = piece.permute(order)
        return func(*given, **kwargs).permute(back)

    empty = [layout_of(one) for one in inputs]
    meta = call(empty, [value.to("meta") if isinstance(value, Tensor) else value for value in values])
    if meta.dim() != len(order) or meta.shape[-2] != node.height:
        return None
    result = Node(node.run, meta.shape, meta.dtype, node.device, RowLocal(call), inputs)
    return result, layout_of(result).permute(order)


def _reduces_others(args: Sequence[Any], kwargs: dict[str, Any], row: int, dims: int) -> bool:
    """Whether a reduction keeps the rows, and all dimensions."""
    lists = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, (list, tuple))]
    keeps = kwargs.get("keepdim", True in [value for value in args[1:] if isinstance(value, bool)])
    return bool(keeps) and len(lists) == 1 and bool(lists[0]) and row not in [dim % dims for dim in lists[0]]


def _order(node: Node, layout: Tensor) -> Optional[list[int]]:
    """For each dimension of a layout that is a permutation of a map's, which of the map's it is; None if it is not."""
    if layout.dim() != len(node.shape):
        return None
    left = dict(enumerate(zip(node.shape, layout_of(node).stride())))
    order = []
    for side, stride in zip(layout.shape, layout.stride()):
        found = next(
            (dim for dim, (size, step) in left.items() if size == side and (step == stride or side == 1)), None
        )
        if found is None:
            return None
        order.append(found)
        del left[found]
    return order


def _attention(args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[Viewed]:
    """Attention of queries, keys and values `[B, heads, pixels, C / heads]` or `[B, pixels, C]`."""
    values = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | kwargs
    if values.get("attn_mask") is not None or values.get("dropout_p") or values.get("is_causal"):
        return None
    if values.get("enable_gqa"):
        return None
    nodes = []
    heads = 1
    for name in ("query", "key", "value"):
        value = values[name]
        if not isinstance(value, tuple) or not isinstance(value[0], Node) or len(value[0].shape) != 4:
            return None
        node, layout = value
        heads = layout.shape[1] if layout.dim() == 4 else 1
        if not _lies(layout, *_of_heads(node, heads, layout.dim())):
            return None
        nodes.append(node)
    query = nodes[0]
    if query.shape[:2] != nodes[1].shape[:2] or nodes[1].shape[2:] != nodes[2].shape[2:]:
        return None
    step = Attend(heads, values.get("scale"))
    step.workspace = attention.bytes_of_scores(*(_without_values(node, heads) for node in nodes))
    step.least_rows = attention.least_rows(query.shape[-1], query.device)
    shape = (query.shape[0], nodes[2].shape[1], *query.shape[2:])
    result = Node(query.run, shape, query.dtype, query.device, step, nodes)
    return result, _meta(*_of_heads(result, heads, values["query"][1].dim()), result.dtype)


def _without_values(node: Node, heads: int) -> Tensor:
    """A tensor as attention gets it of a map: `[B, heads, pixels, C / heads]`."""
    with FakeTensorMode():
        return torch.empty(_of_heads(node, heads, 4)[0], dtype=node.dtype, device=node.device)


def _pointwise(func: Any, name: str, layout: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[Viewed]:
    plain = []
    if name.rstrip("_") not in operators.POINTWISE or any(isinstance(value, tuple) for value in kwargs.values()):
        return None
    for value in args:
        if isinstance(value, tuple) and isinstance(value[0], Node):
            if not _lies(value[1], layout.shape, layout.stride()) or value[0].shape != args[0][0].shape:
                return None
            value = value[0]
        elif isinstance(value, Tensor) and value.dim():
            return None
        plain.append(value)
    result = operators.build(func, plain, kwargs)
    if result is None or len(result) != 1 or result[0].shape != args[0][0].shape:
        return None
    return result[0], layout.to(result[0].dtype)


Strided = tuple[Sequence[int], Sequence[int]]


def _channels_first(node: Node) -> Strided:
    batch, channels, height, width = node.shape
    return (batch, channels, height * width), (channels * height * width, height * width, 1)


def _channels_last(node: Node) -> Strided:
    (batch, channels, pixels), (far, near, _) = _channels_first(node)
    return (batch, pixels, channels), (far, 1, near)


def _of_heads(node: Node, heads: int, dims: int) -> Strided:
    if dims == 3:
        return _channels_last(node)
    (batch, channels, pixels), (far, near, _) = _channels_first(node)
    each = channels // heads
    return (batch, heads, pixels, each), (far, each * near, 1, near)


def _lies(layout: Tensor, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a layout is this one; where a side is 1 its stride does not matter."""
    same = (a == b or side == 1 for a, b, side in zip(layout.stride(), strides, shape))
    return tuple(layout.shape) == tuple(shape) and all(same)


def _meta(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device="meta")


def is_map(node: Node, layout: Tensor) -> bool:
    """Whether a layout shows the map as it is."""
    return _lies(layout, node.shape, layout_of(node).stride())
