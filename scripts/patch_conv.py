"""Patch Conv in the WebUI: an accordion under txt2img and img2img. While it is off nothing of it is on the model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar, Optional

import gradio as gr  # pyright: ignore[reportMissingImports]
from modules import (  # pyright: ignore[reportMissingImports]
    devices,
    paths,
    postprocessing,
    script_callbacks,
    script_loading,
    scripts,
    sd_models,
    sd_samplers_common,
    shared,
)
from modules.ui_components import InputAccordion  # pyright: ignore[reportMissingImports]

from comfyui_patchconv.hosts.devices.spread import ALL, CHOICES, ONE, end_all, others_than
from comfyui_patchconv.hosts.modes import MODES
from comfyui_patchconv.hosts.webui.closing import before_close, leave_copied
from comfyui_patchconv.hosts.webui.extras import Extras
from comfyui_patchconv.hosts.webui.flags import read_flags
from comfyui_patchconv.hosts.webui.host import Host
from comfyui_patchconv.hosts.webui.parameters import (
    DEFAULTS,
    MACHINES,
    NAMES,
    TITLE,
    from_infotext,
    heeded,
    infotext_names,
    settings_of,
    to_infotext,
)
from comfyui_patchconv.hosts.webui.settings import Settings
from comfyui_patchconv.hosts.webui.several import Replaced, as_imported
from comfyui_patchconv.hosts.webui.toggle import Toggle
from comfyui_patchconv.hosts.webui.upscalers import having_them

_LABELS = {
    "enabled": TITLE,
    "mode": "Mode",
    "vae": "VAE",
    "unet": "U-Net",
    "splits": "Splits",
    "threshold": "Threshold (millions of elements)",
    "budget": "Memory budget (GiB)",
    "upscalers": "Upscalers",
}
_LIMITS: dict[str, dict[str, float]] = {
    "splits": {"minimum": 0, "maximum": 64, "step": 1},
    "threshold": {"minimum": 0, "maximum": 256, "step": 0.5},
    "budget": {"minimum": 0, "maximum": 64, "step": 0.1},
}
_PARTS = ("vae", "unet", "upscalers")
_INFO = {
    "enabled": "Ticked when the page is loaded, under txt2img and img2img.",
    "mode": "auto: as without where that fits, patch where that is enough, stream where it is not, by what is free at "
    "each decode. patch: each large convolution of the VAE in strips. stream: the whole VAE in strips, by far the "
    "least memory.",
    "vae": "Decodes and encodes in strips.",
    "unet": "Its convolutions in strips, as in patch: for sizes at which one does not fit.",
    "splits": "For auto, patch and the U-Net: strips per convolution, 0 for automatic.",
    "threshold": "For auto, patch and the U-Net: convolutions with fewer input elements stay whole.",
    "budget": "For auto, stream and upscalers, 0 for what is free. What does not fit is kept in the computer's memory, "
    "on a CPU in a file.",
    "upscalers": "ESRGAN and its kin without tiles, streamed in any mode: in hires fix, img2img and SD upscale.",
}
_RESCUE = "patch_conv_instead_of_tiles"
_EXTRAS = "patch_conv_extras"
_DEVICES = "patch_conv_devices"
_NOTHING = "Neither VAE nor U-Net nor Upscalers is ticked: nothing will be patched."
_IGNORED = "Not used with what is chosen above."
_REPORT = f"{TITLE} report"
"""The name in an answer's `info`, among `extra_generation_params`, which pictures do not have."""


class PatchConvScript(scripts.Script):
    running: ClassVar[Optional[Toggle]] = None
    """What is patched now: the WebUI has one run at a time, on one model."""

    ahead: ClassVar[Optional[Toggle]] = None
    """What was patched before the first picture of a run, for scripts that upscale then, and was not reported yet."""

    cells: ClassVar[Optional[list[str]]] = None
    """What was said of the cells of an X/Y/Z plot that is being made."""

    extras: ClassVar[Optional[Extras]] = None
    """What streams the upscalers under Extras, while that is set."""

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        controls: dict[str, Any] = {}
        with InputAccordion(_default("enabled"), label=TITLE, elem_id=self.elem_id("enabled")) as controls["enabled"]:
            controls["mode"] = self._control(gr.Radio, "mode", choices=[*MODES])
            with gr.Row():
                for name in _PARTS:
                    controls[name] = self._control(gr.Checkbox, name)
            nothing = gr.Markdown(_NOTHING, visible=False, elem_id=self.elem_id("nothing"))
            with gr.Row():
                for name in ("splits", "threshold"):
                    controls[name] = self._control(gr.Slider, name, **_LIMITS[name])
            controls["budget"] = self._control(gr.Slider, "budget", **_LIMITS["budget"])
        # The WebUI drops arguments for which there is no control: this one is for those that are too many.
        surplus = gr.Textbox(value="", visible=False, label="", elem_id=self.elem_id("surplus"))
        surplus.do_not_save_to_config = True
        for name, control in controls.items():
            _remember(control, _default(name) == DEFAULTS[name])
        _show_what_counts(controls, nothing)
        self.infotext_fields = [(controls[name], _from_infotext(name)) for name in NAMES]
        self.paste_field_names = infotext_names()
        return [*(controls[name] for name in NAMES), surplus]

    def _control(self, kind: Callable[..., Any], name: str, **options: Any) -> Any:
        info = None if kind is gr.Checkbox else _INFO[name]  # it would stand above the box
        return kind(value=_default(name), label=_LABELS[name], info=info, elem_id=self.elem_id(name), **options)

    def setup(self, p: Any, *args: Any) -> None:
        """Stream upscalers before the first picture too: SD upscale runs them then."""
        PatchConvScript.ahead = None
        try:
            settings = _settings(args)
        except ValueError:  # `process` says so
            return
        if settings is None or not settings.upscalers:
            return
        stop()
        PatchConvScript.ahead = PatchConvScript.running = toggle = _upscaling(settings)
        before_close(p, toggle, stop)

    def before_process(self, p: Any, *args: Any) -> None:
        stop()  # what a run that ended in an error may have left
        leave_copied(p)
        ahead, PatchConvScript.ahead = PatchConvScript.ahead, None
        if ahead is not None and ahead.has_run:
            p.patch_conv_ahead = True
            print(ahead.report())
            p.comment(ahead.report())

    def process(self, p: Any, *args: Any) -> None:
        p.patch_conv, p.patch_conv_cell = None, shared.state.job
        p.patch_conv_off = ""
        for name in infotext_names():  # a plot's runs share what is written
            p.extra_generation_params.pop(name, None)
        try:
            settings = _settings(args, getattr(p, "patch_conv_axes", {}))
            rescue = settings is None and getattr(shared.opts, _RESCUE, False)
            if settings is None and not rescue:
                return
            p.patch_conv = Toggle(settings or _checked(Settings(devices=_devices())), _host(), only_rescue=rescue)
        except ValueError as error:
            p.patch_conv_off = f"{TITLE} is off: {error}"
            return
        if settings is not None:
            p.extra_generation_params.update(to_infotext(settings))
        before_close(p, p.patch_conv, stop)
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
        if toggle is not None:
            stop()
        report = toggle.report() if toggle is not None else getattr(p, "patch_conv_off", "")
        told_ahead = toggle is not None and not toggle.settings.unet and not toggle.has_run
        if not report or (told_ahead and getattr(p, "patch_conv_ahead", False)):
            return
        print(report)
        if PatchConvScript.cells is None:
            _add_report(processed, report)
        else:
            PatchConvScript.cells.append(f"{p.patch_conv_cell}: {report}")


def _add_report(processed: Any, report: str) -> None:
    """Show a report under the pictures and in the API's answer, and leave it out of the pictures' parameters."""
    processed.comments += f"{report}\n"
    processed.extra_generation_params = {**processed.extra_generation_params, _REPORT: report}


def _settings(args: Sequence[Any], changes: Optional[dict[str, Any]] = None) -> Optional[Settings]:
    """Read the settings that arguments of the script, and `changes`, ask for. The rest: see `settings_of`."""
    defaults = {name: _default(name) for name in NAMES}
    settings = settings_of(args, changes or {}, {**defaults, **dict.fromkeys(MACHINES, _devices())})
    return settings and _checked(settings)


def _checked(settings: Settings) -> Settings:
    """Raise ValueError, in a sentence, now rather than in a decode, where it cannot be known what devices there are."""
    if settings.devices != ONE:
        others_than(devices.device)
    return settings


def _devices() -> str:
    """What is set for this machine; one where there is no other, which is no setting then."""
    return getattr(shared.opts, _DEVICES, ONE) if _has_several() else ONE


def _choices() -> list[str]:
    """What there is to choose: this device alone, where there is no other."""
    try:
        others = len(others_than(devices.device))
    except ValueError:  # a run on several says so
        return [*CHOICES]
    return [ONE, ALL, *map(str, range(2, 2 + others))] if others else [ONE]


def _has_several() -> bool:
    return len(_choices()) > 1


def _host() -> Host:
    # SDXL's modules lie where that finds them, and import some that are not there.
    calls = ["modules.paths:mute_sdxl_imports"] if hasattr(paths, "mute_sdxl_imports") else []
    if "ldm_patched.modules.args_parser" in sys.modules:
        calls.append(f"{read_flags.__module__}:{read_flags.__name__}")
    return Host(shared.state, _cheap, sd_samplers_common, calls=calls, imported=_as_imported)


def _as_imported() -> AbstractContextManager[None]:
    """Make a context in which a VAE runs what its modules have, as it does in a worker, not what Automatic1111 has put
    in its place; Forge and reForge put nothing there."""
    found = [sys.modules.get(f"{name}.modules.diffusionmodules.model") for name in ("ldm", "sgm")]
    hijack, attention = (sys.modules.get(f"modules.sd_hijack{name}") for name in ("", "_optimizations"))
    originals = (
        getattr(hijack, "diffusionmodules_model_AttnBlock_forward", None),
        getattr(attention, "sgm_diffusionmodules_model_AttnBlock_forward", None),
    )
    nonlinearity = getattr(hijack, "diffusionmodules_model_nonlinearity", None)
    places = [Replaced(module, "nonlinearity", nonlinearity) for module in found if module and nonlinearity]
    places += [Replaced(one.AttnBlock, "forward", own) for one, own in zip(found, originals) if one and own]
    return as_imported(places)


def stop() -> None:
    """Take everything off the models."""
    toggle, PatchConvScript.running = PatchConvScript.running, None
    if toggle is not None:
        toggle.off()


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
    models = [model for model in models if model is not None]
    parts = [_parts(model) for model in models]
    holders = [holder for _, _, holder in parts if holder is not None]
    upscaling = _modules_that_upscale() if toggle.settings.upscalers else []
    toggle.follow([vae for vae, _, _ in parts], [unet for _, unet, _ in parts], holders, models, upscaling)


def _modules_that_upscale() -> list[Any]:
    return having_them([*sys.modules.values(), *script_loading.loaded_scripts.values()])


def _upscaling(settings: Settings) -> Toggle:
    """Make what patches upscalers, and nothing else of what is set, and have it do so."""
    toggle = Toggle(replace(settings, vae=False, unet=False, upscalers=True), _host())
    toggle.follow([], [], upscaling=_modules_that_upscale())
    return toggle


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


def _cheap(latents: Any) -> Any:
    """Make a picture of latents without a model, as the WebUI's preview "Approx cheap" does."""
    return sd_samplers_common.samples_to_images_tensor(
        latents, sd_samplers_common.approximation_indexes["Approx cheap"]
    )


def _remember(control: Any, remembered: bool) -> None:
    """Have the WebUI remember a control like any other; or not, for what was chosen under Settings to rule."""
    for component in (control, getattr(control, "accordion", None)):
        if component is not None:
            component.do_not_save_to_config = not remembered


def _show_what_counts(controls: dict[str, Any], nothing: Any) -> None:
    """Have numbers that do not count look inactive, and say where nothing will be patched."""
    numbers = [*_LIMITS]

    def updates(mode: str, *parts: bool) -> list[Any]:
        counting = heeded(mode, *parts)
        shown = [
            gr.update(interactive=name in counting, info=_INFO[name] if name in counting else _IGNORED)
            for name in numbers
        ]
        return [*shown, gr.update(visible=not any(parts))]

    inputs = [controls[name] for name in ("mode", *_PARTS)]
    outputs = [*(controls[name] for name in numbers), nothing]
    for name in ("enabled", "mode", *_PARTS):
        controls[name].change(updates, inputs=inputs, outputs=outputs, show_progress=False, queue=False)


def _from_infotext(name: str) -> Callable[[dict[str, Any]], Any]:
    """Tell the WebUI what a control shows after parameters were pasted."""

    def value(parameters: dict[str, Any]) -> Any:
        told = from_infotext(name, parameters, _comment)
        return gr.update() if told is None else told

    return value


def _comment(text: str) -> None:
    print(text)
    gr.Warning(text)


def _default(name: str) -> Any:
    return getattr(shared.opts, f"patch_conv_{name}", DEFAULTS[name])


def _add_settings() -> None:
    section = ("patch_conv", TITLE)
    kinds = {"mode": (gr.Radio, {"choices": [*MODES]}), **{name: (gr.Slider, _LIMITS[name]) for name in _LIMITS}}
    for name in NAMES:
        kind, options = kinds.get(name, (None, None))
        label = "on from the start" if name == "enabled" else _LABELS[name]
        option = shared.OptionInfo(DEFAULTS[name], f"{TITLE}: {label}", kind, options, section=section)
        shared.opts.add_option(f"patch_conv_{name}", option.info(_INFO[name]).needs_reload_ui())
    rescue = shared.OptionInfo(
        False, f"{TITLE}: stream instead of tiling when a VAE runs out of memory", section=section
    )
    shared.opts.add_option(
        _RESCUE,
        rescue.info(
            "Also where the accordion is not ticked: a decode or encode that fails for "
            "want of memory begins anew, streamed, instead of in tiles or not at all."
        ),
    )
    extras = shared.OptionInfo(False, f"{TITLE}: upscale without tiles, streamed, under Extras", section=section)
    shared.opts.add_option(
        _EXTRAS,
        extras.info("ESRGAN and its kin, within the memory budget above; elsewhere the accordion's Upscalers say so."),
    )
    shared.opts.onchange(_EXTRAS, _set_extras, call=False)
    _follow_extras()
    if _has_several():
        chosen = shared.OptionInfo(ONE, f"{TITLE}: devices", gr.Radio, {"choices": _choices()}, section=section)
        chosen.info(
            "Those that what is streamed is computed on, each a band of its rows, in memory of its own; the same "
            "picture. one: the WebUI's. all: every one of its kind. A number: so many of them. The others belong to "
            "worker processes, which stay for the next decode."
        )
        shared.opts.add_option(_DEVICES, chosen)


def _set_extras() -> None:
    _follow_extras()
    _forget_upscaled()


def _follow_extras() -> None:
    """Stream upscalers under Extras if that is set, and only then."""
    leave_extras()
    if getattr(shared.opts, _EXTRAS, False):
        PatchConvScript.extras = Extras(postprocessing, "run_postprocessing", _begin_extras, _end_extras)


def leave_extras() -> None:
    """Put back what runs Extras."""
    extras, PatchConvScript.extras = PatchConvScript.extras, None
    if extras is not None:
        extras.leave()


def _begin_extras() -> Optional[Toggle]:
    try:
        settings = _checked(Settings(vae=False, upscalers=True, budget=_default("budget"), devices=_devices()))
    except ValueError as error:
        print(f"{TITLE} is off: {error}")
        return None
    return _upscaling(settings)


def _end_extras(toggle: Toggle) -> None:
    print(toggle.report())
    if toggle.stopped:
        _forget_upscaled()


def _forget_upscaled() -> None:
    """Have Extras, which keeps the last pictures that were upscaled, upscale them anew when they come again."""
    scripts.scripts_postproc.image_changed()


def _extend_plots() -> None:
    """Add mode and splits to the X/Y/Z plot, and have it say what came of each cell."""
    for data in scripts.scripts_data:
        if data.script_class.__module__ != "xyz_grid.py":
            continue
        grid = data.module
        grid.axis_options += [
            grid.AxisOption(f"[{TITLE}] Mode", str, _apply_mode, choices=lambda: ["off", *MODES]),
            grid.AxisOption(f"[{TITLE}] Splits", int, _apply_splits),
        ]
        grid.draw_xyz_grid = _with_reports(grid.draw_xyz_grid)


def _with_reports(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Draw a plot, which shows of the first cell what is to be read under it, with the reports of all cells."""

    def drawn(*args: Any, **kwargs: Any) -> Any:
        PatchConvScript.cells = cells = []
        try:
            processed = draw(*args, **kwargs)
        finally:
            PatchConvScript.cells = None
        if cells:
            _add_report(processed, "\n".join(cells))
        return processed

    return drawn


def _apply_mode(p: Any, value: str, values: Any) -> None:
    off = value == "off"
    _set_axes(p, enabled=not off, **({} if off else {"mode": value}))


def _apply_splits(p: Any, value: int, values: Any) -> None:
    _set_axes(p, splits=value)


def _set_axes(p: Any, **values: Any) -> None:
    p.patch_conv_axes = {**getattr(p, "patch_conv_axes", {}), **values}


script_callbacks.on_ui_settings(_add_settings)
script_callbacks.on_before_ui(_extend_plots)
script_callbacks.on_model_loaded(_loaded)
script_callbacks.on_script_unloaded(stop)
script_callbacks.on_script_unloaded(leave_extras)
script_callbacks.on_script_unloaded(end_all)
