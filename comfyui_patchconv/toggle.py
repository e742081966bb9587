"""Patch Conv for the length of a run: put on models in place, and taken off as if it had never been there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from types import MethodType
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .convert import convert_model, convolutions, restore_model
from .figures import Figures, StripCount
from .footprint import peak_activations
from .measure import Recorder
from .memory import free
from .planner import DEFAULT_THRESHOLD, GIB, MARGIN, MILLION, MODES, OF_FREE, working_set
from .streaming import choose, signature, streamed
from .tiled_conv import Convolution
from .vae_parts import HALVES, half_of, part_of

_SECONDS = 5.0  # the longest that counting what plain would need may take
_METHODS = dict(zip(HALVES, ("decode", "encode")))

_CASTS = "parameters_manual_cast"
"""On modules of Forge's: whether their weights are cast, or moved, for each call."""

_HOST_ATTRIBUTES = {_CASTS: False, "ldm_patched_cast_weights": False, "weight_function": [], "bias_function": []}
"""Of modules in a copy that is counted: its weights are where and what they should be, nothing to cast or to move."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What a user chooses.

    mode: `"patch"` for each large convolution of the VAE in strips, `"stream"` for the whole VAE in strips. The U-Net's
        convolutions run in strips in either.
    vae, unet: what to patch.
    splits: strips per convolution; 0 for automatic. Not for `"stream"`.
    threshold: millions of input elements from which a convolution runs in strips. Not for `"stream"`.
    budget: GiB that `"stream"` stays within beside the weights; 0 for what is free.

    Raises ValueError for anything else.
    """

    mode: str = "patch"
    vae: bool = True
    unet: bool = False
    splits: int = 0
    threshold: float = DEFAULT_THRESHOLD / MILLION
    budget: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}: use {' or '.join(map(repr, MODES))}.")
        for name in ("vae", "unet"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: use True or False.")
        for name, unit in (("splits", "strips"), ("threshold", "millions of elements"), ("budget", "GiB")):
            value = getattr(self, name)
            wrong = isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf")
            if wrong or (name == "splits" and value != int(value)):
                raise ValueError(f"{name} is {value!r}: use a number of {unit}, or 0.")


class Toggle:
    """Patches the models of one run as `settings` say, until `off`; `report` says what came of it.

    Another extension's stand-in for a decoder or encoder is left alone, and goes on working.

    tell: gets a few words now and then on how far a streamed decode or encode is.
    """

    def __init__(self, settings: Settings, tell: Optional[Tell] = None) -> None:
        self.settings, self.tell = settings, tell
        self._figures: dict[str, Figures] = {}
        self._models: list[tuple[Any, list[_StandIn]]] = []
        self._covered: list[_StandIn] = []

    @property
    def on(self) -> bool:
        """Whether anything is patched."""
        return bool(self._models)

    def follow(self, vaes: Iterable[nn.Module], unets: Iterable[nn.Module], holders: Iterable[Any] = ()) -> None:
        """Patch these models and no others: one that is not among them any more is as it was before.

        holders: of Forge and reForge, what holds a VAE and its estimates of the memory that it takes.
        """
        wanted: list[tuple[Any, Callable[..., None]]] = []
        if self.settings.vae:
            wanted += [*((vae, self._patch_vae) for vae in vaes), *((one, self._patch_estimates) for one in holders)]
        if self.settings.unet:
            wanted += [(unet, self._patch_unet) for unet in unets]
        for entry in list(self._models):
            if not any(entry[0] is model for model, _ in wanted):
                self._models.remove(entry)
                if isinstance(entry[0], nn.Module):
                    restore_model(entry[0])
                self._covered += entry[1]
        self._covered = [stand_in for stand_in in self._covered if not stand_in.leave()]
        for model, patch in wanted:
            if not any(entry[0] is model for entry in self._models):
                self._models.append((model, []))
                patch(*self._models[-1])

    def off(self) -> None:
        """Put everything back. A stand-in that somebody else holds does nothing of its own then.

        Another extension may cover one of ours and later put back what it found: once more takes that away too.
        """
        self.follow([], [])

    def report(self) -> str:
        """What was done, in one line, with figures where they were measured."""
        parts = [figures.line() for part, figures in self._figures.items() if figures.calls or part not in HALVES]
        return "Patch Conv: " + ("; ".join(parts) or "nothing that it was asked to patch has run")

    def _figures_of(self, part: str) -> Figures:
        """Of all models that have such a part."""
        streamed = part in HALVES and self.settings.mode == "stream"
        words = f"VAE {part}" if part in HALVES else part
        return self._figures.setdefault(part, Figures(words, streamed))

    def _patch_vae(self, model: nn.Module, stand_ins: list[_StandIn]) -> None:
        for half, method in _METHODS.items():
            if not any(half_of(name) == half for name, _ in convolutions(model, predicate=lambda *_: True)):
                continue
            if self.settings.mode == "patch":
                self._patch_convolutions(model, half, lambda name, _, half=half: half_of(name) == half, stand_ins)
            owner, _, name = part_of(model, half, method).rpartition(".")
            module = model.get_submodule(owner)
            if _free(module, name) or name != "forward":
                stand_ins.append(_Half(self, half, module, name, self._figures_of(half)))

    def _patch_unet(self, model: nn.Module, stand_ins: list[_StandIn]) -> None:
        if any(convolutions(model, predicate=lambda *_: True)):  # a transformer may have none
            self._patch_convolutions(model, "U-Net", lambda *_: True, stand_ins)

    def _patch_estimates(self, holder: Any, stand_ins: list[_StandIn]) -> None:
        for method in _METHODS.values():
            if callable(getattr(holder, f"memory_used_{method}", None)):
                stand_ins.append(_Estimate(self, holder, method))

    def _patch_convolutions(
        self, model: nn.Module, part: str, chosen: Callable[[str, Convolution], bool], stand_ins: list[_StandIn]
    ) -> None:
        note = StripCount(self._figures_of(part))
        splits, threshold = int(self.settings.splits), round(self.settings.threshold * MILLION)
        convert_model(model, splits, threshold=threshold, predicate=chosen, on_strip=note)
        for _, module in convolutions(model, predicate=chosen):
            if hasattr(module, _CASTS) and _free(module, "forward"):
                stand_ins.append(_CastingForward(self, module, "forward"))


def _free(module: nn.Module, name: str) -> bool:
    """Whether a method of the module is its own, and not another extension's."""
    current = module.__dict__.get(name)
    if isinstance(current, _StandIn):
        current.leave()  # put back by whoever had found it there
        current = module.__dict__.get(name)
    return current is None or getattr(current, "__func__", None) is getattr(type(module), name)


class _StandIn:
    """In the place of a method of an object, a module or what a host holds one in, from when it is made to `leave`."""

    def __init__(self, toggle: Toggle, owner: Any, name: str) -> None:
        self.toggle, self.owner, self.name = toggle, owner, name
        self.own = name in owner.__dict__
        self.plain: Callable[..., Any] = getattr(owner, name)
        while isinstance(self.plain, _StandIn):  # the owner is a copy of one that has this
            self.plain = self.plain.plain
        setattr(owner, name, self)

    def leave(self) -> bool:
        """Put the method back if this one is in its place, or one that an earlier run left; False if neither is."""
        current = self.owner.__dict__.get(self.name)
        if not isinstance(current, _StandIn) or (current is not self and current.toggle.on):
            return False
        if current.own:
            setattr(self.owner, self.name, current.plain)
        else:
            delattr(self.owner, self.name)
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(*args, **kwargs)


class _CastingForward(_StandIn):
    """For a convolution of Forge's, which asks for what is set on itself, ours, only if its weights are to be cast.

    So it is asked to, for one call, to the dtype and device that they have: what it computes is the same.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.toggle.on:
            return self.plain(*args, **kwargs)
        casts = getattr(self.owner, _CASTS)
        setattr(self.owner, _CASTS, True)
        try:
            return self.plain(*args, **kwargs)
        finally:
            setattr(self.owner, _CASTS, casts)


class _Half(_StandIn):
    """Of a decoder or encoder: streamed if that was asked for, and measured."""

    def __init__(self, toggle: Toggle, half: str, module: nn.Module, name: str, figures: Figures) -> None:
        super().__init__(toggle, module, name)
        self.half, self.figures = half, figures
        self._streamed: Optional[Callable[..., Any]] = None
        self._needs: dict[Any, int] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        maps = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        if not self.toggle.on or not maps:
            return self.plain(*args, **kwargs)
        device = maps[0].device
        run = self.plain if self.toggle.settings.mode == "patch" else self._stream(device)
        with Recorder(device, own_peak=False) as recorded:
            result = run(*args, **kwargs)
        self.figures.add(recorded)
        self.figures.plain = max(self.figures.plain, self._plain_needs(args, kwargs, device))
        return result

    def _stream(self, device: torch.device) -> Callable[..., Any]:
        if self._streamed is None:
            budget = round(self.toggle.settings.budget * GIB) or int(OF_FREE * free(device))
            self._streamed = streamed(self.plain, budget=budget, on_progress=self._tell)
        return self._streamed

    def _tell(self, done: int, work: int) -> None:
        if self.toggle.tell is not None and work:
            self.toggle.tell(f"VAE {self.half} in strips: {min(100 * done // work, 100)}%")

    def _plain_needs(self, args: Any, kwargs: Any, device: torch.device) -> int:
        """Bytes that the call would need at once without us, beside its weights; 0 where that cannot be counted."""
        key = signature((args, kwargs))
        if key not in self._needs:
            self._needs[key] = 0
            with suppress(Exception):  # a host's code is free to do what tensors without values cannot
                self._needs[key] = peak_activations(
                    self.owner,
                    lambda twin: getattr(twin, self.name)(*tree_map(_empty, args), **tree_map(_empty, kwargs)),
                    device=device,
                    seconds=_SECONDS,
                    attributes=_HOST_ATTRIBUTES,
                )
        return self._needs[key]


class _Estimate(_StandIn):
    """Of the bytes that a VAE's decode or encode takes, for an input of a shape and dtype: the host makes room by it.

    One sample is counted, as the host does, once for each shape. The host's own estimate is the upper bound, and the
    answer where its code cannot be counted.
    """

    def __init__(self, toggle: Toggle, holder: Any, method: str) -> None:
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
        if settings.mode == "stream":
            return choose(
                MethodType(getattr(type(model), self.method), model),  # its own, not what is patched in
                (torch.empty(sample, dtype=dtype, device="meta"),),
                {},
                budget=round(settings.budget * GIB) or None,
                device=device,
                dtype=dtype,
                attributes=_HOST_ATTRIBUTES,
            ).peak
        maps = peak_activations(
            model,
            lambda twin: getattr(twin, self.method)(torch.empty(sample, dtype=dtype, device=device)),
            device=device,
            dtype=dtype,
            seconds=_SECONDS,
            attributes=_HOST_ATTRIBUTES,
        )
        threshold = round(settings.threshold * MILLION)
        return maps + working_set(maps, int(settings.splits), threshold, device.type, dtype.itemsize)


def _empty(value: Any) -> Any:
    return torch.empty_like(value) if isinstance(value, Tensor) else value
