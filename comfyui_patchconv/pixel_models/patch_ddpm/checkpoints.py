"""Files of patch-based DDPMs: ours, and those of the authors' trainer."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from ...files.tensors import is_usable, save_tensors, unpickled
from ..state_dicts import configuration, read, with_state
from .config import Config, DiffusionConfig, ModelConfig
from .diffusion import schedule_buffers
from .model import PatchDenoiser

PREFIX = "denoise_fn."
"""Prefix of the denoiser's weights in the authors' checkpoints."""

_METADATA = "patch_ddpm"


def save(model: PatchDenoiser, diffusion: DiffusionConfig, path: str | Path) -> None:
    """One safetensors file with the configuration, without the trainer's: whole, or what was there stays."""
    save_tensors(path, model.state_dict(), {_METADATA: Config(model.config, diffusion).to_json()})


def load(path: str | Path, config: Optional[Config] = None) -> tuple[PatchDenoiser, DiffusionConfig]:
    """The model of a file that `save` wrote, and what it was trained for.

    config: what it has to be; None for any. Raises ValueError for another file, and for one of another configuration.
    """
    tensors, text = read(path, _METADATA, "patch-based DDPM")
    held = _wanted(path, text, config)
    return with_state(partial(PatchDenoiser, held.model), tensors, path), held.diffusion


def import_torch(
    path: str | Path, config: Optional[Config] = None, entry: str = "ema", trust: bool = False
) -> tuple[PatchDenoiser, DiffusionConfig]:
    """The model of a `model-*.pt` of the authors' trainer or of ours, and what it was trained for.

    config: of the training; None takes the one in our files. The authors' files have none: then it is read from the
        shapes what they tell, with the published defaults for the rest: image_size, resnet_block_groups, loss_type and
        objective. entry: `ema`, the averaged weights, or `model`. trust: see `unpickled`.

    Raises ValueError for another file, and for one of another configuration.
    """
    file = opened(path, trust=trust)
    held = _entry(file, path, entry)
    state, betas = without_prefix(held), held.get("betas")
    if betas is None or betas.dim() != 1 or not state:
        raise ValueError(f"{path} is no checkpoint of a patch-based DDPM: it has no betas or no {PREFIX}* weights.")
    if "config" in file:
        config = _wanted(path, str(file["config"]), config)
    if config is None:
        config = Config(_model_of(state, path), configuration(path, DiffusionConfig, len(betas)))
    _check_schedule(betas.float(), config.diffusion, path)
    return with_state(partial(PatchDenoiser, config.model), state, path), config.diffusion


def opened(path: str | Path, mmap: bool = True, trust: bool = False) -> dict[str, Any]:
    """What a `model-*.pt` holds: tensors, numbers and names alone. Raises ValueError for another file.

    mmap: leave on the disk what is not used; training's entries are three times the weights' size. trust: see
        `unpickled`.
    """
    file = unpickled(path, mmap, trust)
    if not isinstance(file, dict):
        raise ValueError(f"{path} is no checkpoint of a training: it holds a {type(file).__name__}.")
    return file


def without_prefix(entry: dict[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's weights, by its own names."""
    return {name[len(PREFIX) :]: value for name, value in entry.items() if str(name).startswith(PREFIX)}


def _wanted(path: str | Path, text: str, config: Optional[Config]) -> Config:
    held = configuration(path, Config.from_json, text)
    difference = None if config is None else held.difference(config)
    if difference is not None:
        raise ValueError(f"{path} holds another configuration than the one given: {difference}. Use the file's own.")
    return held


def _entry(file: dict[str, Any], path: str | Path, name: str) -> dict[str, Tensor]:
    entry = file.get(name)
    if not isinstance(entry, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and is_usable(value) for name, value in entry.items()
    ):
        raise ValueError(f"{path} has no weights called {name!r}: use ema or model of a training's model-*.pt.")
    return entry


def _check_schedule(betas: Tensor, config: DiffusionConfig, path: str | Path) -> None:
    expected = schedule_buffers(config)["betas"]
    if betas.shape != expected.shape:
        raise ValueError(
            f"{path} was trained with {len(betas)} timesteps and the configuration has {len(expected)}: use the same."
        )
    if not torch.allclose(betas, expected, rtol=1e-4):
        raise ValueError(f"{path} was trained with another schedule than the cosine one: only that is known here.")


def _model_of(state: dict[str, Tensor], path: str | Path) -> ModelConfig:
    """The configuration, as far as shapes tell."""
    last_of_level = [name for name in state if "._downsLayers." in name and name.endswith(".1.block2.proj.bias")]
    try:
        first_width, twice_channels, *_ = state["_patched_encoder._init_conv.weight"].shape
        dim, patches = state["_embedding._pos_embedding_layer.0.weight"].shape
        mults = tuple(len(state[name]) // dim for name in last_of_level)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise ValueError(f"{path} is no checkpoint of a patch-based DDPM: its weights have other names.") from None
    divider, channels = math.isqrt(patches), twice_channels // 2
    try:
        return ModelConfig(dim, first_width, dim_mults=mults, channels=channels, patch_divider=divider)
    except ValueError as error:
        raise ValueError(f"{path} does not tell its whole configuration, so give that too: {error}") from None
