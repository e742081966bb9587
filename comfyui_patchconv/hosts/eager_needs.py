"""What a call would take without us, counted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..streaming import Make, peak_activations


def signature(values: Any) -> Any:
    """What a count depends on: the shapes, types and devices of tensors."""
    return tuple(
        (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else type(value)
        for value in tree_flatten(values)[0]
    )


def made_like(values: Any, make: Make) -> Any:
    """Arguments of a call, with inputs of a count in the place of tensors."""
    return tree_map(lambda value: make(value.shape, value.dtype) if isinstance(value, Tensor) else value, values)


class PlainNeeds:
    """Bytes that calls of a method of `owner` would need at once without us, beside its weights.

    attributes: set on each module of the copy that is counted, as in `peak_activations`.
    """

    def __init__(self, owner: nn.Module, name: str, attributes: dict[str, Any]) -> None:
        self.owner, self.name, self.attributes = owner, name, attributes
        self._needs: dict[Any, int] = {}

    def of(self, args: Any, kwargs: Any, device: torch.device) -> int:
        """Of the call with these arguments, counted once for each signature; 0 where that cannot be counted."""
        key = signature((args, kwargs))
        if key not in self._needs:
            self._needs[key] = 0
            with suppress(Exception):  # a host's code is free to do what tensors without values cannot
                self._needs[key] = peak_activations(
                    self.owner,
                    lambda copy, make: getattr(copy, self.name)(*made_like(args, make), **made_like(kwargs, make)),
                    device=device,
                    attributes=self.attributes,
                )
        return self._needs[key]
