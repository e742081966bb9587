"""Patch Conv Report: tells what runs behind Patch Conv nodes took, as text and as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui  # pyright: ignore[reportMissingImports]
from comfy_execution.utils import get_executing_context  # pyright: ignore[reportMissingImports]

from ..comfyui_patchconv.hosts.chart import draw
from ..comfyui_patchconv.hosts.figures import Figures
from .host import VAE_CATEGORY, schema
from .meter import Meter, meters_of

_NOT_CONNECTED = (
    "Patch Conv: nothing that is connected comes from a Patch Conv node that is on, so there is nothing to report. "
    "Connect vae to Patch Conv (VAE), or model to Patch Conv (Model)."
)
_NOTHING = (
    "Patch Conv: nothing was measured. Nothing has run yet with what is connected: `after` takes the output of the "
    "VAE Decode, VAE Encode or sampler that uses it."
)
_EARLIER = " (measured in an earlier run, whose result ComfyUI has kept)"


class PatchConvReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            node_id="PatchConv_Report",
            display_name="Patch Conv Report",
            category=VAE_CATEGORY,
            description=(
                "What a decode, encode or sampling behind Patch Conv took: strips, peak memory, what it was "
                "counted to need without Patch Conv, and time, as text and as a plot to save."
            ),
            search_aliases=["memory report", "vram report", "memory plot", "benchmark", "patchconv"],
            inputs=[
                io.AnyType.Input(
                    "after",
                    tooltip="The output of the VAE Decode, VAE Encode or sampler that is to be reported on: the report "
                    "waits for it. Anything can be connected.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The VAE from Patch Conv (VAE)."),
                io.Model.Input(
                    "model", optional=True, tooltip="The model from Patch Conv (Model), or from a node behind it."
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="A line for each part that ran."),
                io.Image.Output("plot", display_name="plot", tooltip="Memory over time, for Save Image."),
                io.AnyType.Output("passed", display_name="after", tooltip="What came in at `after`, as it was."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, after: Any, vae: Any = None, model: Any = None) -> io.NodeOutput:
        meters = meters_of(vae, model)
        runs = [(meter, meter.figures) for meter in meters if meter.figures is not None]
        text = "\n".join(_line(*run) for run in runs) or (_NOTHING if meters else _NOT_CONNECTED)
        plot = np.asarray(draw([figures for _, figures in runs if figures.peak]), dtype=np.float32) / 255
        image = torch.from_numpy(plot)[None]
        shown = ui.PreviewImage(image, cls=cls).as_dict() | ui.PreviewText(text).as_dict()
        return io.NodeOutput(text, image, after, ui=shown)


def _line(meter: Meter, figures: Figures) -> str:
    now = get_executing_context()
    earlier = now is not None and meter.prompt != now.prompt_id
    return f"Patch Conv: {figures.line()}{_EARLIER if earlier else ''}"
