"""Has a host's upscalers run over whole pictures, streamed, where they would cut them into tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import Tensor

from ...memory.usage import free
from ...units import GIB
from ..figures import Figures
from ..streamed import StreamedForward
from ..upscale import for_another_process, name_of, network_of
from .several import Several
from .stand_ins import PatchedRun, StandIn
from .stopping import Stopped
from .work import Work

_HOME = "modules.upscaler_utils"
"""The module of the hosts that cuts the tiles."""

_FUNCTIONS = {"upscale_with_model": ("model", "img"), "tiled_upscale_2": ("img", "model")}
"""The functions in it that do, the second on tensors, and what they take by position."""


def functions_of(module: ModuleType) -> list[str]:
    """Name those of the functions that a module has, by import or because it is their home."""
    return [name for name in _FUNCTIONS if _is_of_host(_attributes(module).get(name))]


def having_them(modules: Iterable[object]) -> list[ModuleType]:
    """Those of `modules` that have one of the functions, each once."""
    found = {id(one): one for one in modules if isinstance(one, ModuleType) and functions_of(one)}
    return list(found.values())


def _attributes(module: ModuleType) -> dict[str, Any]:
    return object.__getattribute__(module, "__dict__")  # a module that is loaded when it is first used stays as it is


def _is_of_host(value: Any) -> bool:
    function = value.original if isinstance(value, StandIn) else value  # left by an earlier run
    return callable(function) and getattr(function, "__module__", None) == _HOME


class _Described:
    """Calls a model, for which another process gets what that needs of what describes it."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, image: Tensor) -> Tensor:
        return self._model(image)

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": for_another_process(self._model)}


class Upscaler:
    """Streams the models of one architecture, and counts what that takes."""

    def __init__(self, toggle: PatchedRun, figures: Figures) -> None:
        self.figures, self._stops = figures, toggle.stops
        self._work = Work(figures, toggle.stops, toggle.host, f"{figures.part} in strips")
        budget = round(toggle.settings.budget * GIB)
        self._several = Several(toggle.settings.devices, toggle.stops, toggle.host, figures)
        self._streamed = StreamedForward(_no_model, budget, free, self._work.on_progress, spread=self._several.spread)

    def __call__(self, image: Tensor, model: Any) -> Tensor:
        """What `model` makes of an image `[N, C, H, W]`."""
        self._stops.check()
        network = network_of(model)
        assert network is not None
        device = next(network.parameters()).device
        self._streamed.start()
        self._streamed.forward = self._several.runs(_Described(model))
        try:
            with self._work.measured(device):
                result = self._streamed(image.to(device))  # the host moves single tiles
            self.figures.eager = max(self.figures.eager, self._streamed.eager)
        finally:  # the host loads one for each picture
            self._streamed.forward = _no_model
            self._several.forget()
        return result


def _no_model(image: Tensor) -> Tensor:
    raise AssertionError("an upscaler was called without its model")


class _StreamedModel:
    """Stands for a model before the host's functions, which look for its weights and call it."""

    def __init__(self, model: Any, upscaler: Upscaler) -> None:
        self._model, self._upscaler = model, upscaler

    def __call__(self, image: Tensor) -> Tensor:
        return self._upscaler(image, self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class UntiledUpscale(StandIn):
    """Stands in for a function of the host that upscales tile by tile: there is one tile, and its model is streamed.

    One that is stopped gives back the picture that it was given, as the host does.

    upscaler_of: finds what streams the models of an architecture, by its name.
    """

    toggle: PatchedRun

    def __init__(
        self, toggle: PatchedRun, owner: ModuleType, name: str, upscaler_of: Callable[[str], Upscaler]
    ) -> None:
        super().__init__(toggle, owner, name)
        self._upscaler_of = upscaler_of

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(_FUNCTIONS[self.name], args)), **kwargs}
        model = given.get("model")
        if not self.toggle.on or isinstance(model, _StreamedModel) or network_of(model) is None:
            return self.original(*args, **kwargs)
        upscaler = self._upscaler_of(name_of(model) if hasattr(model, "architecture") else type(model).__name__)
        try:
            with self.toggle.stops.caught("upscaler"):
                return self.original(**{**given, "model": _StreamedModel(model, upscaler), "tile_size": 0})
        except Stopped:
            upscaler.figures.state = "stopped"
            return given["img"]
