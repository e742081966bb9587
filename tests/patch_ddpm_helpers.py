"""A small patch-based DDPM, and what the authors' code gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from comfyui_patchconv.pixel_models.patch_ddpm.config import Config, DiffusionConfig, ModelConfig
from comfyui_patchconv.pixel_models.patch_ddpm.model import PatchDenoiser

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "patch_ddpm.pt"
CELEBA = ModelConfig(128)
TALL = ModelConfig(8, dim_mults=(1, 2), resnet_block_groups=4, patch_divider=3, image_size=(18, 12))
FEW = DiffusionConfig(timesteps=8)


def reference() -> tuple[Config, dict[str, Tensor]]:
    with np.load(DATA / "patch_ddpm.npz") as found:
        arrays = {key: torch.from_numpy(found[key]) for key in found}
    return Config.from_json((DATA / "patch_ddpm.json").read_text()), arrays


def randomised(config: ModelConfig) -> PatchDenoiser:
    torch.manual_seed(0)
    model = PatchDenoiser(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.eval()


def inputs(config: ModelConfig, count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, config.channels, *config.image_sides, generator=generator)
    return image, torch.randint(1000, (count,), generator=generator)
