"""What a call would take without us, counted."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .footprint import peak_activations
from .streaming import signature

COUNT_SECONDS = 5.0
"""The longest that counting what plain would need may take."""


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
                    lambda twin: getattr(twin, self.name)(*tree_map(_empty, args), **tree_map(_empty, kwargs)),
                    device=device,
                    seconds=COUNT_SECONDS,
                    attributes=self.attributes,
                )
        return self._needs[key]


def _empty(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, Tensor) else value
