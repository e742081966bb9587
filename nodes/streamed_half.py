"""Streaming in ComfyUI: what runs instead of a VAE's decoder or encoder, and what it tells the host that it needs."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]

from ..comfyui_patchconv.planner import OF_FREE
from ..comfyui_patchconv.streaming import Plan, Run, carry_out, choose, choose_if_possible, signature
from .progress import StreamProgress
from .vae_memory import HOST_ATTRIBUTES, Estimate, Memory


class StreamedForward:
    """Stands in for `forward`, the decoder's or encoder's, or `decode` or `encode` where a VAE has no such part.

    budget: bytes, or 0 for what the host says is free when a decode or encode begins.
    """

    def __init__(
        self, forward: Callable[..., Any], device: torch.device, budget: int, progress: StreamProgress
    ) -> None:
        self.forward, self.device, self.budget, self.progress = forward, device, budget, progress
        self.start()

    def start(self) -> None:
        """A decode or encode begins: plans may change with the memory that is free."""
        self.progress.start()
        self._plans: dict[Any, Plan] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = signature((args, kwargs))
        if key not in self._plans:
            self._plans[key] = self._plan(args, kwargs)
        return carry_out(self.forward, args, kwargs, Run(self._plans[key], on_progress=self.progress))

    def _plan(self, args: Any, kwargs: Any) -> Plan:
        budget = self.budget or int(OF_FREE * model_management.get_free_memory(self.device)) or 1
        return choose_if_possible(self.forward, args, kwargs, budget=budget, attributes=HOST_ATTRIBUTES)


class StreamMemory(Memory):
    """Of a VAE that is streamed: what the plan expects. Video is not planned: the host's own estimate stands for it."""

    def __init__(
        self, vae: Any, method: str, host: Estimate, forward: StreamedForward, *starts: Callable[[], None]
    ) -> None:
        super().__init__(vae, method, host, forward.start, *starts)
        self.budget = forward.budget or None

    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> float:
        if _is_video(sample):
            return float("inf")
        return choose(
            MethodType(getattr(type(self.model), self.method), self.model),  # its own, not what is patched in
            (torch.empty(sample, dtype=dtype, device="meta"),),
            {},
            budget=self.budget,
            device=self.device,
            dtype=dtype,
            attributes=HOST_ATTRIBUTES,
        ).peak

    def maps(self, sample: tuple[int, ...], dtype: torch.dtype) -> int:
        return 0 if _is_video(sample) else super().maps(sample, dtype)


def _is_video(sample: tuple[int, ...]) -> bool:
    return len(sample) == 5 and sample[2] > 1
