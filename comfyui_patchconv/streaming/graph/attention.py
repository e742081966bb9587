"""Attention between all pixels, whose matrix of scores is never there at once."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.nn import functional as F


class Shape(NamedTuple):
    """A tensor of which only the looks are known."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_SCORES_AT_ONCE = 128 << 20
"""Bytes of scores, in float32, of the queries that are attended to at once where a kernel makes scores of them."""

_COPIES_OF_SCORES = 3
"""The scores, what the softmax makes of them, and that in the type of the values."""

_QUERIES_THAT_SUIT = 1 << 14
"""Queries at once that occupy a GPU: kernels give its processors 32 to 128 each. Not measured yet."""


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: Optional[float]) -> Tensor:
    """`F.scaled_dot_product_attention` of `[B, heads, pixels, C]` each, in blocks of queries where it makes scores."""
    if not makes_scores(queries, keys, values):
        return F.scaled_dot_product_attention(queries, keys, values, scale=scale)
    count = max(_SCORES_AT_ONCE // _scores_of_a_query(queries, keys), 1)
    parts = [F.scaled_dot_product_attention(part, keys, values, scale=scale) for part in queries.split(count, 2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def bytes_of_scores(queries: Shape, keys: Shape, values: Shape) -> int:
    """Bytes that `attend` takes for scores, and for the keys once more, which such a kernel scales; the tensors need
    have no values."""
    if not makes_scores(queries, keys, values):
        return 0
    query = _scores_of_a_query(queries, keys)
    scores = min(max(_SCORES_AT_ONCE, query), query * queries.shape[2])
    return _COPIES_OF_SCORES * scores + prod(keys.shape) * keys.dtype.itemsize


def least_rows(width: int, device: torch.device) -> int:
    """Rows of `width` queries below which a device would not be busy with them."""
    return 1 if device.type == "cpu" else -(-_QUERIES_THAT_SUIT // max(width, 1))


def makes_scores(queries: Union[Tensor, Shape], keys: Union[Tensor, Shape], values: Union[Tensor, Shape]) -> bool:
    """Whether the kernel that torch chooses for them has the whole matrix of scores in memory.

    Of a CUDA device that is not here to be asked, for which the meta device stands in an estimate, or of torch 2.1,
    which cannot be asked, it is not expected for heads of a multiple of 8 channels, which the memory-efficient kernel
    takes.
    """
    if queries.device.type not in ("cuda", "meta"):
        return queries.device.type != "cpu"
    cuda: Any = torch.backends.cuda
    here = queries.device.type == "cuda" and torch.cuda.is_available()
    if not here or not hasattr(cuda, "SDPAParams"):
        return queries.shape[-1] % 8 != 0
    one: Any = tuple(
        torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)
        if isinstance(value, Shape)
        else value
        for value in (queries, keys, values)
    )
    one = (*one, None, 0.0, False)
    try:
        params = cuda.SDPAParams(*one, False)
    except TypeError:  # before torch 2.5
        params = cuda.SDPAParams(*one)
    names = ("can_use_flash_attention", "can_use_efficient_attention", "can_use_cudnn_attention")
    return not any(getattr(cuda, name)(params) for name in names if hasattr(cuda, name))


def _scores_of_a_query(queries: Union[Tensor, Shape], keys: Union[Tensor, Shape]) -> int:
    batch, heads, pixels = keys.shape[:3]
    return max(batch, queries.shape[0]) * heads * pixels * 4
