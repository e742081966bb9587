"""Upscale Image (Patch Conv): an upscale model over a whole image, streamed. No tiles, no seams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]
from comfy_api.latest import io  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ..comfyui_patchconv.hosts.devices.spread import CHOICES, ONE, check_choice
from ..comfyui_patchconv.hosts.upscale import (
    StreamedUpscaler,
    check_channels,
    check_model,
    in_precision,
    joined,
    room_for,
)
from ..comfyui_patchconv.streaming import Expected
from ..comfyui_patchconv.units import GIB
from .checked import checked
from .host import HIDDEN, UPSCALE_CATEGORY, advanced, node_id, schema, several_devices
from .meter import Meter
from .progress import StreamProgress

_BYTES_OF_A_TILE = 512 * 512 * 3 * 384
"""What the host reckons with for its tiles, times the scale and the bytes of an element."""


class UpscaleImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            node_id="PatchConv_UpscaleImage",
            display_name="Upscale Image (Patch Conv)",
            category=UPSCALE_CATEGORY,
            description=(
                "Upscales an image with a model as a whole, without tiles and their seams: it runs in horizontal "
                "strips, in a fraction of the memory. The same picture as the model makes of the whole image."
            ),
            search_aliases=[
                "upscale", "upscaler", "esrgan", "super resolution", "seamless upscale", "ultimate sd upscale",
                "tiled upscale", "upscale model", "hires", "enlarge image", "patchconv",
            ],
            inputs=[
                io.UpscaleModel.Input(
                    "upscale_model", tooltip="The model, from Load Upscale Model. It is not changed."
                ),
                io.Image.Input("image", tooltip="The image; a batch or a video is upscaled frame by frame."),
                io.Float.Input(
                    "budget",
                    display_name="budget (GiB)",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    tooltip="Memory of the device to stay within, beside the model's weights. What does not fit is "
                    "kept in the computer's memory, or in a file when the model runs on the CPU. 0 takes what is free.",
                ),
                # Behind the others and optional: workflows saved without it go on loading.
                advanced(
                    io.Combo,
                    "devices",
                    options=[*CHOICES],
                    default=ONE,
                    optional=True,
                    tooltip="The devices that one picture is computed on, each a band of its rows, in memory of its "
                    "own; the same picture. one: that of the model. all: every one of its kind. A number: so many of "
                    "them. The others belong to worker processes, which stay for the next picture.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The image, larger by the model's scale.")],
            hidden=[*HIDDEN],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, upscale_model: Any, image: Tensor, budget: float = 0.0, devices: str = ONE) -> io.NodeOutput:
        check_choice(devices)
        check_model(upscale_model)
        check_channels(upscale_model, image.shape[-1])
        patcher = getattr(upscale_model, "patcher", None)  # newer than 0.8
        device = torch.device(model_management.get_torch_device() if patcher is None else patcher.load_device)
        dtype = _dtype(upscale_model, device)
        model = in_precision(upscale_model, dtype)
        progress = StreamProgress()
        meter = Meter(node_id(cls), "upscaling", True, device, progress)
        progress.then(meter.look)
        upscaler = StreamedUpscaler(
            model, round(budget * GIB), model_management.get_free_memory, output=_output(),
            on_progress=progress, on_call=progress.next_call, on_miss=meter.missed,
            spread=several_devices(devices, meter.spread),
        )  # fmt: skip
        frames, height, width, _ = image.shape
        expected = upscaler.expected(height, width, device, dtype)

        @contextmanager
        def around() -> Iterator[None]:
            model_management.throw_exception_if_processing_interrupted()
            with meter.measuring(lambda: 0 if expected is None else expected.eager):
                yield

        with _loaded(model, device, _room(expected, image, model.scale)):
            meter.start()
            progress.start()
            progress.expect(0 if expected is None else frames * expected.work)
            return io.NodeOutput(joined(upscaler.frames(image, device, dtype, around), frames))


def _dtype(model: Any, device: torch.device) -> torch.dtype:
    """The precision to compute in: half where the model supports it and the host would take it."""
    count = sum(weight.numel() for weight in model.model.parameters())
    if getattr(model, "supports_half", False) and model_management.should_use_fp16(device, count):
        return torch.float16
    if getattr(model, "supports_bfloat16", False) and model_management.should_use_bf16(device, count):
        return torch.bfloat16
    return torch.float32


def _output() -> tuple[torch.device, torch.dtype]:
    """Where the host wants images, and of which type."""
    dtype = getattr(model_management, "intermediate_dtype", None)  # newer than 0.8
    return torch.device(model_management.intermediate_device()), torch.float32 if dtype is None else dtype()


def _room(expected: Optional[Expected], image: Tensor, scale: int) -> float:
    """Bytes for the host to make room for, beside the weights."""
    of_host = _BYTES_OF_A_TILE * image.element_size() * max(scale, 1.0)
    one = image.nelement() // max(len(image), 1)
    return room_for(expected, of_host) + one * image.element_size()


@contextmanager
def _loaded(model: Any, device: torch.device, room: float) -> Iterator[None]:
    """Within the block `model` is on `device`, and the host has made `room` beside it.

    Newer ComfyUIs have a patcher for the loader's model, and it is theirs to unload; our copy in half precision, and
    any model before, is put back at the end.
    """
    patcher = getattr(model, "patcher", None)
    if patcher is not None and patcher.model is model.model:
        model_management.load_models_gpu([patcher], memory_required=room, force_full_load=True)
        yield
        return
    model_management.free_memory(model_management.module_size(model.model) + room, device)
    model.model.to(device)
    try:
        yield
    finally:
        model.model.to("cpu")
        model_management.soft_empty_cache()
