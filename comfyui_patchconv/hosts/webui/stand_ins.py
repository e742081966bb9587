"""Stands in for methods for the length of a run, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Optional, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ...conv.patch import patched
from ...memory.usage import free, total
from ...streaming import OnProgress
from ...units import GIB, MILLION
from ..attributes import FORGE_CASTS
from ..auto import AutoForward, OnChoice
from ..clones import Wrapper
from ..eager_needs import EagerNeeds
from ..figures import Figures, StripCount
from ..halves import half_of
from ..memory_estimates import AutoEstimate, Estimate, Needs, StreamEstimate, StripEstimate, needs_of
from ..modes import RunMode
from ..streamed import StreamedForward, Switch
from .host import Host
from .settings import Settings
from .several import Several
from .stopping import Stopped, Stops
from .work import Work


class OnOff(Protocol):
    """What stand-ins belong to: while it is off they do nothing of their own."""

    @property
    def on(self) -> bool: ...


class PatchedRun(OnOff, Protocol):
    """A run's toggle, with what its stand-ins read."""

    settings: Settings
    only_rescue: bool
    host: Optional[Host]
    stops: Stops


class StandIn(Wrapper):
    """Stands in for a method of an object, a module or what a host holds one in, from when it is made to `leave`."""

    def __init__(self, toggle: OnOff, owner: Any, name: str) -> None:
        self.toggle, self.owner, self.name = toggle, owner, name
        self.own, found = name in owner.__dict__, owner.__dict__.get(name)
        while isinstance(found, StandIn):  # the owner is a copy of one that has this
            self.own, found = found.own, found.original
        if not self.own:
            owner.__dict__.pop(name, None)
        self.original: Callable[..., Any] = found if self.own else getattr(owner, name)
        self.forward = self.original
        setattr(owner, name, self)

    def leave(self) -> bool:
        """Put the method back if this one is in its place, or one that an earlier run left; False if neither is."""
        current = self.owner.__dict__.get(self.name)
        if not isinstance(current, StandIn) or (current is not self and current.toggle.on):
            return False
        if current.own:
            setattr(self.owner, self.name, current.original)
        else:
            delattr(self.owner, self.name)
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


class CastingForward(StandIn):
    """Forge calls `_conv_forward`, which is ours, only when it casts: so this makes it cast.

    It casts to the dtype and device that the weights have: the result is the same.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.toggle.on:
            return self.original(*args, **kwargs)
        casts = getattr(self.owner, FORGE_CASTS)
        setattr(self.owner, FORGE_CASTS, True)
        try:
            return self.original(*args, **kwargs)
        finally:
            setattr(self.owner, FORGE_CASTS, casts)


class HalfStandIn(StandIn):
    """Measures a decoder or encoder, and streams it if that was asked for or is needed. Live previews are not measured.

    on_strip: called after each strip of a convolution, where it runs in strips because that is needed.
    """

    toggle: PatchedRun

    def __init__(
        self, toggle: PatchedRun, half: str, module: nn.Module, name: str, figures: Figures, on_strip: StripCount
    ) -> None:
        super().__init__(toggle, module, name)
        self.half, self.figures, self.on_strip = half, figures, on_strip
        self._eager = EagerNeeds(module)
        self._work = Work(figures, toggle.stops, toggle.host, f"VAE {half} in strips")
        several = Several(toggle.settings.devices, toggle.stops, toggle.host, figures)
        self._run = _HalfRun(self, self._work.on_progress, self._chosen, several)
        self._preview = _HalfRun(self, lambda done, work: toggle.stops.check())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        maps = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if not self.toggle.on or not maps:
            return self.original(*args, **kwargs)
        self.toggle.stops.check()
        if self.toggle.stops.previewing:
            return self._preview(*args, **kwargs)
        device = maps[0].device
        with self._work.measured(device):
            result = self._run(*args, **kwargs)
        if self.figures.streamed or self.figures.strips > 1:  # else it ran eagerly
            self.figures.eager = max(self.figures.eager, self._eager.of_call(self.name, args, kwargs, device))
        return result

    @property
    def covered(self) -> bool:
        """Whether another extension has put something in the place of this."""
        return not isinstance(self.owner.__dict__.get(self.name), StandIn)

    def needs(self, input: Tensor) -> Optional[Needs]:
        """Tell what one sample of `input` `[N, …]` needs; None where that cannot be counted."""
        if self.toggle.only_rescue:  # it is tried eagerly, whatever it needs
            return Needs(0, 0)
        maps = self._eager.of_call(self.name, (input[:1],), {}, input.device)
        return needs_of(maps, *tiling_of(self.toggle.settings), input.device.type, input.dtype) if maps else None

    def in_strips(self, _: object) -> AbstractContextManager[Any]:
        """Make a context in which this half's large convolutions run in strips, those with a kernel of 1 too."""
        splits, threshold = tiling_of(self.toggle.settings)

        def chosen(name: str, _: nn.Module) -> bool:
            return self.name == "forward" or half_of(name) == self.half

        return patched(self.owner, splits, threshold=threshold, on_strip=self.on_strip, predicate=chosen)

    def _chosen(self, way: RunMode, why: str) -> None:
        self.figures.streamed, self.figures.why = way == "stream", why


class _HalfRun:
    """Runs the method that a `HalfStandIn` stands in for, as its mode asks. several: devices that it is streamed on;
    None for one. The rest: see `AutoForward`."""

    def __init__(
        self, half: HalfStandIn, on_progress: OnProgress, on_choice: Optional[OnChoice] = None,
        several: Optional[Several] = None,
    ) -> None:  # fmt: skip
        settings = half.toggle.settings
        budget, streaming = round(settings.budget * GIB), Switch(settings.mode == "stream")
        forward = half.original if several is None else several.runs(half.original)
        spread = None if several is None else several.spread
        self._streamed = StreamedForward(forward, budget, free, on_progress, switch=streaming, spread=spread)
        self._run: Callable[..., Any] = self._streamed
        if settings.mode == "auto":
            on = partial(streaming.set_to, True)
            self._run = AutoForward(self._streamed, on, half.needs, free, budget, half.in_strips, on_choice)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._streamed.start()
        return self._run(*args, **kwargs)


class Stoppable(StandIn):
    """Stands in for the method of a host that decodes or encodes, and catches what stops that.

    instead: makes what goes on in the place of the result, of the same arguments.
    """

    toggle: PatchedRun

    def __init__(
        self, toggle: PatchedRun, half: str, owner: Any, name: str, figures: Figures, instead: Callable[..., Any]
    ) -> None:
        super().__init__(toggle, owner, name)
        self.half, self.figures, self.instead = half, figures, instead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.toggle.on:
            return self.original(*args, **kwargs)
        try:
            with self.toggle.stops.caught(self.half):
                return self.original(*args, **kwargs)
        except Stopped:
            if not self.toggle.stops.previewing:
                self.figures.state = "stopped"
            return self.instead(*args, **kwargs)


class Preview(StandIn):
    """Stands in for the function of a host that makes a live preview: one that is not told how to decode."""

    toggle: PatchedRun

    def __call__(self, sample: Any, approximation: Any = None) -> Any:
        if approximation is not None:
            return self.original(sample, approximation)
        with self.toggle.stops.preview():
            return self.original(sample)


class MemoryUsed(StandIn):
    """Tells a host how many bytes a VAE's decode or encode takes, for it to make room."""

    def __init__(self, toggle: PatchedRun, holder: Any, method: str) -> None:
        super().__init__(toggle, holder, f"memory_used_{method}")
        settings = toggle.settings
        splits, threshold = tiling_of(settings)
        strips: Any = {"splits": splits, "threshold": threshold}
        budget = round(settings.budget * GIB)
        self._estimate: Estimate
        if settings.mode == "stream":
            self._estimate = StreamEstimate(holder, method, self.original, budget=budget)
        elif settings.mode == "patch":
            self._estimate = StripEstimate(holder, method, self.original, **strips)
        else:
            of_device = partial(total, torch.device(holder.device))
            self._estimate = AutoEstimate(holder, method, self.original, total=of_device, budget=budget, **strips)

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        return (self._estimate if self.toggle.on else self.original)(shape, dtype)


def tiling_of(settings: Settings) -> tuple[int, int]:
    """Strips and threshold of a `Tiling`."""
    return int(settings.splits), round(settings.threshold * MILLION)


def untouched(module: nn.Module, name: str) -> bool:
    """Whether a method of the module is its own, and not another extension's."""
    current = module.__dict__.get(name)
    if isinstance(current, StandIn):
        current.leave()  # put back by whoever had found it there
        current = module.__dict__.get(name)
    return current is None or getattr(current, "__func__", None) is getattr(type(module), name)
