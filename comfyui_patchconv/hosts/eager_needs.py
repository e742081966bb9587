"""Counts what calls need when they run eagerly, without us: once for each shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..streaming import Make, peak_activations
from .attributes import HOST_ATTRIBUTES


def signature(values: Any) -> Any:
    """What a count depends on: the shapes, types and devices of tensors."""
    return tuple(
        (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else type(value)
        for value in tree_flatten(values)[0]
    )


def made_like(values: Any, make: Make) -> Any:
    """Arguments of a call, with inputs of a count in the place of tensors."""
    return tree_map(lambda value: make(value.shape, value.dtype) if isinstance(value, Tensor) else value, values)


def without_values(values: Any) -> Any:
    """The same arguments with tensors that have no memory, to be kept until they are counted."""
    return tree_map(
        lambda value: (
            torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value
        ),
        values,
    )


class EagerNeeds:
    """Counts the bytes that calls of `model` would need at once without us, beside its weights.

    Each key is counted once; what the count raised is raised again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._counted: dict[Any, int | Exception] = {}

    def of(
        self, key: Any, run: Callable[[Any, Make], object], device: torch.device, dtype: Optional[torch.dtype] = None
    ) -> int:
        """Count the bytes that `run(copy, make)` needs, by `peak_activations`. Raises what `run` raises."""
        if key not in self._counted:
            try:
                self._counted[key] = peak_activations(
                    self.model, run, device=device, dtype=dtype, attributes=HOST_ATTRIBUTES
                )
            except Exception as error:  # a host's code is free to do what tensors without values cannot
                self._counted[key] = error.with_traceback(None)
        counted = self._counted[key]
        if isinstance(counted, Exception):
            raise counted
        return counted

    def of_call(
        self, name: str, args: Any, kwargs: Any, device: torch.device, dtype: Optional[torch.dtype] = None
    ) -> int:
        """Count the bytes that the method `name` needs with these arguments; 0 where that is impossible."""

        def run(copy: Any, make: Make) -> Any:
            return getattr(copy, name)(*made_like(args, make), **made_like(kwargs, make))

        try:
            return self.of((name, signature((args, kwargs))), run, device, dtype)
        except Exception:
            return 0

    def learn(self, key: Any, counted: int) -> None:
        """Keep what another count has found on its way, unless the key was counted already."""
        self._counted.setdefault(key, counted)
