"""Streaming in ComfyUI: what runs instead of a VAE's decoder or encoder, and what it tells the host that it needs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]
from torch import nn

from ..comfyui_patchconv.streaming import Plan, Run, carry_out, choose, signature
from .progress import StreamProgress
from .vae_memory import HOST_ATTRIBUTES, MARGIN, Estimate

_OF_FREE = 0.8
"""Share of the free memory that an automatic budget takes: the rest is for what a count does not see."""


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
        budget = self.budget or int(_OF_FREE * model_management.get_free_memory(self.device))
        try:
            return choose(self.forward, args, kwargs, budget=budget, attributes=HOST_ATTRIBUTES)
        except Exception as error:  # the host's code is free to do what tensors without values cannot
            logging.info("Patch Conv: no plan for %s (%s).", type(self.forward).__name__, error)
            return Plan(budget)


class StreamMemory:
    """Stands in for a VAE's `memory_used_decode` or `memory_used_encode`: bytes for an input of a shape and dtype.

    What the plan expects; the host's own estimate is the upper bound, and the answer for video and where no plan can be
    made. The host asks once at the start of every decode or encode, which starts `forward` anew.

    host: the estimate that the VAE came with. method: `"decode"` or `"encode"` of `vae.first_stage_model`.
    """

    def __init__(self, vae: Any, method: str, host: Estimate, forward: StreamedForward) -> None:
        self.model, self.device = vae.first_stage_model, torch.device(vae.device)
        self.method, self.host, self.forward = method, host, forward
        self._counted: dict[tuple[tuple[int, ...], torch.dtype], float] = {}

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        self.forward.start()
        key = (tuple(shape)[1:], dtype)
        if key not in self._counted:
            self._counted[key] = self._count(*key)
        return min(self.host(shape, dtype), self._counted[key])

    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> float:
        if len(sample) == 4 and sample[1] > 1:
            return float("inf")
        input = torch.empty((1, *sample), dtype=dtype, device="meta")
        try:
            plan = choose(
                getattr(self.model, self.method),
                (input,),
                {},
                budget=self.forward.budget or None,
                device=self.device,
                dtype=dtype,
                attributes=HOST_ATTRIBUTES,
            )
        except Exception as error:
            logging.info("Patch Conv: %s of %s not counted (%s).", self.method, type(self.model).__name__, error)
            return float("inf")
        return plan.peak * MARGIN


def part_of(model: nn.Module, half: str, method: str) -> str:
    """The name of the method of `model` to stream: its decoder's or encoder's, or else the whole `method`."""
    return f"{half}.forward" if isinstance(getattr(model, half, None), nn.Module) else method
