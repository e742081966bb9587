"""Streaming in ComfyUI: what runs instead of a VAE's decoder or encoder, and what it tells the host that it needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import MethodType
from typing import Any, Optional

import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ..comfyui_patchconv.plain_needs import COUNT_SECONDS
from ..comfyui_patchconv.planner import OF_FREE
from ..comfyui_patchconv.streaming import Plan, Run, carry_out, choose, choose_if_possible, expect, joins, signature
from .progress import StreamProgress
from .vae_memory import HOST_ATTRIBUTES, Estimate, Memory

_MORE_WORK = 1.25
"""How much more a VAE's chunks may be to compute all at once than one by one."""


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
        if joins(args, kwargs):
            return self.forward(*args, **kwargs)
        key = signature((args, kwargs))
        if key not in self._plans:
            self._plans[key] = self._plan(args, kwargs)
        self.progress.next_call()
        return carry_out(self.forward, args, kwargs, Run(self._plans[key], on_progress=self.progress))

    def _plan(self, args: Any, kwargs: Any) -> Plan:
        return choose_if_possible(
            self.forward,
            args,
            kwargs,
            budget=self._bytes_to_stay_within(),
            device=self.device,
            attributes=HOST_ATTRIBUTES,
        )

    def _bytes_to_stay_within(self) -> int:
        return self.budget or int(OF_FREE * model_management.get_free_memory(self.device)) or 1


class StreamMemory(Memory):
    """Of a VAE of which `part` is streamed, or all of `method` at once where that takes less: of a video that comes to
    the part in chunks, whose last frames are kept for the next one.

    It counts what the plans of the part's calls expect, and what lies beside them.
    """

    def __init__(
        self, vae: Any, method: str, host: Estimate, part: str, forward: StreamedForward, *starts: Callable[[], None]
    ) -> None:
        super().__init__(vae, method, host, forward.start, *starts)
        self.part, self.budget, self.progress = part, forward.budget or None, forward.progress
        self._work: dict[Any, int] = {}
        self._at_once: dict[Any, Optional[Plan]] = {}

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        answer = super().__call__(shape, dtype)
        self.progress.expect(shape[0] * self._work.get(self._asked, 0))
        return answer

    def at_once(self, input: Tensor) -> Optional[Plan]:
        """The plan for all of `method` where that takes less than the part's calls. It is counted if it was not yet."""
        key = (tuple(input.shape)[1:], input.dtype)
        if key not in self._at_once:
            with suppress(Exception):  # the host's code is free to do what tensors without values cannot
                self._count((1, *key[0]), input.dtype)
        return self._at_once.setdefault(key, None)

    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> float:
        settings: Any = dict(budget=self.budget, device=self.device, dtype=dtype, attributes=HOST_ATTRIBUTES)
        expected = expect(
            self.model,
            self.part,
            lambda model: self._run(model, sample, dtype),
            seconds=COUNT_SECONDS,
            **settings,
        )
        peak, work, plan = expected.peak, expected.work, None
        if expected.calls != 1 and self.part != self.method:  # none: the method goes through the part's inside itself
            method = MethodType(getattr(type(self.model), self.method), self.model)  # its own, not what is patched in
            input = torch.empty(sample, dtype=dtype, device="meta")
            with suppress(Exception):
                plan = choose(method, (input,), {}, **settings)
        if plan is not None and plan.peak + input.nbytes < peak and (not work or plan.work <= _MORE_WORK * work):
            peak, work = plan.peak + input.nbytes, plan.work
        else:
            plan = None
        key = (sample[1:], dtype)
        self._work[key], self._at_once[key] = work, plan
        return peak


class StreamedAtOnce(StreamedForward):
    """Stands in for `decode` or `encode`, for a VAE that has a part to stream, as `memory` says."""

    def __init__(self, forward: Callable[..., Any], part: StreamedForward, memory: StreamMemory) -> None:
        self.memory = memory
        super().__init__(forward, part.device, part.budget, part.progress)
        memory.starts = (*memory.starts, self.start)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)  # no buffer to write into, no options
        if not alone or self.memory.at_once(args[0]) is None:
            return self.forward(*args, **kwargs)
        return super().__call__(*args)

    def _plan(self, args: Any, kwargs: Any) -> Plan:
        plan, budget = self.memory.at_once(args[0]), self._bytes_to_stay_within()
        if plan is not None and len(args[0]) == 1 and plan.peak <= budget and not plan.moved:
            return replace(plan, budget=budget)
        return super()._plan(args, kwargs)
