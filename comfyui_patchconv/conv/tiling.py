"""How a convolution is cut into strips: what `convert_model` sets, and what its rows are worked out from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

from torch import nn

from .halo import Axis
from .strip_sizes import DEFAULT_THRESHOLD, MAX_ELEMENTS
from .transforms import is_compiled

Convolution = nn.modules.conv._ConvNd
OnStrip = Callable[[nn.Module, int, int], None]


@dataclass(frozen=True)
class Tiling:
    """How a convolution is cut.

    splits: strips to cut the output into; 0 for as many as `strip_rows` finds best. Strips are equal, so a height that
        `splits` does not divide may need fewer; on a CPU, large strips are cut further.
    sequential: one strip after the other (least memory), or False for all strips in one batched call.
    threshold: input elements (C·H·W, times depth for 3-D) from which strips are used. Below it nothing changes, unless
        input or output pass `max_elements`.
    on_strip: called as `on_strip(module, rows_done, rows)` after each strip, and once after an untouched call, for
        progress. What it raises ends the forward. A compiled model does not call it.
    strip_bytes: of input and output of one strip, at most; None for what suits the device.
    max_elements: of the largest tensor that the backend indexes.
    """

    splits: int = 4
    sequential: bool = True
    threshold: int = DEFAULT_THRESHOLD
    on_strip: Optional[OnStrip] = None
    strip_bytes: Optional[int] = None
    max_elements: int = MAX_ELEMENTS

    def __post_init__(self) -> None:
        if isinstance(self.splits, bool) or not isinstance(self.splits, int) or self.splits < 0:
            raise ValueError(f"splits is {self.splits!r}: use a whole number from 1, or 0 for automatic.")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int) or self.threshold < 0:
            raise ValueError(f"threshold is {self.threshold!r}: use a whole number of elements, 0 for always.")
        if not isinstance(self.sequential, bool):
            raise ValueError(f"sequential is {self.sequential!r}: use True or False.")
        for name in ("strip_bytes", "max_elements"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}: use a whole number from 1.")

    def report(self, module: nn.Module, done: int, rows: int) -> None:
        """Call `on_strip`, if there is one, but not while a compiler reads the code."""
        if self.on_strip is not None and not is_compiled():
            self.on_strip(module, done, rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tiling:
        return self  # a copied model reports to the same listener, not to a copy of it


def padding_of(module: Convolution) -> list[tuple[int, int]]:
    """Rows or columns that the convolution adds before and behind each spatial axis, first axis first."""
    if module.padding_mode != "zeros":  # the module pads by this list, last axis first
        flat = module._reversed_padding_repeated_twice
        return [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)][::-1]
    sides = zip(module.kernel_size, module.stride, module.dilation)
    axes = [
        Axis.of(*side, module.padding if isinstance(module.padding, str) else module.padding[i])
        for i, side in enumerate(sides)
    ]
    return [(axis.before, axis.after) for axis in axes]
