"""Patch-based DDPM: images from a U-Net that works patch by patch (Arakawa et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths  # pyright: ignore[reportMissingImports]
from comfy_api.latest import io  # pyright: ignore[reportMissingImports]

from ..comfyui_patchconv.hosts.choices import check_option
from ..comfyui_patchconv.pixel_models.patch_ddpm.checkpoints import import_torch, load
from ..comfyui_patchconv.pixel_models.patch_ddpm.diffusion import SAMPLERS, sample
from ..comfyui_patchconv.pixel_models.patch_ddpm.model import patch_bytes
from .checked import checked
from .host import LOADER_CATEGORY, SAMPLER_CATEGORY, advanced, schema
from .pixel_model import DTYPES, PixelModel, SamplingBar, add_folder, as_image, expect, noise, patcher_of, ready

FAMILY, FOLDER = "Patch-based DDPM", "patch_ddpm"

add_folder(FOLDER, ".safetensors", ".pt")


class PatchDDPMLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            node_id="PatchConv_PatchDDPMLoader",
            display_name="Patch-based DDPM Loader",
            category=LOADER_CATEGORY,
            description=(
                "Loads a patch-based DDPM, which makes an image patch by patch, each with its place and the whole "
                "image in small: the memory of a patch is enough."
            ),
            search_aliases=["patch ddpm", "pixel space", "patchconv"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A .safetensors file or a training's model-*.pt in models/patch_ddpm.",
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
        path = Path(folder_paths.get_full_path_or_raise(FOLDER, model_name))
        network, diffusion = load(path) if path.suffix.lower() == ".safetensors" else import_torch(path)
        return io.NodeOutput(patcher_of(PixelModel(FAMILY, [network], diffusion), weight_dtype))


class PatchDDPMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            node_id="PatchConv_PatchDDPMSampler",
            display_name="Patch-based DDPM Sampler",
            category=SAMPLER_CATEGORY,
            description="Makes images with a patch-based DDPM, from noise to pixels.",
            search_aliases=["patch ddpm", "pixel space sampler", "patchconv"],
            inputs=[
                io.Model.Input("model", tooltip="From Patch-based DDPM Loader."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed of the noise.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=10_000,
                    tooltip="Steps of those that the model was trained with, mostly 1000.",
                ),
                io.Combo.Input(
                    "sampler",
                    options=[*SAMPLERS],
                    default="ddim",
                    tooltip="ancestral: fresh noise in each step, the authors' way, for many steps. ddim: none, for "
                    "50 and more. dpm++: none and a better formula, for 20 and more.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Images to make at once."),
                io.Int.Input(
                    "patches_at_once",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Patches of each image to work on together: fewer need less memory, more are faster. The "
                    "image is the same. 0 takes as many as fit into half of the free memory.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The images.")],
        )

    @classmethod
    @checked
    def execute(
        cls, model: Any, seed: int, steps: int, sampler: str, batch_size: int, patches_at_once: int
    ) -> io.NodeOutput:
        check_option("sampler", sampler, SAMPLERS)
        held = expect(model, FAMILY)
        network: Any = held.diffusion_model[0]
        config, dtype = network.config, next(network.parameters()).dtype
        each = batch_size * patch_bytes(config, dtype, model.offload_device)
        device = ready(model, each * min(patches_at_once or 1, config.patches))
        start, generator = noise(seed, batch_size, config.channels, *config.image_sides)
        images = sample(
            network,
            held.details,
            start.to(device),
            steps=steps,
            sampler=sampler,
            generator=generator,
            patches_at_once=patches_at_once,
            on_step=SamplingBar(steps),
        )
        return io.NodeOutput(as_image(images))
