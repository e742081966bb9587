"""Patch Conv: runs the convolutions of a VAE or of a model in strips. Same pixels, less memory."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]
from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import nn

from ..comfyui_patchconv import Tiling, convolutions
from ..comfyui_patchconv.conv.forward import TiledForward, tiled_forward
from ..comfyui_patchconv.conv.patch import PADDINGS
from ..comfyui_patchconv.conv.strip_sizes import DEFAULT_THRESHOLD
from ..comfyui_patchconv.hosts.estimates import Estimate, StreamEstimate, StripEstimate
from ..comfyui_patchconv.hosts.halves import HALVES, half_of, part_of
from ..comfyui_patchconv.hosts.modes import MODES
from ..comfyui_patchconv.hosts.numbers import check_number
from ..comfyui_patchconv.hosts.streamed import StreamedAtOnce, StreamedForward
from ..comfyui_patchconv.units import GIB, MILLION
from .host import MODEL_CATEGORY, VAE_CATEGORY, advanced, follow_clones, schema
from .meter import Measured, Meter, measure_sampling
from .progress import Progress, StreamProgress, Strips


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
                    default="patch",
                    optional=True,
                    tooltip="patch: each large convolution in strips, splits and threshold apply. stream: the whole "
                    "decoder or encoder in strips, everything between its convolutions too: far less memory, the "
                    "strips are chosen for you.",
                ),
                io.Float.Input(
                    "budget",
                    display_name="budget (GiB)",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    optional=True,
                    tooltip="For stream: memory of the device to stay within, beside the VAE's weights. What does not "
                    "fit is kept in the computer's memory, or in a file when the VAE runs on the CPU. 0 takes what is "
                    "free.",
                ),
                _padding_input(),
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
    ) -> io.NodeOutput:
        vae.throw_exception_if_invalid()
        check_number("threshold", threshold, "millions of elements")
        check_number("budget", budget, "GiB")
        patched = copy.copy(vae)
        patched.patcher = vae.patcher.clone()
        count = 0
        for name, method in zip(HALVES, ("decode", "encode")):
            if half not in (name, "both"):
                continue
            leave(patched, name, method)
            if mode == "stream":
                count += _stream_half(patched, name, method, round(budget * GIB), padding, _id(cls))
            else:
                count += _patch_half(patched, name, method, splits, round(threshold * MILLION), padding, _id(cls))
        if not count:
            raise ValueError(_nothing_found("VAE", type(vae.first_stage_model).__name__, half))
        follow_clones(patched.patcher)
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
                _padding_input(),
            ],
            outputs=[io.Model.Output(tooltip="A copy of the model that works in strips.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, splits: int, threshold: float, padding: str = "plain") -> io.NodeOutput:
        check_number("threshold", threshold, "millions of elements")
        patched = model.clone()
        strips = Strips()
        tiling = Tiling(splits, threshold=round(threshold * MILLION), on_strip=strips)
        if not _patch(patched, model.model, tiling, padding, lambda name: True):
            raise ValueError(_nothing_found("model", type(model.model).__name__))
        follow_clones(patched)
        meter = Meter(_id(cls), "Model", False, torch.device(model.load_device), strips)
        strips.then(meter.look)
        measure_sampling(patched, meter)
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


def _stream_half(vae: Any, half: str, method: str, budget: int, padding: str, node: str) -> int:
    """Put streaming, an estimate and a meter on one half of `vae`, a copy; returns how many convolutions it has."""
    count = sum(half_of(name) == half for name, _ in convolutions(vae.first_stage_model, predicate=lambda *_: True))
    if count:
        if padding != "plain":  # whole: the strips are streaming's
            whole = Tiling(1, threshold=sys.maxsize)
            _patch(vae.patcher, vae.first_stage_model, whole, padding, lambda name: half_of(name) == half)
        key = part_of(vae.first_stage_model, half, method)
        progress = StreamProgress()
        free = model_management.get_free_memory
        streamed = StreamedForward(vae.patcher.get_model_object(key), budget, free, progress, progress.next_call)
        vae.patcher.add_object_patch(key, streamed)
        host = getattr(vae, f"memory_used_{method}")
        meter = _meter(vae, half, True, progress, node)
        starts = (progress.start, streamed.start, meter.start)
        estimate = StreamEstimate(vae, method, host, budget=budget, part=key, on_work=progress.expect, starts=starts)
        setattr(vae, f"memory_used_{method}", estimate)
        if key != method:
            at_once = StreamedAtOnce(vae.patcher.get_model_object(method), streamed, estimate)
            vae.patcher.add_object_patch(method, at_once)
        _measure(vae, method, meter, estimate)
    return count


def _meter(vae: Any, half: str, streamed: bool, progress: Progress | StreamProgress, node: str) -> Meter:
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
    for key, patch in list(vae.patcher.object_patches.items()):
        if isinstance(patch, StreamedForward) and key in (method, part_of(vae.first_stage_model, half, method)):
            vae.patcher.add_object_patch(key, patch.forward)
        elif isinstance(patch, TiledForward) and half_of(key.rpartition(".")[0]) == half:
            del vae.patcher.object_patches[key]
            if patch.inner is not None:
                vae.patcher.add_object_patch(key, patch.inner)


def _nothing_found(kind: str, name: str, half: str = "both") -> str:
    where, other = ("", "") if half == "both" else (f" in its {half}", " or choose another half")
    return (
        f"This {kind} ({name}) has no convolution{where}, so nothing can run in strips: "
        f"connect it without Patch Conv{other}."
    )
