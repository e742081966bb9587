"""Training a patch-based DDPM as its configuration says, with files as the authors' trainer writes them."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from .. import files
from ..training.images import ImageFolder
from ..training.loop import Options, Training, add_losses, begin, write_whole
from .checkpoints import PREFIX, save
from .config import Config, TrainerConfig
from .diffusion import Loss, sample, schedule_buffers
from .model import PatchDenoiser

if TYPE_CHECKING:
    from accelerate import Accelerator

_SHOWN, _PREVIEW_STEPS = 16, 50


def train(config: Config, restart: Optional[int] = None) -> None:
    """Train a model, or go on with the training that `trainer.log_dir` holds.

    Writes, at every `save_and_sample_every` steps and at the end, `checkpoints/model-{step}.pt` and `model-last.pt`,
    which both this and the authors' trainer go on from, `checkpoints/model-last.safetensors`, which is what is sampled
    from, `samples/{step}.png` and `loss.csv`.

    restart: the step to go on from; 1 to begin anew; None for the last one that there is.

    Raises ValueError without `config.trainer`, for a step without a checkpoint, for one of another configuration, and
    for wandb that is wanted but not installed.
    """
    trainer = config.trainer
    if trainer is None:
        raise ValueError("the configuration has no trainer: add one, with train_dataset_dir and log_dir.")
    folder = Path(trainer.log_dir) / "checkpoints"
    start = _start(folder, restart)
    images = ImageFolder(trainer.train_dataset_dir, config.model.image_sides, config.model.channels)
    accelerator = _begin(trainer, config)
    accelerator.print(f"{len(images)} images")
    torch.manual_seed(trainer.seed)
    training = Training(PatchDenoiser(config.model), _options(trainer), accelerator)
    buffers = schedule_buffers(config.diffusion)
    if start is not None:
        _go_on(training, start, config)
        accelerator.print(f"{start}: going on from step {training.step}")

    def keep(losses: list[tuple[int, float]]) -> None:
        for each in (folder, folder.parent / "samples"):
            each.mkdir(parents=True, exist_ok=True)
        state = training.state()
        for name in ("model", "ema"):
            state[name] = {**buffers, **{PREFIX + key: value for key, value in state[name].items()}}
        state["config"] = _trained(config)
        numbered = folder / f"model-{training.step}.pt"
        add_losses(folder.parent / "loss.csv", losses)
        write_whole(numbered, lambda path: torch.save(state, path))
        write_whole(folder / "model-last.safetensors", lambda path: save(training.ema, config.diffusion, path))
        write_whole(folder / "model-last.pt", lambda path: shutil.copyfile(numbered, path))
        pictures = files.grid(_samples(training.ema, config))
        files.save_image(folder.parent / "samples" / f"{training.step:08}.png", pictures)

    training.run(images, Loss(config.diffusion), keep)
    accelerator.end_training()


def _start(folder: Path, restart: Optional[int]) -> Optional[Path]:
    if restart is not None and restart < 2:
        return None
    path = folder / f"model-{'last' if restart is None else restart}.pt"
    if not path.exists() and restart is not None:
        raise ValueError(f"there is no {path}: go on from a step that was saved, or from 1.")
    return path if path.exists() else None


def _begin(trainer: TrainerConfig, config: Config) -> Accelerator:
    precision = "no" if not trainer.use_amp else "fp16" if torch.cuda.is_available() else "bf16"
    if not trainer.wandb_enabled:
        return begin(precision)
    if find_spec("wandb") is None:  # accelerate would say nothing
        raise ValueError("trainer.wandb_enabled is true and wandb is missing: run pip install wandb, or make it false.")
    accelerator = begin(precision, tracker="wandb")
    named = {"wandb": {"name": trainer.wandb_name}} if trainer.wandb_name else {}
    accelerator.init_trackers(trainer.wandb_project or "patch-based-ddpm", {"config": config.to_json()}, named)
    return accelerator


def _options(trainer: TrainerConfig) -> Options:
    return Options(
        steps=trainer.train_num_steps,
        batch=trainer.train_batch_size,
        accumulate=trainer.gradient_accumulate_every,
        learning_rate=trainer.train_lr,
        ema_decay=trainer.ema_decay,
        ema_every=trainer.update_ema_every,
        ema_start=trainer.step_start_ema,
        every=trainer.save_and_sample_every,
        seed=trainer.seed,
        workers=trainer.num_workers,
    )


def _trained(config: Config) -> str:
    """What a training cannot change on its way."""
    return Config(config.model, config.diffusion).to_json()


def _go_on(training: Training[PatchDenoiser], path: Path, config: Config) -> None:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    other = f"{path} is a training of another configuration: give another log_dir, or begin anew with step 1."
    if state.get("config", _trained(config)) != _trained(config):
        raise ValueError(other)
    for name in ("model", "ema"):
        state[name] = _weights(state[name])
    try:
        training.load_state(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(other) from error


def _weights(entry: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): value for name, value in entry.items() if name.startswith(PREFIX)}


def _samples(model: PatchDenoiser, config: Config) -> Tensor:
    """In -1..1; from the same noise each time, so that pictures of one training can be compared."""
    shape = (_SHOWN, config.model.channels, *config.model.image_sides)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).device)
    steps = min(_PREVIEW_STEPS, config.diffusion.timesteps)
    return sample(model, config.diffusion, noise, steps=steps, sampler="ddim") * 2 - 1
