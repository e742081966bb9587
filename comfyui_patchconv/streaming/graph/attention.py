"""Attention between all pixels, whose matrix of scores is never there at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor
from torch.nn import functional as F

from .node import Span
from .steps import RowLocal


class Shape(NamedTuple):
    """A tensor of which only the looks are known."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_SCORES_AT_ONCE = 128 << 20
"""Bytes of scores, in float32, of the queries that are attended to at once where a kernel makes scores of them."""

_COPIES_OF_SCORES = 3
"""The scores, what the softmax makes of them, and that in the type of the values."""

_MASKS_AT_ONCE = 16 << 20
"""Bytes of masks of the queries that are attended to at once where attention is causal."""

_BYTES_OF_A_MASK = 8
"""For each query and key: whether it is seen, and what a kernel makes of that, in float32 and otherwise."""

_QUERIES_THAT_SUIT = 1 << 14
"""Queries at once that occupy a GPU: kernels give its processors 32 to 128 each. Not measured yet."""


class Attend(RowLocal):
    """Attention of rows of queries to all keys and values. scale, causal: as of `F.scaled_dot_product_attention`.

    in_turn: see `Step`; there is no mask then, and heads and samples are as many of all three.
    """

    def __init__(
        self, function: Callable[[Sequence[Tensor], int, int], Tensor], count: int, scale: Optional[float],
        causal: bool, in_turn: bool,
    ) -> None:  # fmt: skip
        super().__init__(function, count, cheap=True)
        self.cheap, self.scale, self.causal, self.in_turn = False, scale, causal, in_turn


class Merging:
    """Attention of some queries to keys and values that come in pieces, in any order: the softmax's largest score and
    its sum, and the sum of values, in float32 at least.

    step: of queries, `[…, pixels, C]`. read: gives those from one pixel to another. rows: the pixels. at_once: of
    them, how many meet a piece at a time. like: a map of `[…, pixels, C]` as the result is, of no pixels.
    """

    def __init__(
        self, step: Attend, read: Callable[[int, int], Tensor], rows: Span, at_once: int, like: Tensor
    ) -> None:
        wide = torch.promote_types(like.dtype, torch.float32)
        shape = *like.shape[:-2], rows[1] - rows[0]
        self._step, self._read, self._rows, self._at_once, self._dtype = step, read, rows, at_once, like.dtype
        self._largest = torch.full((*shape, 1), float("-inf"), dtype=wide, device=like.device)
        self._sum = torch.zeros_like(self._largest)
        self._values = torch.zeros((*shape, like.shape[-1]), dtype=wide, device=like.device)

    def add(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Keys and values from pixel `first` of all on, `[…, pixels, C]`."""
        wide, (begin, end) = self._values.dtype, self._rows
        keys, values = keys.to(wide).mT, values.to(wide)
        for low in range(begin, end if keys.shape[-1] else begin, self._at_once):
            self._meet(low, min(low + self._at_once, end), keys, values, first)

    def _meet(self, low: int, high: int, keys: Tensor, values: Tensor, first: int) -> None:
        if self._step.causal and first >= high:
            return
        queries = self._read(low, high).to(keys.dtype)
        scores = (queries * (queries.shape[-1] ** -0.5 if self._step.scale is None else self._step.scale)) @ keys
        if self._step.causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(low - first)
            scores.masked_fill_(~seen, float("-inf"))
        here = slice(low - self._rows[0], high - self._rows[0])
        before, total, sums = (one[..., here, :] for one in (self._largest, self._sum, self._values))
        largest = torch.maximum(before, scores.amax(-1, keepdim=True))
        base = largest.masked_fill(largest == float("-inf"), 0.0)  # of queries that have met no key yet
        kept = (before - base).exp_()
        scores.sub_(base).exp_()
        total.mul_(kept).add_(scores.sum(-1, keepdim=True))
        sums.mul_(kept).add_(scores @ values)
        before.copy_(largest)

    def result(self) -> Tensor:
        """Of all that have come, `[…, pixels, C]`."""
        return self._values.div_(self._sum).to(self._dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: Optional[float]) -> Tensor:
    """`F.scaled_dot_product_attention` of `[B, heads, pixels, C]` each, in blocks of queries where it makes scores."""
    if not makes_scores(queries, keys, values):
        return F.scaled_dot_product_attention(queries, keys, values, scale=scale)
    count = max(_SCORES_AT_ONCE // _scores_of_a_query(queries, keys), 1)
    parts = [F.scaled_dot_product_attention(part, keys, values, scale=scale) for part in queries.split(count, 2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def attend_causally(queries: Tensor, keys: Tensor, values: Tensor, first: int, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention`, causal, of queries `[…, pixels, C]` from pixel `first` on: in blocks, whose
    masks are small."""
    parts = []
    for part in queries.split(max(_MASKS_AT_ONCE // (_BYTES_OF_A_MASK * keys.shape[-2]), 1), -2):
        mask = torch.ones(part.shape[-2], keys.shape[-2], dtype=torch.bool, device=queries.device).tril_(first)
        parts.append(F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, **options))
        first += part.shape[-2]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def bytes_of_masks(queries: int, keys: int) -> int:
    """Bytes that `attend_causally` takes for masks of so many pixels."""
    return min(max(_MASKS_AT_ONCE, _BYTES_OF_A_MASK * keys), _BYTES_OF_A_MASK * queries * keys)


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
