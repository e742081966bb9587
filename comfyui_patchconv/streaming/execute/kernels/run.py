"""Computes chains on a device: by Triton's kernels or comfy-kitchen's where these can, else by PyTorch's operators."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ...graph.node import Node
from . import by_kitchen, by_torch, by_triton
from .by_torch import Read
from .by_triton import Inputs
from .chains import Chain, chains_of
from .choice import uses_kitchen, uses_triton
from .elements import Form

_MOMENTS = Form()

_LEAST_CHANNELS = 32
"""Before and behind a convolution, from which a GPU's tensor cores take channels last: with fewer their tiles are
mostly empty. Not measured yet."""


class Done(NamedTuple):
    """Rows of a chain. padded: a convolution's padding lies around them. moments: of each channel, see
    `Statistics.add_moments`; None where they were not gathered."""

    rows: Tensor
    padded: bool = False
    moments: Optional[Tensor] = None


class Kernels:
    """What computes on `device`. Raises ValueError where `PATCHCONV_KERNELS` is no choice."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._triton = uses_triton(device)
        self._kitchen = not self._triton and uses_kitchen(device) and by_kitchen.operator() is not None
        self._statistics: dict[Node, tuple[Tensor, Tensor]] = {}  # the line of a norm, and what it is for the kitchen

    @property
    def by_triton(self) -> bool:
        """Whether Triton's kernels do what they can."""
        return self._triton and by_triton.works()

    def chains_of(
        self, order: Sequence[Node], roots: Collection[Node], recomputed: Collection[Node]
    ) -> dict[Node, Chain]:
        """The chains of a pass that are computed in one go, by their last steps; see `chains.chains_of`."""
        if self.by_triton:
            return chains_of(order, roots, recomputed)
        if not self._kitchen or not by_kitchen.works():
            return {}
        found = chains_of(order, roots, recomputed)
        return {node: one for node, one in found.items() if by_kitchen.takes(one)}

    def compute(
        self, chain: Chain, first: int, last: int, read: Read, edges: Optional[tuple[int, int]], gathers: bool
    ) -> Done:
        """Rows `[first, last)` of what `chain` gives. edges: rows of padding above and
        below, where its convolution reads just these rows; None where it does not. gathers: moments are wanted."""
        if self.by_triton:
            done = self._by_triton(chain, first, last, read, edges, gathers)
            if done is not None:
                return done
        elif self._kitchen:
            done = self._by_kitchen(chain, first, last, read, edges)
            if done is not None:
                return done
        return Done(by_torch.compute(chain, first, last, read))

    def moments(self, rows: Tensor, dim: int) -> Optional[Tensor]:
        """Of rows of a map along `dim`; None where no kernel gathers them."""
        return by_triton.compute(_MOMENTS, Inputs(rows), None, dim, gathers=True)[1] if self.by_triton else None

    def _by_triton(
        self, chain: Chain, first: int, last: int, read: Read, edges: Optional[tuple[int, int]], gathers: bool
    ) -> Optional[Done]:
        node, dim = chain.last, chain.last.dim
        assert dim is not None
        start, place, _ = chain.links[0]
        (low, high), *spans = chain.spans(first, last)
        inputs = Inputs(read(chain.source, start.dims[place], low, high))
        for (one, _, element), span in zip(chain.links, spans):
            if element.other is not None:
                piece = read(one.inputs[element.other], one.dims[element.other], *span)
                inputs = inputs._replace(**{"line" if element.kind == "scale" else "other": piece})
        above, below = edges or (0, 0)
        up = chain.form.repeats[dim] if chain.form.repeats else 1
        rows = first - low * up, last - low * up
        shape = list(node.shape)
        shape[dim] = above + last - first + below
        out = torch.empty(
            shape, dtype=node.dtype, device=inputs.map.device, memory_format=self._order(chain, inputs.map)
        )
        done, moments = by_triton.compute(chain.form, inputs, out, dim, above, gathers, rows)
        return Done(out, edges is not None, moments) if done else None

    def _by_kitchen(
        self, chain: Chain, first: int, last: int, read: Read, edges: Optional[tuple[int, int]]
    ) -> Optional[Done]:
        norm = chain.links[0].node
        map, line = (read(one, dim, first, last) for one, dim in zip(norm.inputs, norm.dims))
        if self._order(chain, map) is torch.contiguous_format:  # it would copy it
            return None
        known = self._statistics.get(norm)
        if known is None or known[0] is not line:
            known = self._statistics[norm] = line, by_kitchen.statistics(line, norm.shape)
        rows = by_kitchen.compute(chain.form, map, known[1], chain.last.dim or 0, *(edges or (0, 0)))
        return None if rows is None else Done(rows, edges is not None)

    def _order(self, chain: Chain, piece: Tensor) -> torch.memory_format:
        """The order in which what reads a chain takes it fastest."""
        order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(piece.dim())
        if order is None or _is_last(piece):
            return order or torch.contiguous_format
        return order if self._convolves_last(chain.convolution) else torch.contiguous_format

    def _convolves_last(self, node: Optional[Node]) -> bool:
        """Whether a convolution is one that tensor cores compute, which take channels last: of images, in half
        precision."""
        if node is None or len(node.shape) != 4 or self._device.type != "cuda" or node.dtype == torch.float32:
            return False
        channels = min(node.shape[1], next(iter(node.inputs)).shape[1])
        return channels >= _LEAST_CHANNELS and _has_tensor_cores(self._device)


def _is_last(piece: Tensor) -> bool:
    """Whether the channels of an image or a video lie last, and there are several."""
    return piece.stride(1) == 1 < piece.shape[1] and piece.stride(-1) == piece.shape[1]


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    if torch.version.hip is not None:
        return False  # MIOpen's convolutions by channels last are off unless asked for
    return torch.cuda.get_device_capability(device) >= (7, 0)
