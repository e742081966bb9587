"""Puts Patch Conv on models for the length of a run, and takes it off as if it had never been there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Optional

from torch import nn

from ...conv.patch import convert_model, convolutions, restore_model
from ...conv.tiling import Convolution
from ...units import MILLION
from ..attributes import FORGE_CASTS
from ..figures import Figures, StripCount
from ..halves import HALVES, half_of, part_of
from .settings import Settings
from .stand_ins import CastingForward, Half, MemoryUsed, StandIn, Tell, untouched

_METHODS = dict(zip(HALVES, ("decode", "encode")))


class Toggle:
    """Patches the models of one run as `settings` say, until `off`; `report` says what came of it.

    Another extension's stand-in for a decoder or encoder is left alone, and goes on working.

    tell: gets a few words now and then on how far a streamed decode or encode is.
    """

    def __init__(self, settings: Settings, tell: Optional[Tell] = None) -> None:
        self.settings, self.tell = settings, tell
        self._figures: dict[str, Figures] = {}
        self._models: list[tuple[Any, list[StandIn]]] = []
        self._covered: list[StandIn] = []

    @property
    def on(self) -> bool:
        """Whether anything is patched."""
        return bool(self._models)

    def follow(self, vaes: Iterable[nn.Module], unets: Iterable[nn.Module], holders: Iterable[Any] = ()) -> None:
        """Patch these models and no others: restore those that are not among them any more.

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
        """Say what was done, in one line, with figures where they were measured."""
        parts = [figures.line() for part, figures in self._figures.items() if figures.calls or part not in HALVES]
        return "Patch Conv: " + ("; ".join(parts) or "nothing that it was asked to patch has run")

    def _figures_of(self, part: str) -> Figures:
        """Find the figures of a part, which all models that have it share."""
        streamed = part in HALVES and self.settings.mode == "stream"
        words = f"VAE {part}" if part in HALVES else part
        return self._figures.setdefault(part, Figures(words, streamed))

    def _patch_vae(self, model: nn.Module, stand_ins: list[StandIn]) -> None:
        for half, method in _METHODS.items():
            if not any(half_of(name) == half for name, _ in convolutions(model, predicate=lambda *_: True)):
                continue
            if self.settings.mode == "patch":
                self._patch_convolutions(model, half, lambda name, _, half=half: half_of(name) == half, stand_ins)
            owner, _, name = part_of(model, half, method).rpartition(".")
            module = model.get_submodule(owner)
            if untouched(module, name) or name != "forward":
                stand_ins.append(Half(self, half, module, name, self._figures_of(half)))

    def _patch_unet(self, model: nn.Module, stand_ins: list[StandIn]) -> None:
        if any(convolutions(model, predicate=lambda *_: True)):  # a transformer may have none
            self._patch_convolutions(model, "U-Net", lambda *_: True, stand_ins)

    def _patch_estimates(self, holder: Any, stand_ins: list[StandIn]) -> None:
        for method in _METHODS.values():
            if callable(getattr(holder, f"memory_used_{method}", None)):
                stand_ins.append(MemoryUsed(self, holder, method))

    def _patch_convolutions(
        self, model: nn.Module, part: str, chosen: Callable[[str, Convolution], bool], stand_ins: list[StandIn]
    ) -> None:
        note = StripCount(self._figures_of(part))
        splits, threshold = int(self.settings.splits), round(self.settings.threshold * MILLION)
        convert_model(model, splits, threshold=threshold, predicate=chosen, on_strip=note)
        for _, module in convolutions(model, predicate=chosen):
            if hasattr(module, FORGE_CASTS) and untouched(module, "forward"):
                stand_ins.append(CastingForward(self, module, "forward"))
