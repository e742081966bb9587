"""Puts models of pixels into the host's patcher and samples under the host's bar: what their families share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import folder_paths  # pyright: ignore[reportMissingImports]
import torch
from comfy import model_management  # pyright: ignore[reportMissingImports]
from comfy.cli_args import LatentPreviewMethod, args  # pyright: ignore[reportMissingImports]
from comfy.model_patcher import ModelPatcher  # pyright: ignore[reportMissingImports]
from comfy.utils import ProgressBar  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor, nn

from ..comfyui_patchconv.files.images import levels

DTYPES = {"default": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What a loader offers; the first two are what such models are trained in."""

EXAMPLES = Path(__file__).parents[1] / "example_workflows" / "models"
"""The models of the example workflows, in folders like the host's."""


class PixelModel(nn.Module):
    """Holds networks where the host and other nodes look for one; `family` says who can sample with them."""

    def __init__(self, family: str, networks: Sequence[nn.Module], details: Any = None) -> None:
        super().__init__()
        self.family, self.details = family, details
        self.diffusion_model = nn.ModuleList(networks)

    @property
    def latent_format(self) -> Any:
        """What the host's samplers ask for first."""
        raise ValueError(
            f"This is a {self.family} model and works on pixels, without a latent: connect it to {self.family} Sampler."
        )


def add_folder(name: str, *suffixes: str) -> None:
    """Have the host look for models in its folder `name`, and behind it among the examples: files with `suffixes`."""
    for path in (Path(folder_paths.models_dir), EXAMPLES):
        folder_paths.add_model_folder_path(name, str(path / name))
    paths, known = folder_paths.folder_names_and_paths[name]  # without suffixes the host lists every file
    folder_paths.folder_names_and_paths[name] = (paths, {*known, *suffixes})


def patcher_of(model: PixelModel, dtype: str) -> Any:
    """Make the host's MODEL. dtype: one of `DTYPES`."""
    model = model.to(DTYPES[dtype]).requires_grad_(False)
    return ModelPatcher(model, model_management.get_torch_device(), model_management.unet_offload_device())


def expect(model: Any, family: str) -> PixelModel:
    """Take out what a MODEL holds. Raises ValueError for one of another family."""
    held = model.model
    if not isinstance(held, PixelModel) or held.family != family:
        kind = held.family if isinstance(held, PixelModel) else type(held).__name__
        raise ValueError(f"This is a model of another kind ({kind}): connect {family} Loader.")
    return held


def ready(model: Any, memory: int) -> torch.device:
    """Have the host load `model` and free `memory` bytes beside it; returns the device."""
    model_management.load_models_gpu([model], memory_required=memory)
    return model.load_device


def noise(seed: int, *shape: int) -> tuple[Tensor, torch.Generator]:
    """Draw the first noise, on the CPU as the host does, and return the generator of the steps' noise with it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), generator


class SamplingBar:
    """Moves the host's bar, shows its preview and heeds its interrupt; an `on_step` for images in 0..1."""

    def __init__(self, steps: int) -> None:
        self.bar = ProgressBar(steps)

    def __call__(self, done: int, steps: int, images: Tensor) -> None:
        model_management.throw_exception_if_processing_interrupted()
        preview = None
        if args.preview_method != LatentPreviewMethod.NoPreviews:
            image = Image.fromarray(levels(images[0] * 2 - 1).numpy()).convert("RGB")
            preview = ("JPEG", image, args.preview_size)
        self.bar.update_absolute(done + 1, steps, preview)


def as_image(images: Tensor) -> Tensor:
    """Make the host's IMAGE of `[N, 1 | 3 | 4, H, W]` in 0..1; grey becomes three equal channels."""
    channels = 3 if images.shape[1] == 1 else images.shape[1]
    whole = images.expand(-1, channels, -1, -1).clamp(0, 1).movedim(1, -1)
    return whole.float().contiguous().to(model_management.intermediate_device())
