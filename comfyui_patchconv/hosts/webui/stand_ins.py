"""What is put in the place of methods for the length of a run, and taken out again without a trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Optional, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ...conv.strip_sizes import working_set
from ...memory.recorder import Recorder
from ...memory.usage import free
from ...streaming import Make, Streamed, expect, peak_activations
from ...units import GIB, MILLION
from ..eager_needs import PlainNeeds
from ..estimates import MARGIN, OF_FREE
from ..figures import Figures
from .settings import Settings

CASTS = "parameters_manual_cast"
"""On modules of Forge's: whether their weights are cast, or moved, for each call."""

HOST_ATTRIBUTES = {CASTS: False, "ldm_patched_cast_weights": False, "weight_function": [], "bias_function": []}
"""Of modules in a copy that is counted: its weights are where and what they should be, nothing to cast or to move."""

Tell = Callable[[str], None]


class Switch(Protocol):
    """What stand-ins belong to: while it is not on they do nothing of their own."""

    settings: Settings
    tell: Optional[Tell]

    @property
    def on(self) -> bool: ...


class StandIn:
    """In the place of a method of an object, a module or what a host holds one in, from when it is made to `leave`."""

    def __init__(self, toggle: Switch, owner: Any, name: str) -> None:
        self.toggle, self.owner, self.name = toggle, owner, name
        self.own = name in owner.__dict__
        self.plain: Callable[..., Any] = getattr(owner, name)
        while isinstance(self.plain, StandIn):  # the owner is a copy of one that has this
            self.plain = self.plain.plain
        setattr(owner, name, self)

    def leave(self) -> bool:
        """Put the method back if this one is in its place, or one that an earlier run left; False if neither is."""
        current = self.owner.__dict__.get(self.name)
        if not isinstance(current, StandIn) or (current is not self and current.toggle.on):
            return False
        if current.own:
            setattr(self.owner, self.name, current.plain)
        else:
            delattr(self.owner, self.name)
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(*args, **kwargs)


class CastingForward(StandIn):
    """For a convolution of Forge's, which asks for what is set on itself, ours, only if its weights are to be cast.

    So it is asked to, for one call, to the dtype and device that they have: what it computes is the same.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.toggle.on:
            return self.plain(*args, **kwargs)
        casts = getattr(self.owner, CASTS)
        setattr(self.owner, CASTS, True)
        try:
            return self.plain(*args, **kwargs)
        finally:
            setattr(self.owner, CASTS, casts)


class Half(StandIn):
    """Of a decoder or encoder: streamed if that was asked for, and measured."""

    def __init__(self, toggle: Switch, half: str, module: nn.Module, name: str, figures: Figures) -> None:
        super().__init__(toggle, module, name)
        self.half, self.figures = half, figures
        self._streamed = Streamed(on_progress=self._tell)
        self._plain_needs = PlainNeeds(module, name, HOST_ATTRIBUTES)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        maps = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if not self.toggle.on or not maps:
            return self.plain(*args, **kwargs)
        device = maps[0].device
        run = self.plain if self.toggle.settings.mode == "patch" else self._stream(device)
        with Recorder(device, own_peak=False) as recorded:
            result = run(*args, **kwargs)
        self.figures.add(recorded)
        self.figures.plain = max(self.figures.plain, self._plain_needs.of(args, kwargs, device))
        return result

    def _stream(self, device: torch.device) -> Callable[..., Any]:
        self._streamed.budget = round(self.toggle.settings.budget * GIB) or int(OF_FREE * free(device)) or 1
        return lambda *args, **kwargs: self._streamed.call(self.plain, args, kwargs)

    def _tell(self, done: int, work: int) -> None:
        if self.toggle.tell is not None and work:
            self.toggle.tell(f"VAE {self.half} in strips: {min(100 * done // work, 100)}%")


class Estimate(StandIn):
    """Of the bytes that a VAE's decode or encode takes, for an input of a shape and dtype: the host makes room by it.

    One sample is counted, as the host does, once for each shape. The host's own estimate is the upper bound, and the
    answer where its code cannot be counted.
    """

    def __init__(self, toggle: Switch, holder: Any, method: str) -> None:
        super().__init__(toggle, holder, f"memory_used_{method}")
        self.method = method
        self._counted: dict[Any, float] = {}

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        key = (tuple(shape)[1:], dtype)
        if self.toggle.on and key not in self._counted:
            self._counted[key] = float("inf")
            with suppress(Exception):  # a host's code is free to do what tensors without values cannot
                self._counted[key] = MARGIN * self._count((1, *key[0]), dtype)
        plain = self.plain(shape, dtype)
        return min(plain, self._counted[key]) if self.toggle.on else plain

    def _count(self, sample: tuple[int, ...], dtype: torch.dtype) -> int:
        settings, model, device = self.toggle.settings, self.owner.first_stage_model, torch.device(self.owner.device)

        def run(copy: Any, make: Make) -> Any:
            return getattr(copy, self.method)(make(sample, dtype))

        options: Any = dict(device=device, dtype=dtype, attributes=HOST_ATTRIBUTES)
        if settings.mode == "stream":
            return expect(model, run, budget=round(settings.budget * GIB) or None, **options).peak
        maps = peak_activations(model, run, **options)
        threshold = round(settings.threshold * MILLION)
        return maps + working_set(maps, int(settings.splits), threshold, device.type, dtype.itemsize)


def untouched(module: nn.Module, name: str) -> bool:
    """Whether a method of the module is its own, and not another extension's."""
    current = module.__dict__.get(name)
    if isinstance(current, StandIn):
        current.leave()  # put back by whoever had found it there
        current = module.__dict__.get(name)
    return current is None or getattr(current, "__func__", None) is getattr(type(module), name)
