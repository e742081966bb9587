"""Streaming in ComfyUI: what runs instead of a VAE's decoder or encoder, and what it tells the host that it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]

from ..comfyui_patchconv.plain_needs import COUNT_SECONDS
from ..comfyui_patchconv.planner import OF_FREE
from ..comfyui_patchconv.streaming import Plan, Run, carry_out, choose_if_possible, expect, signature
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
        self.progress.next_call()
        return carry_out(self.forward, args, kwargs, Run(self._plans[key], on_progress=self.progress))

    def _plan(self, args: Any, kwargs: Any) -> Plan:
        budget = self.budget or int(OF_FREE * model_management.get_free_memory(self.device)) or 1
        return choose_if_possible(self.forward, args, kwargs, budget=budget, attributes=HOST_ATTRIBUTES)


class StreamMemory(Memory):
    """Of a VAE that is streamed: what the plans of its calls expect, and what lies beside the streamed part."""

    def __init__(
        self, vae: Any, method: str, host: Estimate, part: str, forward: StreamedForward, *starts: Callable[[], None]
    ) -> None:
        super().__init__(vae, method, host, forward.start, *starts)
        self.part, self.budget, self.progress = part, forward.budget or None, forward.progress
        self._work: dict[Any, int] = {}

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        answer = super().__call__(shape, dtype)
        self.progress.expect(shape[0] * self._work.get(self._asked, 0))
        return answer

    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> float:
        expected = expect(
            self.model,
            self.part,
            lambda model: getattr(model, self.method)(torch.empty(sample, dtype=dtype, device=self.device)),
            budget=self.budget,
            device=self.device,
            dtype=dtype,
            seconds=COUNT_SECONDS,
            attributes=HOST_ATTRIBUTES,
        )
        self._work[self._asked] = expected.work
        return expected.peak
