"""What single steps do to each element of a map, told by their names and arguments; and which of them are one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional, TypeGuard

import torch

from ...graph.node import Node
from ...graph.steps import Cast, Resample, RowLocal, ScaleAndShift

TYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of the maps that are computed in float32, in one pass."""


class Element(NamedTuple):
    """What a step does to each element of one of its inputs.

    kind: `scale` (and shift, by channel), `silu`, `relu`, `leaky_relu`, `multiply`, `add` (a map), `cast` or `repeat`.
    number: the slope, the factor, or what the added map is multiplied by. other: which input that map is, or the line.
    repeats: see `Step`.
    """

    kind: str
    number: float = 0.0
    other: Optional[int] = None
    repeats: tuple[int, ...] = ()


def element_of(node: Node, place: int) -> Optional[Element]:
    """What the step of `node` does to each element of its input `place`; None where that is nothing known."""
    source, step = node.inputs[place], node.step
    if node.dim is None or node.dim < 2 or node.dtype not in TYPES or source.dtype not in TYPES:
        return None
    if source.device != node.device or node.dims[place] != node.dim:
        return None
    if isinstance(step, Resample) and step.repeats and step.repeats[:2] == (1, 1):
        return Element("repeat", repeats=tuple(step.repeats))
    if not isinstance(step, RowLocal) or source.shape != node.shape:
        return None
    if isinstance(step, ScaleAndShift):
        return Element("scale", other=1) if place == 0 else None
    if isinstance(step, Cast):
        return Element("cast")
    if node.eager is None or node.dtype != source.dtype:
        return None
    args, kwargs = list(node.eager.args), dict(node.eager.kwargs)
    nodes = [one for one in args if isinstance(one, Node)]
    if len(nodes) != len(node.inputs) or any(one is not other for one, other in zip(nodes, node.inputs)):
        return None  # what else it reads was held when it was called
    found = _ELEMENTS.get(step.name)
    return None if found is None else found(node, place, args, kwargs)


def _silu(node: Node, place: int, args: list[Any], kwargs: dict[str, Any]) -> Optional[Element]:
    return Element("silu") if len(args) == 1 else None


def _relu(node: Node, place: int, args: list[Any], kwargs: dict[str, Any]) -> Optional[Element]:
    return Element("relu") if len(args) == 1 else None


def _leaky_relu(node: Node, place: int, args: list[Any], kwargs: dict[str, Any]) -> Optional[Element]:
    slope = kwargs.pop("negative_slope", args[1] if len(args) > 1 else 0.01)
    if kwargs or not _is_number(slope):
        return None
    return Element("leaky_relu", float(slope))


def _multiply(node: Node, place: int, args: list[Any], kwargs: dict[str, Any]) -> Optional[Element]:
    factor = args[1 - place] if len(args) == 2 else None
    if kwargs or not _is_number(factor):
        return None
    return Element("multiply", float(factor))


def _divide(node: Node, place: int, args: list[Any], kwargs: dict[str, Any]) -> Optional[Element]:
    divisor = args[1] if len(args) == 2 else None
    if kwargs or place or not _is_number(divisor) or not divisor:
        return None
    return Element("multiply", 1 / divisor)


def _add(node: Node, place: int, args: list[Any], kwargs: dict[str, Any]) -> Optional[Element]:
    alpha = kwargs.pop("alpha", 1)
    if kwargs or len(args) != 2 or len(node.inputs) != 2 or not _is_number(alpha):
        return None
    other = node.inputs[1 - place]
    alike = other.shape == node.shape and other.dtype == node.dtype and node.dims[1 - place] == node.dim
    if not alike or (place == 1 and alpha != 1):  # what goes through is what is multiplied then
        return None
    return Element("add", float(alpha), 1 - place)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_ELEMENTS: dict[str, Callable[[Node, int, list[Any], dict[str, Any]], Optional[Element]]] = {
    "silu": _silu,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    **dict.fromkeys(("mul", "multiply"), _multiply),
    **dict.fromkeys(("div", "divide", "true_divide"), _divide),
    "add": _add,
}


@dataclass(frozen=True)
class Form:
    """One pass over the elements `x` of a map: `second(factor * (inner * first(x * scale + shift) + added * other))`.

    scaled: whether there are a scale and a shift for each channel. first, second: the slope below zero of an
    activation, `silu` or None for none. inner, factor: numbers. added: what the other map is multiplied by; None where
    there is none. repeats: how many times in a row each result is written, see `Step`. stage: how far it is filled.
    """

    scaled: bool = False
    first: Any = None
    inner: float = 1.0
    added: Optional[float] = None
    factor: float = 1.0
    second: Any = None
    repeats: tuple[int, ...] = ()
    stage: int = 0

    def then(self, element: Element) -> Optional[Form]:
        """The form with one element more; None where that makes two passes."""
        kind, stage = element.kind, self.stage
        if kind == "cast":
            return self
        if kind == "repeat":  # what follows may as well come before it, but for a map of the larger size
            return None if self.repeats else replace(self, repeats=element.repeats)
        if kind == "scale":
            return None if stage else replace(self, scaled=True, stage=1)
        if kind == "add":
            return None if stage > 3 or self.repeats else replace(self, added=element.number, stage=4)
        if kind == "multiply":
            if stage <= 2:
                return replace(self, inner=self.inner * element.number, stage=2)
            return replace(self, factor=self.factor * element.number, stage=5) if stage <= 5 else None
        slope = "silu" if kind == "silu" else 0.0 if kind == "relu" else element.number
        if stage <= 1:
            return replace(self, first=slope, stage=2)
        return replace(self, second=slope, stage=6) if stage <= 5 else None
