"""Attention's view of a map: pixels in one row, `[B, C, H·W]` and what arranging its dimensions makes of that.

A map that is looked at so is still deferred. Its layout is a tensor without values whose strides say where in a
contiguous `[B, C, H, W]` each element lies; what arranges dimensions only is applied to that. Linear layers, group norm
and attention on such views are steps on the map; anything else is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from . import operators
from .graph import Attend, Node, RowLocal

Viewed = tuple[Node, Tensor]
"""A map and its layout."""

_ARRANGING = (*operators.ARRANGING, "unsqueeze", "squeeze", "t")
_KEEPING = (*operators.SAME, "clone")


def layout_of(node: Node) -> Tensor:
    """The layout of a map that is looked at as it is."""
    return torch.empty(node.shape, dtype=node.dtype, device="meta")


def evaluated(tensor: Tensor, layout: Tensor) -> Tensor:
    """The values of a view, contiguous, from the whole map."""
    return tensor.contiguous().as_strided(layout.shape, layout.stride()).contiguous()


def build(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[Viewed]:
    """What `func` returns, its deferred arguments being given as `(map, layout)`; None if it has to be evaluated."""
    name = func.overloadpacket.__name__
    if not isinstance(args[0], tuple) or len(args[0]) != 2 or not isinstance(args[0][0], Node):
        return None
    node, layout = args[0]
    if len(node.shape) != 4:
        return None
    if name in _ARRANGING:
        return _arranged(func, node, layout, args[1:], kwargs)
    if name in _KEEPING or (name == "dropout" and not args[2]):
        return node, layout
    if name == "slice":
        return _sliced(node, layout, *args[1:])
    if name == "linear":
        return _linear(node, layout, *args[1:])
    if name == "scaled_dot_product_attention":
        return _attention(args, kwargs)
    if name == "group_norm" and layout.dim() == 3 and _lies(layout, *_channels_first(node)):
        normal = operators.build(func, (node, *args[1:]), kwargs)
        return None if normal is None else (normal[0], layout)
    if name.rstrip("_") in operators.POINTWISE:
        return _pointwise(func, layout, args, kwargs)
    return None


def _arranged(func: Any, node: Node, layout: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[Viewed]:
    if any(isinstance(value, (Tensor, tuple)) and _holds_map(value) for value in args):
        return None
    try:
        result = func(layout, *args, **kwargs)
    except RuntimeError:  # a view that these strides do not allow
        return None
    shares = result.untyped_storage()._cdata == layout.untyped_storage()._cdata
    same = result.numel() == layout.numel() and result.dtype == layout.dtype
    return (node, result) if shares and same else None


def _holds_map(value: Any) -> bool:
    return isinstance(value, Tensor) or any(isinstance(one, Node) for one in value)


def _sliced(node: Node, layout: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """A slice that takes everything, as a loop over parts of the queries makes it when one part will do."""
    everything = start in (None, 0) and (end is None or end >= layout.shape[dim]) and step == 1
    return (node, layout) if everything else None


def _linear(node: Node, layout: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Optional[Viewed]:
    """A linear layer over the channels of `[B, pixels, C]`: a convolution with a kernel of 1."""
    if not isinstance(weight, Tensor) or layout.dim() != 3 or not _lies(layout, *_channels_last(node)):
        return None
    weight, bias = operators.own(weight), operators.own(bias)
    step = RowLocal(lambda pieces: F.conv2d(pieces[0], weight[:, :, None, None], bias))
    result = node.then(step, (node.shape[0], len(weight), *node.shape[2:]))
    return result, _meta(*_channels_last(result), result.dtype)


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
    if query.device.type != "cpu":  # kernels that make a matrix of scores are still in use there
        step.row_bytes = heads * query.shape[0] * query.shape[3] * nodes[1].shape[2] * nodes[1].shape[3] * 4
    shape = (query.shape[0], nodes[2].shape[1], *query.shape[2:])
    result = Node(query.run, shape, query.dtype, query.device, step, nodes)
    return result, _meta(*_of_heads(result, heads, values["query"][1].dim()), result.dtype)


def _pointwise(func: Any, layout: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[Viewed]:
    plain = []
    if any(isinstance(value, tuple) for value in kwargs.values()):
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
