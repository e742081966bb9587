"""Patch Diffusion: images from a U-Net that works on patches of pixels (Luhman & Luhman 2022)."""

from __future__ import annotations

from typing import Any

import folder_paths  # pyright: ignore[reportMissingImports]
import torch
from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

from ..comfyui_patchconv.hosts.choices import check_option
from ..comfyui_patchconv.pixel_models.patch_diffusion.checkpoints import load
from ..comfyui_patchconv.pixel_models.patch_diffusion.diffusion import sample
from ..comfyui_patchconv.pixel_models.patch_diffusion.model import image_bytes
from .checked import checked
from .host import LOADER_CATEGORY, SAMPLER_CATEGORY, advanced, schema
from .pixel_model import DTYPES, PixelModel, SamplingBar, add_folder, as_image, expect, noise, patcher_of, ready

FAMILY, FOLDER = "Patch Diffusion", "patch_diffusion"
_SAMPLERS = ("ancestral", "ddim")

add_folder(FOLDER, ".safetensors")


class PatchDiffusionLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            node_id="PatchConv_PatchDiffusionLoader",
            display_name="Patch Diffusion Loader",
            category=LOADER_CATEGORY,
            description=(
                "Loads a Patch Diffusion model, which makes images without a VAE: patches of pixels become the "
                "channels of its U-Net."
            ),
            search_aliases=["patch diffusion", "pixel space", "patchconv"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A .safetensors file in models/patch_diffusion: of a training of yours, or imported.",
                ),
                advanced(
                    io.Combo,
                    "weight_dtype",
                    options=[*DTYPES],
                    default="default",
                    tooltip="default: fp32, in which the model was trained. bf16 and fp16 take half the memory, and "
                    "give slightly different images.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model. Patch Conv (Model) can patch it.")],
        )

    @classmethod
    @checked
    def execute(cls, model_name: str, weight_dtype: str = "default") -> io.NodeOutput:
        check_option("weight_dtype", weight_dtype, DTYPES)
        networks = load(folder_paths.get_full_path_or_raise(FOLDER, model_name))
        return io.NodeOutput(patcher_of(PixelModel(FAMILY, networks), weight_dtype))


class PatchDiffusionSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            node_id="PatchConv_PatchDiffusionSampler",
            display_name="Patch Diffusion Sampler",
            category=SAMPLER_CATEGORY,
            description="Makes images with a Patch Diffusion model, from noise to pixels.",
            search_aliases=["patch diffusion", "pixel space sampler", "patchconv"],
            inputs=[
                io.Model.Input("model", tooltip="From Patch Diffusion Loader."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed of the noise.",
                ),
                io.Int.Input(
                    "steps", default=250, min=2, max=1000, tooltip="Steps of the 1000 that the model was trained with."
                ),
                io.Combo.Input(
                    "sampler",
                    options=[*_SAMPLERS],
                    default="ancestral",
                    tooltip="ancestral: fresh noise in each step, the authors' way. ddim: none, good with few steps.",
                ),
                io.Float.Input(
                    "guidance",
                    default=1.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="For models with classes: how closely to follow the class. 1 is off, and twice as fast.",
                ),
                io.Int.Input(
                    "class_label",
                    default=-1,
                    min=-1,
                    max=100_000,
                    tooltip="For models with classes: the number of the class. -1 draws one for each image.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Images to make at once."),
            ],
            outputs=[io.Image.Output(tooltip="The images.")],
        )

    @classmethod
    @checked
    def execute(
        cls, model: Any, seed: int, steps: int, sampler: str, guidance: float, class_label: int, batch_size: int
    ) -> io.NodeOutput:
        check_option("sampler", sampler, _SAMPLERS)
        networks: Any = expect(model, FAMILY).diffusion_model
        config = networks[0].config
        if class_label >= config.classes > 0:
            raise ValueError(
                f"class_label is {class_label} and the model has {config.classes} classes: use 0 to "
                f"{config.classes - 1}, or -1."
            )
        size, dtype = config.image_size, next(networks.parameters()).dtype
        device = ready(model, batch_size * image_bytes(config, dtype))
        start, generator = noise(seed, batch_size, 3, size, size)
        labels = torch.randint(max(config.classes, 1), (batch_size,), generator=generator)
        if class_label >= 0:
            labels = torch.full_like(labels, class_label)
        bar = SamplingBar(steps)
        images = sample(
            [*networks],
            start.to(device),
            labels.to(device) if config.classes else None,
            steps=str(steps),
            guidance=guidance,
            ddim=sampler == "ddim",
            generator=generator,
            on_step=lambda done, total, image: bar(done, total, (image + 1) / 2),
        )
        return io.NodeOutput(as_image((images + 1) / 2))
