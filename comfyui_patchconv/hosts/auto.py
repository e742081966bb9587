"""Chooses how a decode or encode runs: eagerly where that fits, in strips where that is enough, else streamed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from ..memory.allocator import release
from ..memory.errors import is_out_of_memory
from ..streaming import joins
from ..units import size_of
from .calls import device_of
from .clones import Wrapper, owner_of
from .memory_estimates import OF_FREE, Needs
from .modes import RunMode

_log = logging.getLogger(__name__)

OnChoice = Callable[[RunMode, str], None]
"""Called with the way that a call will run, and why."""


class Choice(NamedTuple):
    """way: how a call runs. why: what speaks for it, in a few words; empty where nobody is to hear of it."""

    way: RunMode
    why: str


class AutoForward(Wrapper):
    """Stands in for a VAE's `decode` or `encode`, and chooses at each call by what it needs and what is free.

    Where memory runs out all the same, the call begins anew, streamed; a call of the same shape is streamed from then
    on.

    forward: the method. streaming: makes a context in which it is streamed. needs: tells what one sample of an input
    `[N, …]` needs eagerly and in strips; None where that is not known, and `Needs(0, 0)` where eager is to be tried
    without a word. free: asked for the bytes that are free on a device. budget: bytes to stay within; 0 for the most of
    what is free. in_strips: makes a context in which large convolutions of a model run in strips. on_choice: see
    `OnChoice`. model: the one that runs in strips where the method does not tell, for another extension has put
    something of its own there; None where `in_strips` knows.
    """

    def __init__(
        self, forward: Callable[..., Any], streaming: Callable[[], AbstractContextManager[Any]],
        needs: Callable[[Tensor], Optional[Needs]], free: Callable[[torch.device], int], budget: int,
        in_strips: Callable[[Any], AbstractContextManager[Any]], on_choice: Optional[OnChoice] = None,
        model: Optional[nn.Module] = None,
    ) -> None:  # fmt: skip
        self.forward, self.streaming, self.needs = forward, streaming, needs
        self.free, self.budget, self.in_strips, self.on_choice = free, budget, in_strips, on_choice
        self.model = model
        self._logged: list[RunMode] = []  # what was last, of a copy too
        self._exceeded: set[Any] = set()

    def start(self) -> None:
        """Begin a decode or encode, here or on a clone for another device: how it runs is logged again."""
        self._logged.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], Tensor) or joins(args, kwargs):
            return self.forward(*args, **kwargs)
        input = args[0]
        device = device_of(args, kwargs)
        way, why = self.choose(input, device)
        if why:
            self._tell(way, why)
        if way != "stream":
            try:
                with self._in_strips() if way == "patch" else nullcontext():
                    return self.forward(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Here, where nothing holds what the call had any more.
            release(device)
            self._exceeded.add((tuple(input.shape), input.dtype))
            self._tell("stream", f"memory ran out {'in strips' if way == 'patch' else 'eagerly'}")
        with self.streaming():
            return self.forward(*args, **kwargs)

    def choose(self, input: Tensor, device: torch.device) -> Choice:
        """Say how a call with `input` `[N, …]` that computes on `device` is to run now."""
        if (tuple(input.shape), input.dtype) in self._exceeded:
            return Choice("stream", "memory ran out before")
        needs = self.needs(input)
        if needs is None:
            return Choice("stream", "what eager needs is not known")
        if not needs.eager:
            return Choice("eager", "")
        samples, free = input.shape[0], self.free(device)
        limit = self.budget or int(OF_FREE * free)
        room = f"{size_of(self.budget)} are allowed" if self.budget else f"{size_of(free)} are free"
        why = f"eager needs {size_of(samples * needs.eager)}, {room}"
        if samples * needs.eager <= limit:
            return Choice("eager", why)
        if samples * needs.patch <= limit:
            return Choice("patch", f"{why}; strips need {size_of(samples * needs.patch)}")
        return Choice("stream", why)

    def _in_strips(self) -> AbstractContextManager[Any]:
        owner = owner_of(self)
        return self.in_strips(self.model if owner is None else owner)

    def _tell(self, way: RunMode, why: str) -> None:
        if self._logged != [way]:  # not for each tile
            self._logged[:] = [way]
            _log.info("Patch Conv: auto: %s (%s).", WORDS[way], why)
        if self.on_choice is not None:
            self.on_choice(way, why)


WORDS: dict[RunMode, str] = {"eager": "eager", "patch": "in strips", "stream": "streamed"}
"""What a call is said to have run as."""
