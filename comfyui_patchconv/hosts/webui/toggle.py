"""Puts Patch Conv on models for the length of a run, and takes it off as if it had never been there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, Optional

from torch import nn

from ...conv.patch import convert_model, convolutions, restore_model
from ...conv.tiling import Convolution
from ..attributes import FORGE_CASTS
from ..figures import Figures, StripCount
from ..halves import HALVES, half_of, part_of
from .host import Host, no_latents
from .parameters import TITLE
from .settings import Settings
from .stand_ins import CastingForward, HalfStandIn, MemoryUsed, Preview, StandIn, Stoppable, tiling_of, untouched
from .stopping import Stops
from .upscalers import UntiledUpscale, Upscaler, functions_of

_METHODS = dict(zip(HALVES, ("decode", "encode")))


@dataclass
class _Followed:
    """Something that is patched: what stands in for its methods, and whether its convolutions run in strips."""

    model: Any
    stand_ins: list[StandIn] = field(default_factory=list)
    converted: bool = False


class Toggle:
    """Patches the models of one run as `settings` say, until `off`; `report` says what came of it.

    Another extension's stand-in for a decoder or encoder is left alone, and goes on working.

    host: shows how far a streamed decode or encode is, and is asked whether to stop one; None for neither. only_rescue:
    decoders and encoders run as if nothing was there, until memory runs out; of `settings` their budget counts.
    """

    def __init__(self, settings: Settings, host: Optional[Host] = None, only_rescue: bool = False) -> None:
        self.settings, self.host, self.only_rescue = settings, host, only_rescue
        self.stops = Stops(host.stop_asked if host is not None else lambda half: False)
        self._figures: dict[str, Figures] = {}
        self._upscalers: dict[str, Upscaler] = {}
        self._followed: list[_Followed] = []
        self._covered: list[StandIn] = []
        self._left: set[str] = set()

    @property
    def on(self) -> bool:
        """Whether anything is patched."""
        return bool(self._followed)

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it is anywhere: neither on a model, nor below another extension's stand-in."""
        return not self._followed and not self._covered

    @property
    def has_run(self) -> bool:
        """Whether a decoder, an encoder or an upscaler has run, if only until it was stopped."""
        return bool(self.stopped) or any(figures.calls for figures in self._figures.values())

    @property
    def stopped(self) -> set[str]:
        """Names the parts that the user has stopped."""
        return {part for part, figures in self._figures.items() if figures.state == "stopped"}

    def follow(
        self, vaes: Iterable[nn.Module], unets: Iterable[nn.Module], holders: Iterable[Any] = (),
        models: Iterable[Any] = (), upscaling: Iterable[ModuleType] = (),
    ) -> None:  # fmt: skip
        """Patch these models and no others: restore those that are not among them any more.

        holders: of Forge and reForge, what holds a VAE and its estimates of the memory that it takes.
        models: what the host has a latent decoded and a picture encoded by.
        upscaling: the host's modules that have the functions by which it upscales.
        """
        wanted: list[tuple[Any, Callable[[_Followed], None]]] = []
        if self.settings.vae:
            wanted += [(vae, self._patch_vae) for vae in vaes]
            wanted += [(holder, self._patch_estimates) for holder in holders if not self.only_rescue]
            wanted += [(model, self._patch_host) for model in models if self.host is not None]
        if self.settings.unet:
            wanted += [(unet, self._patch_unet) for unet in unets]
        if self.settings.upscalers:
            wanted += [(module, self._patch_upscaling) for module in upscaling]
        if wanted and self.settings.vae and self.host is not None:
            wanted.append((self.host.previews, self._patch_previews))
        self._note_covered()
        for followed in list(self._followed):
            if not any(followed.model is model for model, _ in wanted):
                self._followed.remove(followed)
                if followed.converted:
                    restore_model(followed.model)
                self._covered += followed.stand_ins
        self._covered = [stand_in for stand_in in self._covered if not stand_in.leave()]
        for model, patch in wanted:
            if not any(followed.model is model for followed in self._followed):
                self._followed.append(_Followed(model))
                patch(self._followed[-1])

    def off(self) -> None:
        """Put everything back. A stand-in that somebody else holds does nothing of its own then.

        Another extension may cover one of ours and later put back what it found: once more takes that away too.
        """
        self.follow([], [])

    def report(self) -> str:
        """Say what was done, in one line, with figures where they were measured; empty where nobody was rescued."""
        if self.only_rescue:
            lines = [figures.line() for figures in self._figures.values() if figures.streamed]
            return f"{TITLE}: {'; '.join(lines)}" if lines else ""
        parts = [figures.line() for part, figures in self._figures.items() if figures.calls or part not in HALVES]
        parts += [self._left_line(half) for half in HALVES if half in self._left and not self._figures_of(half).calls]
        if self.stopped.intersection(HALVES):
            parts.append("of what was stopped there is only a rough picture")
        if self.stopped.intersection(self._upscalers):
            parts.append("the picture whose upscaling was stopped went on as it was")
        return f"{TITLE}: " + ("; ".join(parts) or "nothing that it was asked to patch has run")

    def _left_line(self, half: str) -> str:
        strips = self._figures_of(half).strips
        how = f", its convolutions in up to {strips} strips" if strips > 1 else ""
        return f"VAE {half} left to another extension{how}"

    def _note_covered(self) -> None:
        """Note the halves for which something of another extension stands in by now."""
        for followed in self._followed:
            halves = [stand_in for stand_in in followed.stand_ins if isinstance(stand_in, HalfStandIn)]
            self._left.update(stand_in.half for stand_in in halves if stand_in.covered)

    def _figures_of(self, part: str) -> Figures:
        """Find the figures of a part, which all models that have it share."""
        streamed = part in HALVES and self.settings.mode == "stream"
        words = f"VAE {part}" if part in HALVES else part
        return self._figures.setdefault(part, Figures(words, streamed))

    def _patch_vae(self, followed: _Followed) -> None:
        model = followed.model
        for half, method in _METHODS.items():
            if not any(half_of(name) == half for name, _ in convolutions(model, predicate=lambda *_: True)):
                continue
            of_half = partial(_is_of, half)
            if self.settings.mode == "patch":
                self._patch_convolutions(followed, half, of_half)
            elif self.settings.mode == "auto" and not self.only_rescue:  # that runs no convolution in strips
                self._have_forge_cast(followed, of_half)
            owner, _, name = part_of(model, half, method).rpartition(".")
            module = model.get_submodule(owner)
            if untouched(module, name) or name != "forward":
                figures = self._figures_of(half)
                followed.stand_ins.append(HalfStandIn(self, half, module, name, figures, _Strips(figures, self.stops)))
            else:
                self._left.add(half)

    def _patch_unet(self, followed: _Followed) -> None:
        if any(convolutions(followed.model, predicate=lambda *_: True)):  # a transformer may have none
            self._patch_convolutions(followed, "U-Net", lambda *_: True)

    def _patch_upscaling(self, followed: _Followed) -> None:
        for name in functions_of(followed.model):
            followed.stand_ins.append(UntiledUpscale(self, followed.model, name, self._upscaler_of))

    def _upscaler_of(self, architecture: str) -> Upscaler:
        part = f"upscaler {architecture}"
        if part not in self._upscalers:
            figures = self._figures[part] = Figures(part, streamed=True, otherwise="whole without Patch Conv")
            self._upscalers[part] = Upscaler(self, figures)
        return self._upscalers[part]

    def _patch_estimates(self, followed: _Followed) -> None:
        for method in _METHODS.values():
            if callable(getattr(followed.model, f"memory_used_{method}", None)):
                followed.stand_ins.append(MemoryUsed(self, followed.model, method))

    def _patch_host(self, followed: _Followed) -> None:
        """Catch what stops a decode or encode where the host asks for one."""
        assert self.host is not None
        model = followed.model
        instead = {"decoder": self.host.rough_picture, "encoder": lambda pixels: no_latents(model, pixels)}
        for half, method in _METHODS.items():
            if callable(getattr(model, f"{method}_first_stage", None)):
                name, figures = f"{method}_first_stage", self._figures_of(half)
                followed.stand_ins.append(Stoppable(self, half, model, name, figures, instead[half]))

    def _patch_previews(self, followed: _Followed) -> None:
        if callable(getattr(followed.model, "single_sample_to_image", None)):
            followed.stand_ins.append(Preview(self, followed.model, "single_sample_to_image"))

    def _patch_convolutions(self, followed: _Followed, part: str, chosen: Callable[[str, Convolution], bool]) -> None:
        model, note = followed.model, _Strips(self._figures_of(part), self.stops)
        splits, threshold = tiling_of(self.settings)
        convert_model(model, splits, threshold=threshold, predicate=chosen, on_strip=note)
        followed.converted = True
        self._have_forge_cast(followed, chosen)

    def _have_forge_cast(self, followed: _Followed, chosen: Callable[[str, Convolution], bool]) -> None:
        for _, module in convolutions(followed.model, predicate=chosen):
            if hasattr(module, FORGE_CASTS) and untouched(module, "forward"):
                followed.stand_ins.append(CastingForward(self, module, "forward"))


def _is_of(half: str, name: str, _: Convolution) -> bool:
    return half_of(name) == half


class _Strips(StripCount):
    """Counts strips, except those of live previews, and stops after one where that is asked; a `Tiling.on_strip`."""

    def __init__(self, figures: Figures, stops: Stops) -> None:
        super().__init__(figures)
        self._stops = stops

    def __call__(self, module: nn.Module, rows_done: int, rows: int) -> None:
        self._stops.check()
        if not self._stops.previewing:
            super().__call__(module, rows_done, rows)
