"""Puts strips or streaming, an estimate and a meter on one half of a VAE of the host's, and takes them off again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]
from torch import nn

from ..comfyui_patchconv import Tiling, convolutions
from ..comfyui_patchconv.conv.forward import TiledForward, tiled_forward
from ..comfyui_patchconv.conv.patch import PADDINGS, patched
from ..comfyui_patchconv.hosts.auto import AutoForward
from ..comfyui_patchconv.hosts.devices.spread import ONE
from ..comfyui_patchconv.hosts.halves import half_of, part_of
from ..comfyui_patchconv.hosts.memory_estimates import AutoEstimate, Estimate, StreamEstimate, StripEstimate
from ..comfyui_patchconv.hosts.streamed import StreamedAtOnce, StreamedForward, Switch
from .host import RELIABLE, several_devices, try_without_tiles
from .meter import Measured, Meter
from .progress import AnyProgress, Progress


def patch_convolutions(
    patcher: Any, model: nn.Module, tiling: Tiling, padding: str, chosen: Callable[[str], bool]
) -> int:
    """Have the host put strips into the chosen convolutions of `model`; returns how many these are.

    Those with a kernel of 1 too: a backend copies their whole input and output as it does for larger kernels.
    """
    found = list(convolutions(model, predicate=lambda name, _: chosen(name)))
    for name, module in found:
        key = f"{name}._conv_forward"
        patcher.add_object_patch(key, tiled_forward(module, patcher.get_model_object(key), tiling, PADDINGS[padding]))
    return len(found)


def patch_half(vae: Any, half: str, method: str, splits: int, threshold: int, padding: str, node: str) -> int:
    """Put strips, an estimate and a meter on one half of `vae`, a copy made for it; returns how many convolutions."""
    progress = Progress()
    tiling = Tiling(splits, threshold=threshold, on_strip=progress)
    progress.convolutions = patch_convolutions(
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
    vae: Any, half: str, method: str, budget: int, padding: str, node: str, strips: Optional[Tiling] = None,
    devices: str = ONE,
) -> int:  # fmt: skip
    """Put streaming, an estimate and a meter on one half of `vae`, a copy; returns how many convolutions it has.

    strips: of convolutions, for `auto`, which also runs eagerly or in them where that fits; None to stream always.
    devices: to stream over; see `CHOICES`.
    """
    model, patcher = vae.first_stage_model, vae.patcher
    count = convolutions_of(vae, half)
    if not count:
        return 0
    if padding != "plain":  # whole: the strips are streaming's
        whole = Tiling(1, threshold=sys.maxsize)
        patch_convolutions(patcher, model, whole, padding, lambda name: half_of(name) == half)
    key = part_of(model, half, method)
    progress = AnyProgress()
    meter = _meter(vae, half, strips is None, progress, node)
    free, switch = model_management.get_free_memory, Switch(strips is None)
    notes = (progress, progress.next_call, meter.missed)
    spread = several_devices(devices, meter.spread)
    part = StreamedForward(patcher.get_model_object(key), budget, free, *notes, switch, meter.ran, spread=spread)
    patcher.add_object_patch(key, part)
    starts = (progress.start, part.start, meter.start)
    options: Any = dict(budget=budget, part=key, on_work=progress.expect, starts=starts)
    estimate = _streamed_estimate(vae, method, strips, options)
    setattr(vae, f"memory_used_{method}", estimate)
    if method == "decode":
        try_without_tiles(vae)
    if key != method:
        patcher.add_object_patch(method, StreamedAtOnce(patcher.get_model_object(method), part, estimate))
    if strips is not None and isinstance(estimate, AutoEstimate):
        in_strips = partial(_in_strips, half, strips, padding, progress)
        below, on = patcher.get_model_object(method), partial(switch.set_to, True)
        auto = AutoForward(below, on, estimate.needs, free, budget, in_strips, meter.chosen, model)
        patcher.add_object_patch(method, auto)
        estimate.starts = (*estimate.starts, auto.start)
    _measure(vae, method, meter, estimate)
    return count


def _streamed_estimate(vae: Any, method: str, strips: Optional[Tiling], options: dict[str, Any]) -> StreamEstimate:
    """What the host is told that `method` takes. strips: see `stream_half`. options: see `StreamEstimate`."""
    host = getattr(vae, f"memory_used_{method}")
    if strips is None:
        return StreamEstimate(vae, method, host, **options)
    total = partial(model_management.get_total_memory, torch.device(vae.device))
    return AutoEstimate(vae, method, host, total=total, splits=strips.splits, threshold=strips.threshold, **options)


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
