"""Images to train on, and files as other programs write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from comfyui_patchconv.pixel_models.patch_diffusion.model import PatchUNet


def write_images(folder: Path, count: int = 5, size: tuple[int, int] = (8, 8)) -> Path:
    """Random images in two folders, "one" and "two"."""
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / ("one" if number % 2 else "two") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return folder


def words(text: str) -> list[str]:
    """The words of a command line."""
    return text.split()


def write_keras(h5py: Any, path: Path, model: PatchUNet) -> None:
    """The weights of `model` as Keras' `save_weights` lays them out: in order, with names that say nothing."""
    state = model.state_dict()
    names = sorted(state, key=lambda name: name != "label_embs.weight")
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [f"layer_{number}" for number in range(len(names))]
        for number, name in enumerate(names):
            group = file.create_group(f"layer_{number}")
            group.attrs["weight_names"] = [f"dense_{77 + number}/kernel:0"]
            group[f"dense_{77 + number}/kernel:0"] = _keras_layout(name, state[name]).numpy()


def _keras_layout(name: str, value: Tensor) -> Tensor:
    if value.dim() == 1 or name == "label_embs.weight":
        return value
    if value.shape[2:].numel() == 1:  # a Dense layer there
        return value.flatten(1).T
    return value.permute(2, 3, 1, 0)
