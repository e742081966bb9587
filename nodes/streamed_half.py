"""Streaming in ComfyUI: what runs instead of a VAE's decoder or encoder, and what it tells the host that it needs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ..comfyui_patchconv.hosts.estimates import OF_FREE
from ..comfyui_patchconv.streaming import Streamed, expect, joins
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
        self._streamed = Streamed(on_progress=progress)
        self.start()

    def start(self) -> None:
        """A decode or encode begins: it may take what is free now."""
        self.progress.start()
        self._fresh = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if joins(args, kwargs):
            return self.forward(*args, **kwargs)
        if self._fresh:
            self._fresh = False
            self._streamed.budget = self._bytes_to_stay_within()
        self.progress.next_call()
        return self._streamed.call(self.forward, args, kwargs)

    def _bytes_to_stay_within(self) -> int:
        return self.budget or int(OF_FREE * model_management.get_free_memory(self.device)) or 1


class StreamMemory(Memory):
    """Of a VAE of which `part` is streamed, or all of `method` at once where that takes less: of a video that comes to
    the part in chunks, whose last frames are kept for the next one.

    It counts what the schedules of the part's calls expect, and what lies beside them.
    """

    def __init__(
        self, vae: Any, method: str, host: Estimate, part: str, forward: StreamedForward, *starts: Callable[[], None]
    ) -> None:
        super().__init__(vae, method, host, forward.start, *starts)
        self.part, self.budget, self.progress = part, forward.budget or None, forward.progress
        self._work: dict[Any, int] = {}
        self._at_once: dict[Any, bool] = {}

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        answer = super().__call__(shape, dtype)
        self.progress.expect(shape[0] * self._work.get(self._asked, 0))
        return answer

    def at_once(self, input: Tensor) -> bool:
        """Whether all of `method` takes less than the part's calls. It is counted if it was not yet."""
        key = (tuple(input.shape)[1:], input.dtype)
        if key not in self._at_once:
            with suppress(Exception):  # the host's code is free to do what tensors without values cannot
                self._count((1, *key[0]), input.dtype)
        return self._at_once.setdefault(key, False)

    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> float:
        options: Any = dict(budget=self.budget, device=self.device, dtype=dtype, attributes=HOST_ATTRIBUTES)

        def run(model: Any, make: Any) -> Any:
            return self._run(model, make, sample, dtype)

        expected = expect(self.model, run, part=self.part, **options)
        chosen, at_once = expected, False
        if expected.calls != 1 and self.part != self.method:  # none: the method goes through the part's inside itself
            with suppress(Exception):
                chosen = expect(self.model, run, **options)
                at_once = chosen.peak < expected.peak or not expected.calls
                at_once = at_once and (not expected.work or chosen.work <= _MORE_WORK * expected.work)
        chosen = chosen if at_once else expected
        key = (sample[1:], dtype)
        self._work[key], self._at_once[key] = chosen.work, at_once
        self._maps.setdefault((sample, dtype), expected.eager)
        return chosen.peak


class StreamedAtOnce(StreamedForward):
    """Stands in for `decode` or `encode`, for a VAE that has a part to stream, as `memory` says."""

    def __init__(self, forward: Callable[..., Any], part: StreamedForward, memory: StreamMemory) -> None:
        self.memory = memory
        super().__init__(forward, part.device, part.budget, part.progress)
        memory.starts = (*memory.starts, self.start)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)  # no buffer to write into, no options
        if not alone or not self.memory.at_once(args[0]):
            return self.forward(*args, **kwargs)
        return super().__call__(*args)
