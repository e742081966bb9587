"""Patch Conv: runs the convolutions of a VAE or of a model in strips. Same pixels, less memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

from ..comfyui_patchconv import Tiling
from ..comfyui_patchconv.conv.patch import PADDINGS
from ..comfyui_patchconv.conv.strip_sizes import DEFAULT_THRESHOLD
from ..comfyui_patchconv.hosts.choices import check_option
from ..comfyui_patchconv.hosts.devices.spread import CHOICES, ONE, check_choice
from ..comfyui_patchconv.hosts.halves import HALVES
from ..comfyui_patchconv.hosts.modes import MODES
from ..comfyui_patchconv.units import GIB, MILLION
from .checked import checked
from .host import HIDDEN, MODEL_CATEGORY, VAE_CATEGORY, advanced, follow_changes, node_id, schema
from .meter import Meter, measure_sampling
from .progress import StripWatch
from .vae_half import leave, patch_convolutions, patch_half, stream_half

_HALVES = (*HALVES, "both")


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
                    options=[*_HALVES],
                    default="both",
                    tooltip="Which half of the VAE runs in strips: the decoder (VAE Decode), the encoder (VAE Encode) "
                    "or both.",
                ),
                # Behind the others and optional: workflows saved without them go on loading.
                io.Combo.Input(
                    "mode",
                    options=[*MODES],
                    default="auto",
                    optional=True,
                    tooltip="auto: as without this node where that fits, patch where that is enough, stream where it "
                    "is not; decided at each decode by what is free. patch: each large convolution in strips, splits "
                    "and threshold apply. stream: the whole decoder or encoder in strips, everything between its "
                    "convolutions too: far less memory, the strips are chosen for you.",
                ),
                io.Float.Input(
                    "budget",
                    display_name="budget (GiB)",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    optional=True,
                    tooltip="For auto and stream: memory of the device to stay within, beside the VAE's weights. What "
                    "does not fit is kept in the computer's memory, or in a file when the VAE runs on the CPU. 0 takes "
                    "what is free.",
                ),
                _padding_input(),
                advanced(
                    io.Combo,
                    "devices",
                    options=[*CHOICES],
                    default=ONE,
                    optional=True,
                    tooltip="For auto and stream: the devices that what is streamed is computed on, each a band of its "
                    "rows, in memory of its own; the same picture. one: that of the VAE. all: every one of its kind. A "
                    "number: so many of them. The others belong to worker processes, which stay for the next decode.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="A copy of the VAE that works in strips.")],
            hidden=[*HIDDEN],
        )

    @classmethod
    @checked
    def execute(
        cls,
        vae: Any,
        splits: int,
        threshold: float,
        half: str,
        mode: str = "patch",
        budget: float = 0.0,
        padding: str = "plain",
        devices: str = ONE,
    ) -> io.NodeOutput:
        for name, value, options in (("half", half, _HALVES), ("mode", mode, MODES), ("padding", padding, PADDINGS)):
            check_option(name, value, options)
        check_choice(devices)
        vae.throw_exception_if_invalid()
        copied = copy.copy(vae)
        copied.patcher = vae.patcher.clone()
        count = 0
        for name, method in zip(HALVES, ("decode", "encode")):
            if half not in (name, "both"):
                continue
            leave(copied, name, method)
            elements, size = round(threshold * MILLION), round(budget * GIB)
            if mode == "patch":
                count += patch_half(copied, name, method, splits, elements, padding, node_id(cls))
            else:
                strips = Tiling(splits, threshold=elements) if mode == "auto" else None
                count += stream_half(copied, name, method, size, padding, node_id(cls), strips, devices)
        if not count:
            raise ValueError(_nothing_found("VAE", type(vae.first_stage_model).__name__, half))
        follow_changes(copied.patcher)
        return io.NodeOutput(copied)


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
                _padding_input(),
            ],
            outputs=[io.Model.Output(tooltip="A copy of the model that works in strips.")],
            hidden=[*HIDDEN],
        )

    @classmethod
    @checked
    def execute(cls, model: Any, splits: int, threshold: float, padding: str = "plain") -> io.NodeOutput:
        check_option("padding", padding, PADDINGS)
        copied = model.clone()
        strips = StripWatch()
        tiling = Tiling(splits, threshold=round(threshold * MILLION), on_strip=strips)
        if not patch_convolutions(copied, model.model, tiling, padding, lambda name: True):
            raise ValueError(_nothing_found("model", type(model.model).__name__))
        follow_changes(copied)
        meter = Meter(node_id(cls), "Model", False, torch.device(model.load_device), strips)
        strips.then(meter.look)
        measure_sampling(copied, meter)
        return io.NodeOutput(copied)


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
        default=DEFAULT_THRESHOLD / MILLION,
        min=0.0,
        max=100_000.0,
        step=0.1,
        tooltip="Convolutions with a smaller input than this stay as they are. In millions of elements: channels x "
        "height x width of what goes into the convolution, times frames for video.",
    )


def _padding_input() -> Any:
    return advanced(
        io.Combo,
        "padding",
        options=[*PADDINGS],
        default="plain",
        optional=True,
        tooltip="plain: the same result as without this node. partial: the zeros around the image do not count, and "
        "what is computed at its borders is scaled up instead (partial convolution). Changes the result near the "
        "borders.",
    )


def _nothing_found(kind: str, name: str, half: str = "both") -> str:
    where, other = ("", "") if half == "both" else (f" in its {half}", " or choose another half")
    return (
        f"This {kind} ({name}) has no convolution{where}, so nothing can run in strips: "
        f"connect it without Patch Conv{other}."
    )
