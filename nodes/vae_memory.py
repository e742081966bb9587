"""What a VAE with strips needs of the device, for the host to make room for and no more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..comfyui_patchconv import planner
from ..comfyui_patchconv.footprint import peak_activations
from ..comfyui_patchconv.tiled_conv import Tiling
from .progress import Progress

MARGIN = 1.1
_STRIP_COPIES = 3  # a strip's rows, its result, and the reordered copies that a backend makes of them
_SECONDS = 5.0  # the longest a count may take: video in many chunks is thousands of operators

HOST_ATTRIBUTES = {"comfy_cast_weights": False, "weight_function": [], "bias_function": []}
"""Of modules in a copy that is counted: its weights are where and what they should be, nothing to cast or to move."""

Estimate = Callable[[Any, torch.dtype], float]


class StripMemory:
    """Stands in for a VAE's `memory_used_decode` or `memory_used_encode`: bytes for an input of a shape and dtype.

    The activations of one sample are counted on fake tensors, the working set of a strip is added; the host's own
    estimate is the upper bound, and the answer where its code cannot be counted. The host asks once at the start of
    every decode or encode, which is why `progress` starts here.

    host: the estimate that the VAE came with. method: `"decode"` or `"encode"` of `vae.first_stage_model`.
    """

    def __init__(self, vae: Any, method: str, host: Estimate, tiling: Tiling, progress: Progress) -> None:
        self.model, self.device = vae.first_stage_model, torch.device(vae.device)
        self.method, self.host, self.tiling, self.progress = method, host, tiling, progress
        self._counted: dict[tuple[tuple[int, ...], torch.dtype], float] = {}

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        self.progress.start()
        host = self.host(shape, dtype)
        key = (tuple(shape)[1:], dtype)
        if key not in self._counted:
            self._counted[key] = self._count(*key)
        return min(host, self._counted[key])

    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> float:
        try:
            activations = peak_activations(
                self.model,
                lambda model: getattr(model, self.method)(torch.empty((1, *sample), dtype=dtype, device=self.device)),
                device=self.device,
                dtype=dtype,
                seconds=_SECONDS,
                attributes=HOST_ATTRIBUTES,
            )
        except Exception as error:  # the host's code is free to do what fake tensors cannot
            logging.info("Patch Conv: %s of %s not counted (%s).", self.method, type(self.model).__name__, error)
            return float("inf")
        return (activations + self._working_set(activations, dtype)) * MARGIN

    def _working_set(self, activations: int, dtype: torch.dtype) -> int:
        """Bytes that a convolution needs besides its input and output: of one strip, or whole below the threshold."""
        suitable = planner.STRIP_BYTES.get(self.device.type, planner.STRIP_BYTES_ELSEWHERE)
        strip = suitable
        if self.tiling.splits:
            strip = activations // self.tiling.splits
            strip = min(strip, suitable) if self.device.type == "cpu" else strip
        whole = min(2 * self.tiling.threshold * dtype.itemsize, activations)
        return max(_STRIP_COPIES * strip, whole)
