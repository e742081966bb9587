"""Patch Conv: the convolutions of a VAE or of a model in strips. Same pixels, less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import nn

from ..comfyui_patchconv import Tiling, convolutions, planner
from ..comfyui_patchconv.tiled_conv import tiled_forward
from .host import MODEL_CATEGORY, VAE_CATEGORY, advanced, schema
from .progress import Progress, interruptible
from .vae_half import HALVES, half_of
from .vae_memory import StripMemory

_MILLION = 1_000_000


class PatchConvVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            node_id="PatchConv_VAE",
            display_name="Patch Conv (VAE)",
            category=VAE_CATEGORY,
            description=(
                "Runs the VAE's large convolutions in horizontal strips: the same image in less memory, without tiles "
                "and their seams. Put it between the VAE and VAE Decode or VAE Encode."
            ),
            search_aliases=["tiled vae", "vae out of memory", "low vram vae", "seamless vae decode", "patchconv"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE to patch. It is not changed: the output is a patched copy."),
                _splits_input(),
                _threshold_input(),
                advanced(
                    io.Combo,
                    "half",
                    options=[*HALVES, "both"],
                    default="both",
                    tooltip="Which half of the VAE runs in strips: the decoder (VAE Decode), the encoder (VAE Encode) "
                    "or both.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="A copy of the VAE that works in strips.")],
        )

    @classmethod
    def execute(cls, vae: Any, splits: int, threshold: float, half: str) -> io.NodeOutput:
        vae.throw_exception_if_invalid()
        patched = copy.copy(vae)
        patched.patcher = vae.patcher.clone()
        count = 0
        for name, method in zip(HALVES, ("decode", "encode")):
            if half in (name, "both"):
                count += _patch_half(patched, name, method, splits, round(threshold * _MILLION))
        if not count:
            raise ValueError(_nothing_found("VAE", type(vae.first_stage_model).__name__, half))
        return io.NodeOutput(patched)


class PatchConvModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            node_id="PatchConv_Model",
            display_name="Patch Conv (Model)",
            category=MODEL_CATEGORY,
            description=(
                "Runs the large convolutions of a diffusion model in horizontal strips: the same result in less "
                "memory. For U-Nets (SD 1.5, SDXL) at sizes where a convolution no longer fits. LoRAs and other "
                "patches go on working, before or after this node."
            ),
            search_aliases=["tiled unet", "unet out of memory", "low vram", "patchconv"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch. It is not changed: the output is a patched copy."),
                _splits_input(),
                _threshold_input(),
            ],
            outputs=[io.Model.Output(tooltip="A copy of the model that works in strips.")],
        )

    @classmethod
    def execute(cls, model: Any, splits: int, threshold: float) -> io.NodeOutput:
        patched = model.clone()
        tiling = Tiling(splits, threshold=round(threshold * _MILLION), on_strip=interruptible)
        if not _patch(patched, model.model, tiling, lambda name: True):
            raise ValueError(_nothing_found("model", type(model.model).__name__))
        return io.NodeOutput(patched)


def _splits_input() -> Any:
    return io.Int.Input(
        "splits",
        default=0,
        min=0,
        max=4096,
        tooltip="Strips per convolution. 0 chooses by the size of the image and the device; more strips need less "
        "memory and a little more time.",
    )


def _threshold_input() -> Any:
    return advanced(
        io.Float,
        "threshold",
        display_name="threshold (millions)",
        default=planner.DEFAULT_THRESHOLD / _MILLION,
        min=0.0,
        max=100_000.0,
        step=0.1,
        tooltip="Convolutions with a smaller input than this stay as they are. In millions of elements: channels x "
        "height x width of what goes into the convolution, times frames for video.",
    )


def _patch(patcher: Any, model: nn.Module, tiling: Tiling, chosen: Callable[[str], bool]) -> int:
    """Have the host put strips into the chosen convolutions of `model`; their number.

    Those with a kernel of 1 too: a backend copies their whole input and output as it does for larger kernels.
    """
    found = list(convolutions(model, predicate=lambda name, _: chosen(name)))
    for name, module in found:
        key = f"{name}._conv_forward"
        patcher.add_object_patch(key, tiled_forward(module, patcher.get_model_object(key), tiling))
    return len(found)


def _patch_half(vae: Any, half: str, method: str, splits: int, threshold: int) -> int:
    """Strips and estimate of one half of `vae`, a copy made for it; the number of convolutions."""
    progress = Progress()
    tiling = Tiling(splits, threshold=threshold, on_strip=progress)
    progress.convolutions = _patch(vae.patcher, vae.first_stage_model, tiling, lambda name: half_of(name) == half)
    if progress.convolutions:
        estimate = getattr(vae, f"memory_used_{method}")
        host = estimate.host if isinstance(estimate, StripMemory) else estimate
        setattr(vae, f"memory_used_{method}", StripMemory(vae, method, host, tiling, progress))
    return progress.convolutions


def _nothing_found(kind: str, name: str, half: str = "both") -> str:
    where, other = ("", "") if half == "both" else (f" in its {half}", " or choose another half")
    return (
        f"This {kind} ({name}) has no convolution{where}, so nothing can run in strips: "
        f"connect it without Patch Conv{other}."
    )
