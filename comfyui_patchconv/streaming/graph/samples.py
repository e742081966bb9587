"""The same graph for some samples of a batch, where no step mixes them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Optional

from .node import Node, Step, ancestors
from .steps import Reduce, Regroup, ScaleAndShift


def split_by_sample(roots: Sequence[Node], parts: int) -> Optional[list[Node]]:
    """The nodes, stored ones among them, that `roots` need only some samples of to have the same samples themselves,
    in the program's order; None where a step mixes samples, or where that is not known.

    Samples lie one behind the other along the first dimension, whose places come in `parts` equal parts.
    """
    apart, whole = set(roots), set[Node]()
    order = ancestors(roots)
    if any(root.tensor is not None or not _comes_in(root, parts) for root in roots):
        return None
    for node in reversed(order):  # readers before what they read
        by_sample = _read_by_sample(node, parts) if node in apart else [False] * len(node.inputs)
        if by_sample is None:
            return None
        for source, yes in zip(node.inputs, by_sample):
            (apart if yes else whole).add(source)
    if apart & whole:
        return None
    return sorted(apart, key=lambda node: node.serial)


def _comes_in(node: Node, parts: int) -> bool:
    return bool(node.shape) and node.shape[0] % parts == 0 and node.dim != 0


def _read_by_sample(node: Node, parts: int) -> Optional[Sequence[bool]]:
    """Of each input of a step whether samples of it are made of the same samples of that."""
    step = node.step
    if step is None:
        return ()
    if step.samples is None or len(step.samples) != len(node.inputs):
        return None
    if isinstance(step, Reduce) and step.part is None:
        return None
    *_, last = node.inputs or (node,)
    if isinstance(step, ScaleAndShift) and last.step is None:  # whose samples lie along the second dimension
        return None
    if not isinstance(step, Reduce) and not _comes_in(node, parts):
        return None
    for source, dim, yes in zip(node.inputs, node.dims, step.samples):
        if yes and not isinstance(source.step, Reduce) and (dim == 0 or not _comes_in(source, parts)):
            return None
    return step.samples


def of_part(apart: Sequence[Node], part: int, parts: int) -> dict[Node, Node]:
    """For each of the nodes of `split_by_sample` one of the same samples in part `part` of so many."""
    found: dict[Node, Node] = {}
    for node in apart:
        found[node] = _narrowed(node, [found.get(source, source) for source in node.inputs], part, parts)
    return found


def _narrowed(node: Node, inputs: Sequence[Node], part: int, parts: int) -> Node:
    step = node.step
    shape: tuple[int, ...] = node.shape[0] // parts, *node.shape[1:]
    if isinstance(step, Reduce):
        assert step.part is not None
        step, shape = step.part(inputs[0].shape[0])
    other = Node(
        _of_fewer(step, shape[0]), inputs, node.dims, shape=shape, strides=node.strides, dtype=node.dtype,
        device=node.device, itemsize=node.itemsize, dim=node.dim,
    )  # fmt: skip
    if node.tensor is not None:
        other.tensor = node.tensor.narrow(0, part * shape[0], shape[0])
    return other


def _of_fewer(step: Optional[Step], places: int) -> Optional[Step]:
    """A step whose result has so many places along its first dimension."""
    if isinstance(step, Regroup):
        step = copy.copy(step)
        step.shape = [places, *step.shape[1:]]
    return step
