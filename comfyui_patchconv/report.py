"""What a decoder or encoder took, beside what it would have taken without us: measured, counted, and in words."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .footprint import peak_activations
from .measure import Recorder
from .planner import GIB
from .streaming import signature

COUNT_SECONDS = 5.0
"""The longest that counting what plain would need may take."""


@dataclass
class Figures:
    """Of all calls of a decoder or encoder: how many, the highest peak, and what plain would have needed; bytes."""

    calls: int = 0
    peak: int = 0
    plain: int = 0

    def measure(self, run: Callable[[], Any], device: torch.device) -> Any:
        """What `run()` returns; it is one call more."""
        with Recorder(device, own_peak=False) as recorded:
            result = run()
        self.calls += 1
        self.peak = max(self.peak, recorded.peak)
        return result

    def in_words(self, half: str, strips: Optional[int]) -> str:
        """Without what was not measured. strips: the most that a convolution ran in; None if the half was streamed."""
        words = f"VAE {half}"
        words = f"{words} streamed" if strips is None else in_strips(words, strips)
        if self.peak:
            words += f", peak {size(self.peak)}"
        if self.plain:
            words += f" (plain: about {size(self.plain)})"
        return words


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


def in_strips(part: str, strips: int) -> str:
    return f"{part} in up to {strips} strips" if strips > 1 else f"{part} whole (no convolution above the threshold)"


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def _empty(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, Tensor) else value
