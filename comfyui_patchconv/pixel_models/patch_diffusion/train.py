"""Training a Patch Diffusion model on a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...files.atomic import write_whole
from ...files.images import grid, save_image
from ...files.tensors import unpickled
from ..state_dicts import configuration
from ..training.images import ImageFolder
from ..training.loop import Options, Training, add_losses, read_losses
from .checkpoints import save
from .config import Config
from .diffusion import sample
from .loss import Loss
from .model import PatchUNet

if TYPE_CHECKING:
    from accelerate import Accelerator

MODEL, STATE, LOSSES = "model.safetensors", "training.pt", "loss.csv"
"""Files of a training: the averaged weights, which is what is sampled from; all that it goes on from; its losses."""

_PREVIEW_STEPS = "ddim50"


def train(
    images: ImageFolder,
    folder: Path,
    config: Config,
    options: Options,
    loss: Loss,
    accelerator: Accelerator,
    shown: int,
    trust: bool = False,
) -> None:
    """Train a model, or go on with the training that `folder` holds, which is made where it is missing.

    shown: pictures to sample at every checkpoint, as `samples-{step}.png`. trust: what is there to go on from, see
        `unpickled`.

    Raises ValueError for a folder with the training of another configuration.
    """
    torch.manual_seed(options.seed)
    training = Training(PatchUNet(config), options, accelerator)
    folder.mkdir(parents=True, exist_ok=True)
    read_losses(folder / LOSSES)  # what could not be added to is said before any work
    if (folder / STATE).exists():
        _go_on(training, folder / STATE, config, trust)
        accelerator.print(f"{folder}: going on from step {training.step}")

    def keep(losses: list[tuple[int, float]]) -> None:
        state = {**training.state(), "config": config.to_json()}
        save([training.ema], folder / MODEL)
        add_losses(folder / LOSSES, losses)
        write_whole(folder / STATE, lambda file: torch.save(state, file))
        if shown:
            save_image(folder / f"samples-{training.step:08}.png", grid(_samples(training.ema, shown)))

    training.run(images, loss, keep)


def _go_on(training: Training[PatchUNet], path: Path, config: Config, trust: bool) -> None:
    held = unpickled(path, trust=trust)
    if not isinstance(held, dict) or "config" not in held:
        raise ValueError(f"{path} is no training of a Patch Diffusion model: give another folder, or empty it.")
    if configuration(path, Config.from_json, str(held["config"])) != config:
        raise ValueError(
            f"{path.parent} holds the training of another configuration: give another folder, or empty it."
        )
    try:
        training.load_state(held)
    except ValueError as error:
        raise ValueError(f"{path} cannot be gone on from ({error}): give another folder, or empty it.") from error


def _samples(model: PatchUNet, count: int) -> torch.Tensor:
    """The same noise each time, so that pictures of one training can be compared."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, config.image_size, config.image_size, generator=generator)
    device = next(model.parameters()).device
    labels = torch.arange(count, device=device) % config.classes if config.classes else None
    return sample([model], noise.to(device), labels, steps=_PREVIEW_STEPS, ddim=True)
