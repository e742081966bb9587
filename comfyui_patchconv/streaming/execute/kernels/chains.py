"""Which steps of a pass follow each other element by element, so that they are one: found before its first strip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

from ...graph.node import Node, Span
from ...graph.steps import Convolve
from .elements import Element, Form, element_of


class Link(NamedTuple):
    """One step of a chain: what it does to its input `place`."""

    node: Node
    place: int
    element: Element


@dataclass(frozen=True)
class Chain:
    """Steps that treat each element by itself, or repeat it, of which nothing but the next one reads what they give.

    form: all of them as one pass. convolution: the one that alone reads the last one's rows, anew for each strip; None
    where there is none such.
    """

    links: Sequence[Link]
    form: Form
    convolution: Optional[Node] = None

    @property
    def last(self) -> Node:
        return self.links[-1].node

    @property
    def source(self) -> Node:
        """The map that goes through it."""
        return self.links[0].node.inputs[self.links[0].place]

    def spans(self, first: int, last: int) -> list[Span]:
        """Of the source, then of what each step gives, the rows that rows `[first, last)` of the last one's are made
        of."""
        found = [(first, last)]
        for node, place, _ in reversed(self.links):
            assert node.step is not None
            by_rows = sum(dim is not None for dim in node.dims[:place])
            found.append(node.step.needs(*found[-1])[by_rows])
        return found[::-1]


def chains_of(order: Sequence[Node], roots: Collection[Node], recomputed: Collection[Node]) -> dict[Node, Chain]:
    """The chains of a pass, by their last steps.

    order, recomputed: as of `Pass`. roots: the maps that it computes, whose rows are not the chain's alone.
    """
    reads = Counter(source for node in order for source in node.inputs)
    inside = set(order)
    readers = {source: node for node in order for source in node.inputs}
    ends: dict[Node, Chain] = {}

    def alone(source: Node) -> bool:
        return source in inside and reads[source] == 1 and source not in roots

    for node in order:
        best: Optional[Chain] = None
        for place, source in enumerate(node.inputs):
            element = element_of(node, place)
            if element is None:
                continue
            link, before = Link(node, place, element), ends.get(source)
            # A row that is repeated is read for several: what computes each row but once has it no more for the second.
            again = (source in recomputed) if element.repeats else (source in recomputed) == (node in recomputed)
            if before is not None and alone(source) and again:
                form = before.form.then(element)
                if form is not None:
                    best = Chain([*before.links, link], form)
                    break
            form = Form().then(element)
            assert form is not None  # a form has room for any one element
            best = best or Chain([link], form)
        if best is not None:
            ends[node] = best
            if len(best.links) > 1:
                del ends[best.links[-2].node]
    return {node: _with_convolution(chain, readers.get(node), alone(node), recomputed) for node, chain in ends.items()}


def _with_convolution(chain: Chain, reader: Optional[Node], alone: bool, recomputed: Collection[Node]) -> Chain:
    if reader is None or not alone or chain.last not in recomputed or not isinstance(reader.step, Convolve):
        return chain
    read, dim = next(iter(zip(reader.inputs, reader.dims)))
    usual = read is chain.last and dim == chain.last.dim == reader.step.dim
    if not usual or reader.step.fill or not reader.step.weight_bytes:
        return chain
    return Chain(chain.links, chain.form, reader)
