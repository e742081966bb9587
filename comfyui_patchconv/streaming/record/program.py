"""The deferred tensors that the program has: their bytes as eager has them, and the nodes that they stand for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional
from weakref import ref

import torch
from torch import Tensor

from ..graph.node import Node
from ..graph.steps import Whole
from . import operators, views
from .held import Memory
from .lazy import Cell, LazyTensor, View
from .shapes import SIMPLE, Spec

SMALL = 1 << 16
"""Bytes of results below which what is stored already is computed at once."""


class Program:
    """The tensors that a program has, and the nodes of what it computes.

    report: counts operators that are evaluated whole. phantom: tensors have no values; nothing can be demanded. device:
    where tensors of such an estimate are meant to be; its weights are on meta. small: bytes of results below which what
    is stored already is computed at once. inference, gradients: whether the caller was in inference mode, and had
    gradients on. alive, eager_peak: bytes of the program's tensors now and at the worst moment, as eager has them;
    peak_since: at the worst one since somebody set it back.
    """

    def __init__(self, report: dict[str, int], phantom: bool, small: int) -> None:
        self.report, self.phantom, self.memory = report, phantom, Memory()
        self.inference, self.gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self.eager_peak = self.peak_since = self.alive = 0
        self.device = torch.device("cpu")
        self.small = small
        self._tensors: dict[int, ref[LazyTensor]] = {}
        self._lock = threading.RLock()

    # Its tensors

    def defer(self, tensor: Tensor) -> LazyTensor:
        """An argument of the caller's: its memory is written to at once. The object may get another (`.data =`)."""
        cell = Cell(self, Spec.of(tensor), real=tensor.detach(), counted=False)
        lazy = LazyTensor(View(cell, cell.whole, tensor.device))
        vars(lazy).update(vars(tensor))
        lazy.original_ = tensor
        return lazy

    def phantom_of(self, like: Spec, device: torch.device, counted: bool = True) -> LazyTensor:
        """An argument that is not there yet: a tensor without values, as if on `device`."""
        node = self.node(None, (), (), like, device, None)
        node.tensor = like.empty()
        return LazyTensor(View(Cell(self, like, node, counted=counted), like, device))

    def note(self, tensor: LazyTensor) -> None:
        """The program has this tensor from now on."""
        key = id(tensor)
        self._tensors[key] = ref(tensor, lambda _: self._tensors.pop(key, None))

    def lives(self, size: int) -> None:
        """So many bytes more, or fewer, are alive."""
        self.alive = alive = self.alive + size
        if alive > self.peak_since:
            self.peak_since = alive
            if alive > self.eager_peak:
                self.eager_peak = alive

    def held(self) -> list[LazyTensor]:
        """The deferred tensors that the program has."""
        return [tensor for tensor in (one() for one in list(self._tensors.values())) if tensor is not None]

    @contextmanager
    def as_called(self) -> Iterator[None]:
        """Within the block tensors are made as the caller's own code makes them; operators arrive in inference mode."""
        with torch.inference_mode(self.inference), torch.no_grad():
            yield

    # Nodes

    def somewhere(self, device: torch.device) -> torch.device:
        """The device that a program means, which has asked a weight of an estimate for its own."""
        return self.device if self.phantom and device.type == "meta" else device

    def node(
        self, step: Any, inputs: Sequence[Node], dims: Sequence[Optional[int]], spec: Spec, device: torch.device,
        dim: Optional[int],
    ) -> Node:  # fmt: skip
        """A node of a tensor as `spec` has it; the others are those of `Node`."""
        return Node(
            step, inputs, dims, shape=spec.shape, strides=spec.strides, dtype=spec.dtype, device=device,
            itemsize=spec.dtype.itemsize, dim=dim,
        )  # fmt: skip

    def source(self, tensor: Tensor) -> Node:
        """A node of what is in memory that others can write to."""
        node = self.node(None, (), (), Spec.of(tensor), self.somewhere(tensor.device), None)
        node.tensor = tensor
        self.memory.watch(node)
        return node

    def constant_of(self, tensor: Tensor) -> Optional[Node]:
        """The node of a map of one value that the program has made, as many frames are padded with: its memory need not
        be kept. None where it is anything else, or small."""
        if tensor.dim() < 3 or not tensor.is_floating_point() or tensor.nbytes < self.small:
            return None
        value = self.memory.constant_in(tensor)
        return None if value is None else views.constant(self, Spec.of(tensor), tensor.device, value)

    def own(self, node: Node, spec: Spec) -> LazyTensor:
        """A tensor with memory of its own."""
        cell = Cell(self, spec if spec.alias is None else spec._replace(alias=None), node)
        return LazyTensor(View(cell, cell.whole, node.device))

    def operands(self, value: Any, found: Optional[list[Node]] = None) -> Any:
        """Arguments as steps take them: nodes, which go to `found`, tensors that are held, and all else as it is."""
        kind = type(value)
        if kind in SIMPLE:
            return value
        if kind is LazyTensor:
            node = value.view_.node()
            if found is not None:
                found.append(node)
            return node
        if isinstance(value, Tensor):
            node = self.constant_of(value)
            if node is None:
                return self.memory.hold(value)
            if found is not None:
                found.append(node)
            return node
        if isinstance(value, (list, tuple)):
            for one in value:
                if type(one) not in SIMPLE:
                    return type(value)([self.operands(one, found) for one in value])
            return value
        if isinstance(value, dict):
            return {key: self.operands(one, found) for key, one in value.items()}
        return value

    def whole(self, func: Any, args: Any, kwargs: dict[str, Any], spec: Spec, device: torch.device) -> Node:
        """The node of an operator that needs all of its arguments at once."""
        inputs, call = operators.over(args, kwargs)
        name = func.overloadpacket.__name__
        if any(node.dim is not None for node in inputs):
            self.report[name] = self.report.get(name, 0) + 1
        step = Whole(lambda pieces: call(func, pieces))
        step.name = name
        return self.node(step, inputs, (None,) * len(inputs), spec, device, None)

    def parts(
        self, func: Any, args: Any, kwargs: dict[str, Any], specs: Sequence[Spec], device: Optional[torch.device]
    ) -> tuple[Node, ...]:
        """The nodes of an operator with several results, of which each that is read needs all of its arguments. device:
        of the results; None for that of its first deferred argument."""
        inputs, call = operators.over(args, kwargs)
        name, by_rows = func.overloadpacket.__name__, any(node.dim is not None for node in inputs)

        def compute(pieces: Sequence[Tensor], place: int) -> Tensor:
            if by_rows:
                self.report[name] = self.report.get(name, 0) + 1
            return call(func, pieces)[place]

        found = []
        for place, spec in enumerate(specs):
            step = Whole(lambda pieces, place=place: compute(pieces, place))
            step.name, step.bytes_beside = name, sum(one.nbytes for one in specs) - spec.nbytes
            found.append(self.node(step, inputs, (None,) * len(inputs), spec, device or inputs[0].device, None))
        return tuple(found)
