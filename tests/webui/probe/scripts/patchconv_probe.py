"""An extension for the tests: tells what is on the model, during a run and after it, and makes runs fail."""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from modules import processing, script_callbacks, scripts, shared, upscaler  # pyright: ignore[reportMissingImports]

_during: dict[str, str] = {}
_estimates: dict[str, float] = {}
_decodes: dict[str, Any] = {"counted": 0, "begun": False}
"""How many the last run's report has, and whether one has begun since that was to be watched."""

_upscaled: dict[str, Any] = {}
"""The picture that an upscaler made last."""


def _methods() -> dict[str, str]:
    """Everything callable that is set on a module of the model itself, or in the host's modules that upscale: its
    place, and which object it is."""
    return {
        f"{name}.{key}": f"{type(value).__name__} {id(value)}"
        for name, module in _objects()
        for key, value in module.__dict__.items()
        if callable(value)
    }


def _objects() -> Iterator[tuple[str, Any]]:
    """The model's modules by name; in Forge and reForge those that run are in the hands of `forge_objects`."""
    for name in sorted(sys.modules):
        if re.fullmatch(r"modules\.(upscaler_utils|postprocessing|\w+_model)", name):
            yield name.removeprefix("modules."), sys.modules[name]
    forge = getattr(shared.sd_model, "forge_objects", None)
    if forge is None:
        yield from shared.sd_model.named_modules()
        return
    yield "vae", forge.vae
    yield from forge.vae.first_stage_model.named_modules(prefix="first_stage_model")
    yield from forge.unet.model.named_modules(prefix="model")


def _estimate() -> dict[str, float]:
    """What Forge and reForge reckon that a decode of 512² takes, in bytes, during the last run and now."""
    forge = getattr(shared.sd_model, "forge_objects", None)
    if forge is not None:
        _estimates["now"] = forge.vae.memory_used_decode((1, 4, 64, 64), torch.float32)
    return _estimates


def _fail_once() -> bool:
    decode = processing.decode_latent_batch

    def failing(*args: Any, **kwargs: Any) -> Any:
        processing.decode_latent_batch = decode
        raise RuntimeError("the probe was asked to fail")

    processing.decode_latent_batch = failing
    return True


def _watch_decode() -> bool:
    """Note when the next decode has begun, where the host is to be asked to stop it."""
    forge = getattr(shared.sd_model, "forge_objects", None)
    vae = shared.sd_model.first_stage_model if forge is None else forge.vae.first_stage_model
    decode = vae.decode

    def noting(*args: Any, **kwargs: Any) -> Any:
        del vae.decode
        _decodes["begun"] = True
        return decode(*args, **kwargs)

    vae.decode = noting
    _decodes["begun"] = False
    return True


def _note_upscaled() -> None:
    """Note what upscalers make, which is scaled, sampled or encoded anew before a run gives it back."""
    upscale = upscaler.Upscaler.upscale

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        _upscaled["picture"] = picture = upscale(self, *args, **kwargs)
        return picture

    upscaler.Upscaler.upscale = noting


def _upscaled_png() -> dict[str, str]:
    buffer = io.BytesIO()
    _upscaled["picture"].save(buffer, "PNG")
    return {"png": base64.b64encode(buffer.getvalue()).decode()}


def _forget() -> bool:
    """Have Extras upscale anew what it has upscaled before."""
    scripts.scripts_postproc.image_changed()
    return True


def _seed() -> bool:
    """Before a run: encoding draws from torch's own generator, which a run leaves as it may."""
    torch.manual_seed(1)
    return True


def _options(names: str) -> dict[str, Any]:
    """What is set under Settings, of these names with commas between."""
    return {name: getattr(shared.opts, name) for name in names.split(",")}


def _settings() -> list[str]:
    """The names of all that is under Settings."""
    return [*shared.opts.data_labels]


def _axes() -> list[str]:
    (grid,) = (data.module for data in scripts.scripts_data if data.script_class.__module__ == "xyz_grid.py")
    return [axis.label for axis in grid.axis_options if not getattr(axis, "is_img2img", False)]


class ProbeScript(scripts.Script):
    def title(self) -> str:
        return "Patch Conv probe"

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        _during.clear()
        _during.update(_methods())
        _estimates["during"] = _estimate().get("now", 0.0)
        toggle = getattr(p, "patch_conv", None)
        figures = {} if toggle is None else toggle._figures
        _decodes["counted"] = figures["decoder"].calls if "decoder" in figures else 0


def _routes(demo: Any, app: Any) -> None:
    app.get("/probe/now")(_methods)
    app.get("/probe/during")(lambda: _during)
    app.get("/probe/estimate")(_estimate)
    app.get("/probe/fail")(_fail_once)
    app.get("/probe/seed")(_seed)
    app.get("/probe/axes")(_axes)
    app.get("/probe/options")(_options)
    app.get("/probe/settings")(_settings)
    app.get("/probe/decodes")(lambda: _decodes)
    app.get("/probe/watch")(_watch_decode)
    app.get("/probe/upscaled")(_upscaled_png)
    app.get("/probe/forget")(_forget)


_note_upscaled()
script_callbacks.on_app_started(_routes)
