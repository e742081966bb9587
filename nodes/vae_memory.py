"""What a VAE with strips needs of the device, for the host to make room for and no more."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Optional

import torch

from ..comfyui_patchconv.conv.strip_sizes import working_set
from ..comfyui_patchconv.conv.tiling import Tiling
from ..comfyui_patchconv.hosts.estimates import MARGIN
from ..comfyui_patchconv.streaming import Make, peak_activations

HOST_ATTRIBUTES = {"comfy_cast_weights": False, "weight_function": [], "bias_function": []}
"""Of modules in a copy that is counted: its weights are where and what they should be, nothing to cast or to move."""

Estimate = Callable[[Any, torch.dtype], float]
_Input = tuple[tuple[int, ...], torch.dtype]


class Memory(ABC):
    """Stands in for a VAE's `memory_used_decode` or `memory_used_encode`: bytes for an input of a shape and dtype.

    One sample is counted by `_count`, once for each shape; the host's own estimate is the upper bound, and the answer
    where its code cannot be counted. The host asks once at the start of every decode or encode: `starts` are called
    then.

    host: the estimate that the VAE came with. method: `"decode"` or `"encode"` of `vae.first_stage_model`.
    """

    def __init__(self, vae: Any, method: str, host: Estimate, *starts: Callable[[], None]) -> None:
        self.model, self.device = vae.first_stage_model, torch.device(vae.device)
        self.method, self.host, self.starts = method, host, starts
        self._counted: dict[_Input, float] = {}
        self._maps: dict[_Input, int | Exception] = {}
        self._asked: Optional[_Input] = None

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        for start in self.starts:
            start()
        key = self._asked = (tuple(shape)[1:], dtype)
        if key not in self._counted:
            try:
                self._counted[key] = self._count((1, *key[0]), dtype) * MARGIN
            except Exception as error:  # the host's code is free to do what tensors without values cannot
                logging.info("Patch Conv: %s of %s not counted (%s).", self.method, type(self.model).__name__, error)
                self._counted[key] = float("inf")
        return min(self.host(shape, dtype), self._counted[key])

    def plain(self) -> int:
        """Bytes of the feature maps that one sample of the input last asked about needs at once without us; 0 where
        that cannot be counted."""
        if self._asked is None:
            return 0
        sample, dtype = self._asked
        try:
            return self.maps((1, *sample), dtype)
        except Exception:  # as above
            return 0

    def maps(self, sample: tuple[int, ...], dtype: torch.dtype) -> int:
        """`peak_activations` for an input of shape `sample`, counted once. Raises as that does."""
        key = (sample, dtype)
        if key not in self._maps:
            try:
                self._maps[key] = peak_activations(
                    self.model,
                    lambda model, make: self._run(model, make, sample, dtype),
                    device=self.device,
                    dtype=dtype,
                    attributes=HOST_ATTRIBUTES,
                )
            except Exception as error:
                self._maps[key] = error
        counted = self._maps[key]
        if isinstance(counted, Exception):
            raise counted
        return counted

    def _run(self, model: Any, make: Make, sample: tuple[int, ...], dtype: torch.dtype) -> Any:
        """Have `model` decode or encode as the host does, into a tensor of the host's where the VAE writes to one."""
        options = {}
        if self.method == "decode" and getattr(model, "comfy_has_chunked_io", False):
            options["output_buffer"] = make(model.decode_output_shape(sample), dtype, counted=False)
        return getattr(model, self.method)(make(sample, dtype), **options)

    @abstractmethod
    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> float:
        """Bytes for an input of shape `sample`."""


class StripMemory(Memory):
    """Of a VAE whose convolutions run in strips: its activations, and the working set of a strip."""

    def __init__(self, vae: Any, method: str, host: Estimate, tiling: Tiling, *starts: Callable[[], None]) -> None:
        super().__init__(vae, method, host, *starts)
        self.tiling = tiling

    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> float:
        maps = self.maps(sample, dtype)
        return maps + working_set(maps, self.tiling.splits, self.tiling.threshold, self.device.type, dtype.itemsize)
