"""A batch over the ranks of a group: some ranks take some samples, and share the rows of these."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Optional

import torch
from torch import Tensor

from ..execute.stored import StoredTensor, empty
from ..graph.node import Node
from ..graph.samples import of_part, split_by_sample
from .ranks import Ranks
from .together import put_together


class Batch:
    """What this rank is to do of the nodes `whole`, whose samples are split: `roots`, the same of its own samples,
    together with `peers`, which have the same ones.

    bytes: of the whole results, of which its samples are the home of `roots`.
    """

    def __init__(self, whole: Sequence[Node], apart: Sequence[Node], ranks: Ranks, parts: int, inference: bool) -> None:
        self._whole, self._results = list(whole), [_room_for(node, inference) for node in whole]
        self.bytes = sum(node.bytes for node in whole if node.home is None)
        self.parts, each = parts, ranks.count // parts
        part, place = divmod(ranks.rank, each)
        self.peers = ranks.some(range(part * each, (part + 1) * each))
        self._others = ranks.some(range(place, ranks.count, each))
        found = of_part(apart, part, parts)
        self.roots = [found[node] for node in whole]
        for root, result in zip(self.roots, self._results):
            root.home = result.narrow(0, part * root.shape[0], root.shape[0])

    @classmethod
    def of(cls, roots: Sequence[Node], ranks: Ranks, samples: int, inference: bool) -> Optional[Batch]:
        """The nodes that are to be stored of a call with so many samples, split over as many groups of ranks as divide
        both numbers; None where that is one, and where steps mix samples."""
        parts = gcd(ranks.count, samples)
        apart = split_by_sample(roots, parts) if parts > 1 else None
        return None if apart is None else cls(roots, apart, ranks, parts, inference)

    def put_together(self) -> None:
        """Store the whole results, once this rank has its samples of them: those of the others come."""
        for node, root, result in zip(self._whole, self.roots, self._results):
            if root.tensor is not root.home:
                root.home.copy_(root.tensor)
            put_together(self._others, StoredTensor.around(node, result, 0, lambda size: None), node.shape[0])
            node.store(result)


def _room_for(node: Node, inference: bool) -> Tensor:
    if node.home is not None:
        return node.home
    with torch.inference_mode(inference):
        return empty(node)
