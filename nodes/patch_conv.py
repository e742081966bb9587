"""Patch Conv: runs the convolutions of a VAE or of a model in strips. Same pixels, less memory."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]
from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import nn

from ..comfyui_patchconv import Tiling, convolutions
from ..comfyui_patchconv.conv.forward import TiledForward, tiled_forward
from ..comfyui_patchconv.conv.patch import PADDINGS, patched
from ..comfyui_patchconv.conv.strip_sizes import DEFAULT_THRESHOLD
from ..comfyui_patchconv.hosts.auto import AutoForward
from ..comfyui_patchconv.hosts.devices.spread import CHOICES, ONE, check_choice
from ..comfyui_patchconv.hosts.estimates import AutoEstimate, Estimate, StreamEstimate, StripEstimate
from ..comfyui_patchconv.hosts.halves import HALVES, half_of, part_of
from ..comfyui_patchconv.hosts.modes import MODES
from ..comfyui_patchconv.hosts.numbers import check_number
from ..comfyui_patchconv.hosts.streamed import StreamedAtOnce, StreamedForward, Switch
from ..comfyui_patchconv.units import GIB, MILLION
from .host import (
    MODEL_CATEGORY,
    RELIABLE,
    VAE_CATEGORY,
    advanced,
    follow_changes,
    schema,
    several_devices,
    try_without_tiles,
)
from .meter import Measured, Meter, measure_sampling
from .progress import AnyProgress, Progress, StripWatch


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
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
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
        vae.throw_exception_if_invalid()
        check_number("threshold", threshold, "millions of elements")
        check_number("budget", budget, "GiB")
        check_choice(devices)
        copied = copy.copy(vae)
        copied.patcher = vae.patcher.clone()
        count = 0
        for name, method in zip(HALVES, ("decode", "encode")):
            if half not in (name, "both"):
                continue
            leave(copied, name, method)
            elements, size = round(threshold * MILLION), round(budget * GIB)
            if mode == "patch":
                count += _patch_half(copied, name, method, splits, elements, padding, _id(cls))
            else:
                strips = Tiling(splits, threshold=elements) if mode == "auto" else None
                count += stream_half(copied, name, method, size, padding, _id(cls), strips, devices)
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
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, splits: int, threshold: float, padding: str = "plain") -> io.NodeOutput:
        check_number("threshold", threshold, "millions of elements")
        copied = model.clone()
        strips = StripWatch()
        tiling = Tiling(splits, threshold=round(threshold * MILLION), on_strip=strips)
        if not _patch(copied, model.model, tiling, padding, lambda name: True):
            raise ValueError(_nothing_found("model", type(model.model).__name__))
        follow_changes(copied)
        meter = Meter(_id(cls), "Model", False, torch.device(model.load_device), strips)
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


def _patch(patcher: Any, model: nn.Module, tiling: Tiling, padding: str, chosen: Callable[[str], bool]) -> int:
    """Have the host put strips into the chosen convolutions of `model`; returns how many these are.

    Those with a kernel of 1 too: a backend copies their whole input and output as it does for larger kernels.
    """
    found = list(convolutions(model, predicate=lambda name, _: chosen(name)))
    for name, module in found:
        key = f"{name}._conv_forward"
        patcher.add_object_patch(key, tiled_forward(module, patcher.get_model_object(key), tiling, PADDINGS[padding]))
    return len(found)


def _patch_half(vae: Any, half: str, method: str, splits: int, threshold: int, padding: str, node: str) -> int:
    """Put strips, an estimate and a meter on one half of `vae`, a copy made for it; returns how many convolutions."""
    progress = Progress()
    tiling = Tiling(splits, threshold=threshold, on_strip=progress)
    progress.convolutions = _patch(
        vae.patcher, vae.first_stage_model, tiling, padding, lambda name: half_of(name) == half
    )
    if progress.convolutions:
        host = getattr(vae, f"memory_used_{method}")
        meter = _meter(vae, half, False, progress, node)
        estimate = StripEstimate(
            vae, method, host, splits=splits, threshold=threshold, starts=(progress.start, meter.start)
        )
        setattr(vae, f"memory_used_{method}", estimate)
        _measure(vae, method, meter, estimate)
    return progress.convolutions


def stream_half(
    vae: Any,
    half: str,
    method: str,
    budget: int,
    padding: str,
    node: str,
    strips: Optional[Tiling] = None,
    devices: str = ONE,
) -> int:
    """Put streaming, an estimate and a meter on one half of `vae`, a copy; returns how many convolutions it has.

    strips: of convolutions, where it may run in them or eagerly too, whatever fits; None to have it always streamed.
    devices: to stream over; see `CHOICES`.
    """
    model, patcher, device = vae.first_stage_model, vae.patcher, torch.device(vae.device)
    count = convolutions_of(vae, half)
    if not count:
        return 0
    if padding != "plain":  # whole: the strips are streaming's
        whole = Tiling(1, threshold=sys.maxsize)
        _patch(patcher, model, whole, padding, lambda name: half_of(name) == half)
    key = part_of(model, half, method)
    progress = AnyProgress()
    meter = _meter(vae, half, strips is None, progress, node)
    free, switch = model_management.get_free_memory, Switch(strips is None)
    notes = (progress, progress.next_call, meter.missed)
    spread = several_devices(devices, meter.spread)
    part = StreamedForward(patcher.get_model_object(key), budget, free, *notes, switch, meter.left, spread=spread)
    patcher.add_object_patch(key, part)
    host = getattr(vae, f"memory_used_{method}")
    starts = (progress.start, part.start, meter.start)
    options: Any = dict(budget=budget, part=key, on_work=progress.expect, starts=starts)
    if strips is None:
        estimate = StreamEstimate(vae, method, host, **options)
    else:
        total = partial(model_management.get_total_memory, device)
        counts = dict(splits=strips.splits, threshold=strips.threshold)
        estimate = AutoEstimate(vae, method, host, total=total, **counts, **options)
    setattr(vae, f"memory_used_{method}", estimate)
    if method == "decode":
        try_without_tiles(vae)
    if key != method:
        patcher.add_object_patch(method, StreamedAtOnce(patcher.get_model_object(method), part, estimate))
    if strips is not None and isinstance(estimate, AutoEstimate):
        in_strips = partial(_in_strips, half, strips, padding, progress)
        below, on = patcher.get_model_object(method), partial(switch.set_to, True)
        patcher.add_object_patch(method, AutoForward(below, on, estimate.needs, free, budget, in_strips, meter.chosen))
    _measure(vae, method, meter, estimate)
    return count


def convolutions_of(vae: Any, half: str) -> int:
    """Count the convolutions of one half."""
    found = convolutions(vae.first_stage_model, predicate=lambda *_: True)
    return sum(half_of(name) == half for name, _ in found)


def _in_strips(half: str, strips: Tiling, padding: str, progress: AnyProgress, model: nn.Module) -> Any:
    """Make a context in which the convolutions of one half of `model` run in strips."""
    return patched(
        model, strips.splits, threshold=strips.threshold, padding=padding, on_strip=progress.on_strip,
        predicate=lambda name, _: half_of(name) == half,
    )  # fmt: skip


def _meter(vae: Any, half: str, streamed: bool, progress: Progress | AnyProgress, node: str) -> Meter:
    meter = Meter(node, f"VAE {half}", streamed, torch.device(vae.device), progress)
    progress.then(meter.look)
    return meter


def _measure(vae: Any, method: str, meter: Meter, estimate: Estimate) -> None:
    """Have all of `method` measured, be it in strips or streamed by now."""
    vae.patcher.add_object_patch(method, Measured(vae.patcher.get_model_object(method), meter, estimate.eager))


def _id(node: type[io.ComfyNode]) -> str:
    """Find the node's id in the workflow; empty where it is called by hand."""
    return str(getattr(node.hidden, "unique_id", None) or "")


def leave(vae: Any, half: str, method: str) -> None:
    """Take off what a node of ours before this one has put on this half of `vae`, a copy: the last node counts."""
    estimate = getattr(vae, f"memory_used_{method}")
    if not isinstance(estimate, Estimate):
        return
    setattr(vae, f"memory_used_{method}", estimate.host)
    measured = vae.patcher.object_patches.get(method)
    if isinstance(measured, Measured):
        vae.patcher.add_object_patch(method, measured.forward)
    if method == "decode":
        vae.patcher.object_patches.pop(RELIABLE, None)
    for key, patch in list(vae.patcher.object_patches.items()):
        if isinstance(patch, (StreamedForward, AutoForward)) and key in (
            method,
            part_of(vae.first_stage_model, half, method),
        ):
            vae.patcher.add_object_patch(key, _below(patch))
        elif isinstance(patch, TiledForward) and half_of(key.rpartition(".")[0]) == half:
            del vae.patcher.object_patches[key]
            if patch.inner is not None:
                vae.patcher.add_object_patch(key, patch.inner)


def _below(patch: Any) -> Any:
    """Find the method below all stand-ins of ours."""
    while isinstance(patch, (StreamedForward, AutoForward)):
        patch = patch.forward
    return patch


def _nothing_found(kind: str, name: str, half: str = "both") -> str:
    where, other = ("", "") if half == "both" else (f" in its {half}", " or choose another half")
    return (
        f"This {kind} ({name}) has no convolution{where}, so nothing can run in strips: "
        f"connect it without Patch Conv{other}."
    )
