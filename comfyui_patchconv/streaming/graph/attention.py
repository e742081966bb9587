"""Attention between all pixels, whose matrix of scores is never there at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
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

_SCORES_AT_ONCE_OF_A_CPU = 8 << 20
"""The same on a CPU: some hundred queries of an image's pixels, which are not far from its cache."""

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


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Optional[Tensor] = None, first: Optional[int] = None,
    apart: Optional[int] = None, **options: Any,
) -> Tensor:  # fmt: skip
    """`F.scaled_dot_product_attention` of `[…, pixels, C]` each, in blocks of queries where it makes scores or masks.

    mask: of these queries. first: of causal ones, which pixel they begin at; None for others. apart: a dimension along
    which each has keys of its own; None for all keys. options: as of the function.
    """
    gqa = bool(options.get("enable_gqa"))
    scores = makes_scores(queries, keys, values, _seen(queries, keys, mask, first), gqa)
    if not scores and queries.device.type == "cpu":
        own = queries.dim()
        queries, keys, values = _for_the_kernel(queries, keys, values)
        mask = mask[None] if mask is not None and mask.dim() == 3 else mask
        whole = _in_blocks(queries, keys, values, mask, first, False, options)
        return whole.view(whole.shape[queries.dim() - own :])
    if apart is None or not scores:
        return _in_blocks(queries, keys, values, mask, first, scores, options)
    one = max(_scores_of_a_query(queries, keys) * queries.shape[-2] // queries.shape[apart], 1)
    pieces = zip(*(part.split(max(_at_once(queries) // one, 1), apart) for part in (queries, keys, values)))
    parts = [_in_blocks(q, k, v, mask, first, True, options) for q, k, v in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, apart)


def _in_blocks(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Optional[Tensor], first: Optional[int], scores: bool,
    options: dict[str, Any],
) -> Tensor:  # fmt: skip
    count, total = queries.shape[-2], keys.shape[-2]
    if scores:
        count = min(count, _at_once(queries) // max(_scores_of_a_query(queries, keys), 1))
    by_rows = mask is not None and mask.dim() > 1 and mask.shape[-2] != 1
    seen = _seen(queries, keys, mask, first)
    if seen is not None and seen.shape[-2] != 1:
        count = min(count, _MASKS_AT_ONCE // (_BYTES_OF_A_MASK * max(prod(seen.shape[:-2]) * total, 1)))
    parts, done = [], 0
    for part in queries.split(max(count, 1), -2):
        given, rows = options, mask
        if first is not None:
            rows = torch.ones(part.shape[-2], total, dtype=torch.bool, device=part.device).tril_(first + done)
        elif mask is not None and by_rows:
            rows = mask.narrow(-2, done, part.shape[-2])
        if rows is not None:
            given = {"attn_mask": rows, **options}
        parts.append(F.scaled_dot_product_attention(part, keys, values, **given))
        done += part.shape[-2]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def _for_the_kernel(*tensors: Tensor) -> list[Tensor]:
    """As a CPU's kernel takes them that makes no scores: of four dimensions, the values of a pixel side by side."""
    made: dict[int, Tensor] = {}
    for one in tensors:
        if id(one) not in made:
            ordered = one if one.stride(-1) == 1 else one.contiguous()
            made[id(one)] = ordered.reshape((1,) * (4 - one.dim()) + tuple(one.shape))
    return [made[id(one)] for one in tensors]


def _seen(queries: Any, keys: Any, mask: Any, first: Optional[int]) -> Optional[Shape]:
    """The looks of the mask that a kernel is given."""
    if mask is not None:
        return Shape(tuple(mask.shape), mask.dtype, queries.device)
    return None if first is None else Shape((queries.shape[-2], keys.shape[-2]), torch.bool, queries.device)


class Asked(NamedTuple):
    """An attention as the program asks for it, of tensors of which only the looks are known.

    ordered: whether the values of each pixel lie side by side in eager's. apart: as of `attend`.
    """

    queries: Shape
    keys: Shape
    values: Shape
    mask: Optional[Shape] = None
    causal: bool = False
    gqa: bool = False
    ordered: bool = True
    apart: Optional[int] = None


def bytes_of_scores(asked: Asked) -> int:
    """Bytes that `attend` takes for scores and masks, and for the keys once more, which a kernel scales that makes
    scores; where none is made, for copies in the order that its kernel wants."""
    queries, keys, values, mask, causal, gqa, ordered, apart = asked
    seen = _seen(queries, keys, mask, 0 if causal else None)
    masks = 0
    if seen is not None and len(seen.shape) > 1 and seen.shape[-2] != 1 and seen.dtype == torch.bool:
        one = _BYTES_OF_A_MASK * max(prod(seen.shape[:-2]) * keys.shape[-2], 1)
        masks = min(max(_MASKS_AT_ONCE, one), one * queries.shape[-2])
    if not makes_scores(queries, keys, values, seen, gqa):
        return masks + (0 if ordered or queries.device.type != "cpu" or apart is not None else _bytes(keys, values))
    query, once = _scores_of_a_query(queries, keys), 1
    if apart is not None:
        query, once = query // queries.shape[apart], queries.shape[apart]
    scores = min(max(_at_once(queries), query), once * query * queries.shape[-2])
    return masks + _COPIES_OF_SCORES * scores + (_bytes(keys) if apart is None else 0)


def eager_bytes(asked: Asked) -> int:
    """Bytes that the program's own operator takes beside its result."""
    queries, keys, values, mask, causal, gqa, ordered, _ = asked
    on_cpu = queries.device.type == "cpu"
    fits = not on_cpu or (len(queries.shape) == 4 and ordered)
    if fits and not makes_scores(queries, keys, values, _seen(queries, keys, mask, None), gqa):
        wide = on_cpu and mask is not None and mask.dtype == torch.bool
        return prod(mask.shape) * queries.dtype.itemsize if wide and mask is not None else 0
    copies = 2 + (causal or (mask is not None and mask.dtype == torch.bool))  # the scores, what softmax makes of them
    of_a_query = _scores_of_a_query(queries, keys)
    hidden = of_a_query // max(queries.dtype.itemsize, 4)  # which of them are minus infinity, a byte each
    return (copies * of_a_query + hidden) * queries.shape[-2] + _bytes(queries, keys, values)


def _bytes(*shapes: Shape) -> int:
    return sum(prod(one.shape) * one.dtype.itemsize for one in shapes)


def least_rows(width: int, device: torch.device) -> int:
    """Rows of `width` queries below which a device would not be busy with them."""
    return 1 if device.type == "cpu" else -(-_QUERIES_THAT_SUIT // max(width, 1))


def makes_scores(
    queries: Union[Tensor, Shape], keys: Union[Tensor, Shape], values: Union[Tensor, Shape],
    mask: Optional[Shape] = None, gqa: bool = False,
) -> bool:  # fmt: skip
    """Whether the kernel that torch chooses for them has the whole matrix of scores in memory: on a CPU, where they are
    made what it wants, see `_for_the_kernel`.

    Of a CUDA device that is not here to be asked, for which the meta device stands in an estimate, or of torch 2.1,
    which cannot be asked, it is not expected for heads of a multiple of 8 channels, which the memory-efficient kernel
    takes.
    """
    if queries.device.type == "cpu":
        return _cpu_makes_scores(queries, keys, values, mask, gqa)
    if queries.device.type not in ("cuda", "meta"):
        return True
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
        params = cuda.SDPAParams(*one, gqa)
    except TypeError:  # before torch 2.5
        params = cuda.SDPAParams(*one)
    names = ("can_use_flash_attention", "can_use_efficient_attention", "can_use_cudnn_attention")
    return not any(getattr(cuda, name)(params) for name in names if hasattr(cuda, name))


def _cpu_makes_scores(
    queries: Union[Tensor, Shape], keys: Union[Tensor, Shape], values: Union[Tensor, Shape], mask: Optional[Shape],
    gqa: bool,
) -> bool:  # fmt: skip
    """Asks torch about small tensors whose sides are equal where theirs are."""
    if gqa or len(queries.shape) > 4 or (mask is not None and len(mask.shape) > len(queries.shape)):
        return True
    small: dict[int, int] = {0: 0, 1: 1}

    def like(one: Any) -> Tensor:
        shape = (1,) * (4 - len(one.shape)) + tuple(one.shape) if one is not mask or len(one.shape) == 3 else one.shape
        return torch.empty([small.setdefault(side, len(small)) for side in shape], dtype=one.dtype)

    choice: Any = getattr(torch, "_fused_sdp_choice", None)
    try:
        seen = None if mask is None else like(mask)
        chosen = choice(like(queries), like(keys), like(values), seen, 0.0, False)
    except (RuntimeError, TypeError):  # a torch that cannot say
        return True
    return int(chosen) == 0


def _at_once(queries: Union[Tensor, Shape]) -> int:
    return _SCORES_AT_ONCE_OF_A_CPU if queries.device.type == "cpu" else _SCORES_AT_ONCE


def _scores_of_a_query(queries: Union[Tensor, Shape], keys: Union[Tensor, Shape]) -> int:
    """Bytes, of all heads and samples."""
    leads = (reversed(tuple(one.shape[:-2])) for one in (queries, keys))
    return (
        prod(max(sides) for sides in zip_longest(*leads, fillvalue=1)) * keys.shape[-2] * max(queries.dtype.itemsize, 4)
    )
