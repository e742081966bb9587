"""Patch Conv in the WebUI: an accordion under txt2img and img2img. While it is off nothing of it is on the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Optional

import gradio as gr  # pyright: ignore[reportMissingImports]
from modules import script_callbacks, scripts, sd_models, shared  # pyright: ignore[reportMissingImports]
from modules.ui_components import InputAccordion  # pyright: ignore[reportMissingImports]

from comfyui_patchconv.hosts.modes import MODES
from comfyui_patchconv.hosts.webui.parameters import (
    DEFAULTS,
    NAMES,
    TITLE,
    from_infotext,
    infotext_names,
    settings_of,
    to_infotext,
)
from comfyui_patchconv.hosts.webui.toggle import Toggle

_LABELS = {
    "enabled": TITLE,
    "mode": "Mode",
    "vae": "VAE",
    "unet": "U-Net",
    "splits": "Splits",
    "threshold": "Threshold (millions)",
    "budget": "Memory budget (GiB)",
}
_LIMITS: dict[str, dict[str, float]] = {
    "splits": {"minimum": 0, "maximum": 64, "step": 1},
    "threshold": {"minimum": 0, "maximum": 256, "step": 0.5},
    "budget": {"minimum": 0, "maximum": 64, "step": 0.1},
}
_INFO = {
    "mode": "patch: each large convolution of the VAE in strips. stream: the whole VAE in strips, far less memory.",
    "splits": "For patch and the U-Net: strips per convolution, 0 for automatic.",
    "threshold": "For patch and the U-Net: convolutions with fewer input elements stay whole.",
    "budget": "For stream, 0 for what is free. What does not fit is kept in the computer's memory, on a CPU in a file.",
}


class PatchConvScript(scripts.Script):
    running: ClassVar[Optional[Toggle]] = None
    """What is patched now: the WebUI has one run at a time, on one model."""

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        controls: dict[str, Any] = {}
        with InputAccordion(_default("enabled"), label=TITLE, elem_id=self.elem_id("enabled")) as controls["enabled"]:
            controls["mode"] = self._control(gr.Radio, "mode", choices=[*MODES])
            with gr.Row():
                for name in ("vae", "unet"):
                    controls[name] = self._control(gr.Checkbox, name)
            with gr.Row():
                for name in ("splits", "threshold"):
                    controls[name] = self._control(gr.Slider, name, **_LIMITS[name])
            controls["budget"] = self._control(gr.Slider, "budget", **_LIMITS["budget"])
        for name, control in controls.items():
            # What was chosen under Settings rules; otherwise the WebUI remembers this control like any other.
            control.do_not_save_to_config = _default(name) != DEFAULTS[name]
        self.infotext_fields = [(controls[name], _from_infotext(name)) for name in NAMES]
        self.paste_field_names = infotext_names()
        return [controls[name] for name in NAMES]

    def _control(self, kind: Callable[..., Any], name: str, **options: Any) -> Any:
        return kind(
            value=_default(name), label=_LABELS[name], info=_INFO.get(name), elem_id=self.elem_id(name), **options
        )

    def before_process(self, p: Any, *args: Any) -> None:
        stop()  # what a run that ended in an error may have left

    def process(self, p: Any, *args: Any) -> None:
        p.patch_conv = None
        for name in infotext_names():  # a plot's runs share what is written
            p.extra_generation_params.pop(name, None)
        try:
            defaults = {name: _default(name) for name in NAMES}
            settings = settings_of(args, getattr(p, "patch_conv_axes", {}), defaults)
        except ValueError as error:
            p.comment(f"{TITLE} is off: {error}")
            print(f"{TITLE} is off: {error}")
            return
        if settings is None:
            return
        p.patch_conv = Toggle(settings, tell=_tell)
        p.extra_generation_params.update(to_infotext(settings))
        _stop_at_close(p, p.patch_conv)
        _follow(p)

    def before_process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        _follow(p)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        _follow(p)

    def before_hr(self, p: Any, *args: Any) -> None:
        _follow(p)

    def post_sample(self, p: Any, samples: Any, *args: Any) -> None:
        _follow(p)  # a refiner may have brought a VAE of its own

    def postprocess(self, p: Any, processed: Any, *args: Any) -> None:
        toggle: Optional[Toggle] = getattr(p, "patch_conv", None)
        if toggle is None:
            return
        stop()
        report = toggle.report()
        print(report)
        processed.comments += f"{report}\n"


def stop() -> None:
    """Take everything off the models."""
    toggle, PatchConvScript.running = PatchConvScript.running, None
    if toggle is not None:
        toggle.off()
        shared.state.textinfo = None


def _follow(p: Any) -> None:
    """Patch the models of the moment as the run `p` asks; another run may have been inside it."""
    toggle: Optional[Toggle] = getattr(p, "patch_conv", None)
    if toggle is None:
        return
    if PatchConvScript.running is not toggle:
        stop()
        PatchConvScript.running = toggle
    # Those that are kept loaded too: a second pass may go on with one of them.
    _patch(toggle, [shared.sd_model, *getattr(sd_models.model_data, "loaded_sd_models", [])])


def _patch(toggle: Toggle, models: Sequence[Any]) -> None:
    parts = [_parts(model) for model in models if model is not None]
    holders = [holder for _, _, holder in parts if holder is not None]
    toggle.follow([vae for vae, _, _ in parts], [unet for _, unet, _ in parts], holders)


def _parts(model: Any) -> tuple[Any, Any, Any]:
    """Find VAE and U-Net of a model, and what holds the VAE: Forge and reForge run what `forge_objects` has."""
    forge = getattr(model, "forge_objects", None)
    if forge is not None:
        return forge.vae.first_stage_model, forge.unet.model.diffusion_model, forge.vae
    return model.first_stage_model, model.model.diffusion_model, None


def _loaded(model: Any) -> None:
    """Patch a checkpoint or a VAE that was loaded, which may happen in the middle of a run."""
    if PatchConvScript.running is not None:
        _patch(PatchConvScript.running, [model, *getattr(sd_models.model_data, "loaded_sd_models", [])])


def _stop_at_close(p: Any, toggle: Toggle) -> None:
    """Take everything off when the host closes the run, which it does after an error too."""
    close = p.close

    def stop_and_close() -> None:
        stop()
        toggle.off()
        close()

    p.close = stop_and_close


def _tell(text: str) -> None:
    shared.state.textinfo = text


def _from_infotext(name: str) -> Callable[[dict[str, Any]], Any]:
    """Tell the WebUI what a control shows after parameters were pasted."""

    def value(parameters: dict[str, Any]) -> Any:
        told = from_infotext(name, parameters)
        return gr.update() if told is None else told

    return value


def _default(name: str) -> Any:
    return getattr(shared.opts, f"patch_conv_{name}", DEFAULTS[name])


def _add_settings() -> None:
    section = ("patch_conv", TITLE)
    kinds = {"mode": (gr.Radio, {"choices": [*MODES]}), **{name: (gr.Slider, _LIMITS[name]) for name in _LIMITS}}
    for name in NAMES:
        kind, options = kinds.get(name, (None, None))
        label = "On from the start" if name == "enabled" else _LABELS[name]
        option = shared.OptionInfo(DEFAULTS[name], label, kind, options, section=section).needs_reload_ui()
        shared.opts.add_option(f"patch_conv_{name}", option)


def _add_axes() -> None:
    """Add mode and splits to the X/Y/Z plot."""
    for data in scripts.scripts_data:
        if data.script_class.__module__ != "xyz_grid.py":
            continue
        grid = data.module
        grid.axis_options += [
            grid.AxisOption(f"[{TITLE}] Mode", str, _apply_mode, choices=lambda: ["off", *MODES]),
            grid.AxisOption(f"[{TITLE}] Splits", int, _apply_splits),
        ]


def _apply_mode(p: Any, value: str, values: Any) -> None:
    off = value == "off"
    _set_axes(p, enabled=not off, **({} if off else {"mode": value}))


def _apply_splits(p: Any, value: int, values: Any) -> None:
    _set_axes(p, splits=value)


def _set_axes(p: Any, **values: Any) -> None:
    p.patch_conv_axes = {**getattr(p, "patch_conv_axes", {}), **values}


script_callbacks.on_ui_settings(_add_settings)
script_callbacks.on_before_ui(_add_axes)
script_callbacks.on_model_loaded(_loaded)
script_callbacks.on_script_unloaded(stop)
