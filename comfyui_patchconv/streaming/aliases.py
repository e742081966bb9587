"""Who sees what is written in place: several tensors may look at one map, or at parts of it."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from .errors import CannotStreamError
from .graph import Join, Narrow, Node, RowLocal


class Look(ABC):
    """How one map looks at another one. may_copy: whether plain may have a copy of the values instead."""

    may_copy = False

    @abstractmethod
    def at(self, base: Node) -> Node:
        """What is seen of `base`."""

    @abstractmethod
    def put(self, base: Node, part: Node) -> Node:
        """`base`, where `part` was written to what is seen of it."""


@dataclass(frozen=True)
class Part(Look):
    """At some of its channels or frames; `drop`: at one of them, without that dimension."""

    dim: int
    first: int
    count: int
    drop: bool = False

    def at(self, base: Node) -> Node:
        part = narrowed(base, self.dim, self.first, self.count)
        return Shape((*part.shape[: self.dim], *part.shape[self.dim + 1 :])).at(part) if self.drop else part

    def put(self, base: Node, part: Node) -> Node:
        end = self.first + self.count
        if self.drop:
            part = Shape((*base.shape[: self.dim], 1, *base.shape[self.dim + 1 :])).at(part)
        before = narrowed(base, self.dim, 0, self.first)
        return joined([before, part, narrowed(base, self.dim, end, base.shape[self.dim] - end)], self.dim, base)


@dataclass(frozen=True)
class Order(Look):
    """At its dimensions in another order, the rows and columns last."""

    order: tuple[int, ...]

    def at(self, base: Node) -> Node:
        shape = [base.shape[dim] for dim in self.order]
        return base.then(RowLocal(lambda pieces: pieces[0].permute(self.order), moves=True), shape)

    def put(self, base: Node, part: Node) -> Node:
        return Order(tuple(self.order.index(dim) for dim in range(len(self.order)))).at(part)


@dataclass(frozen=True)
class Shape(Look):
    """At its values in the same order, in a shape of the same rows and columns."""

    shape: tuple[int, ...]
    may_copy: bool = False

    def at(self, base: Node) -> Node:
        if self.shape == base.shape:
            return base
        before, width = self.shape[:-2], self.shape[-1]
        step = RowLocal(lambda pieces: pieces[0].reshape(*before, pieces[0].shape[-2], width), moves=True)
        return base.then(step, self.shape)

    def put(self, base: Node, part: Node) -> Node:
        return Shape(base.shape).at(part)


def narrowed(base: Node, dim: int, first: int, count: int) -> Node:
    """`count` channels or frames of `base` from `first` on; of maps that were joined, those maps themselves."""
    if (first, count) == (0, base.shape[dim]):
        return base
    if isinstance(base.step, Join) and base.step.dim == dim:
        parts, start = [], 0
        for source in base.inputs:
            low, high = max(first, start), min(first + count, start + source.shape[dim])
            if low < high:
                parts.append(narrowed(source, dim, low - start, high - low))
            start += source.shape[dim]
        if len(parts) == 1 and parts[0] not in base.inputs:
            return parts[0]
        if parts:
            return joined(parts, dim, base)
    return base.then(Narrow(dim, first, count), (*base.shape[:dim], count, *base.shape[dim + 1 :]))


def joined(parts: Sequence[Node], dim: int, like: Node) -> Node:
    """`parts` one behind the other, on the device of `like`; for those who look at it no part's map itself."""
    parts = [part for part in parts if part.shape[dim]] or parts[:1]
    flat: list[Node] = []
    for part in parts:
        flat.extend(part.inputs if isinstance(part.step, Join) and part.step.dim == dim else [part])
    if len(flat) == 1 and flat[0].device == like.device:
        return flat[0].then(RowLocal(lambda pieces: pieces[0], moves=True), flat[0].shape)  # a map of its own
    shape = (*like.shape[:dim], sum(part.shape[dim] for part in flat), *like.shape[dim + 1 :])
    return Node(like.run, shape, like.dtype, like.device, Join(dim, like.device), flat)


_MAY_COPY = ("reshape", "flatten")
"""Operators that return a copy where memory does not allow a view."""


def looks(func: Any, shape: Sequence[int], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Optional[Look]]:
    """How each result of a view, `func` of a map of `shape` and of `args`, looks at that; None where it does otherwise.

    It is told from the strides of a tensor without values.
    """
    base = torch.empty(tuple(shape), device="meta")
    results = func(base, *args, **kwargs)
    may_copy = func.overloadpacket.__name__ in _MAY_COPY
    return [_look(base, result, may_copy) for result in ([results] if isinstance(results, Tensor) else results)]


def _look(base: Tensor, result: Tensor, may_copy: bool) -> Optional[Look]:
    shape, sides = tuple(result.shape), list(zip(base.shape, base.stride()))
    seen = list(zip(shape, result.stride()))
    if result.numel() == base.numel():
        if result.is_contiguous() and shape[-2:] == base.shape[-2:]:
            return Shape(shape, may_copy)
        left, order = list(range(len(sides))), []
        for side in seen:
            order += [dim for dim in left if sides[dim] == side][:1]
            left = [dim for dim in left if dim not in order]
        rows_last = order[-2:] == [len(sides) - 2, len(sides) - 1]
        return Order(tuple(order)) if len(order) == len(seen) == len(sides) and rows_last else None
    for dim, (size, stride) in enumerate(sides[:-2]):
        first, rest = divmod(int(result.storage_offset()), max(stride, 1))
        others = sides[:dim] + sides[dim + 1 :]
        if seen == others and not rest and first < size:
            return Part(dim, first, 1, drop=True)
        side = seen[dim] if dim < len(seen) else (0, 0)
        if [*seen[:dim], *seen[dim + 1 :]] == others and side[1] == stride and not rest and first + side[0] <= size:
            return Part(dim, first, side[0])
    return None


class Hold:
    """A tensor's claim on its node, given back when the tensor goes.

    viewed: others may look at the same map, it is not known which. exposed: a plain tensor shares the memory of the
    map, and may be written to at any time; nothing that reads it is put off. laid_out: it is a view whose values lie in
    another order than those of the map. original: the caller's tensor that this one stands for.
    """

    def __init__(self, node: Node, original: Optional[Tensor] = None) -> None:
        self.node, self.original = node, original
        self.viewed = self.exposed = self.laid_out = False
        self.path: tuple[Optional[Look], ...] = ()
        self._family: Optional[_Family] = None
        node.users += 1

    def __del__(self) -> None:
        self.node.users -= 1
        if self._family is not None and not self.path:
            self._family.node = self.node

    def link(self, part: Hold, look: Optional[Look]) -> None:
        """`part` looks at this map, in a way that is not known if `look` is None."""
        if self._family is None or (not self.others and not self._family.callers):
            self._family, self.path = _Family(self), ()
        part._family, part.path = self._family, (*self.path, look)
        self._family.members.add(part)
        part.viewed |= self.viewed
        if look is not None:
            part.become(look.at(self.node))

    @property
    def others(self) -> list[Hold]:
        """Of other tensors that look at this map, at more or at less of it."""
        return [] if self._family is None else [one for one in self._family.members if one is not self]

    def require_writable(self, name: str) -> None:
        """Raise CannotStreamError where it is not known who sees what the operator `name` writes here."""
        family, others = self._family, self.others
        unknown = self.viewed or self.laid_out
        if family is not None and (others or family.callers):
            members = [self, *others]
            unknown |= any(one.viewed or one.exposed for one in members)
            unknown |= any(look is None or look.may_copy for one in members for look in one.path)
            unknown |= family.is_lost
        if unknown:
            raise CannotStreamError(f"{name} writes through a view")

    def write(self, node: Node) -> None:
        """The tensor is `node` from now on, for all who look at it."""
        family, others = self._family, self.others
        if family is None or not (others or family.callers):
            self._put(node)
            return
        root = family.root()
        before = family.node if root is None else root.node
        assert before is not None
        whole = _written(before, self.path, node)
        if root is None:
            family.node = whole
        for one in (self, *others):
            part = whole
            for look in one.path:
                part = part if look is None else look.at(part)
            one._put(part)

    def _put(self, node: Node) -> None:
        self.become(node)
        if self.original is not None:
            node.run.written[id(self.original)] = (self.original, self)

    def become(self, node: Node) -> None:
        """Claim another node."""
        node.users += 1
        self.node.users -= 1
        self.node = node


class _Family:
    """The tensors that look at one map, that of `root`; `node` where that is gone. callers: it is a tensor of the
    caller, who sees what is written to it."""

    def __init__(self, root: Hold) -> None:
        self.root = weakref.ref(root)
        self.members = weakref.WeakSet([root])
        self.callers = root.original is not None
        self.node: Optional[Node] = None

    @property
    def is_lost(self) -> bool:
        """Whether the map cannot be written to any more: the caller's is not ours, another one was given up."""
        if self.root() is not None:
            return False
        return self.callers or self.node is None or not (self.node.rows is None or self.node.rows.is_complete)


def _written(base: Node, path: Sequence[Optional[Look]], part: Node) -> Node:
    """`base`, where `part` was written to what is seen of it along `path`."""
    if not path or path[0] is None:
        return part
    return path[0].put(base, _written(path[0].at(base), path[1:], part))
