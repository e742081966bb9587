"""Training a patch-based DDPM as its configuration says, with files as the authors' trainer writes them."""

from __future__ import annotations

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from ...files.atomic import copy_whole, write_whole
from ...files.images import grid, levels, save_image
from ...memory.errors import first_line
from ..state_dicts import configuration
from ..training.images import ImageFolder
from ..training.loop import Options, Training, add_losses, begin, read_losses
from .checkpoints import PREFIX, opened, save, without_prefix
from .config import Config, TrainerConfig
from .diffusion import Loss, sample, schedule_buffers
from .model import PatchDenoiser

if TYPE_CHECKING:
    from accelerate import Accelerator

_SHOWN, _PREVIEW_STEPS = 16, 50


def train(config: Config, restart: Optional[int] = None, trust: bool = False) -> None:
    """Train a model, or go on with the training that `trainer.log_dir` holds.

    Writes, at every `save_and_sample_every` steps and at the end, `checkpoints/model-{step}.pt` and `model-last.pt`,
    which both this and the authors' trainer go on from, `checkpoints/model-last.safetensors`, which is what is sampled
    from, `samples/{step}.png` and `loss.csv`.

    restart: the step to go on from; 1 to begin anew; None for the last one that there is. trust: that
        checkpoint; see `unpickled`.

    Raises ValueError without `config.trainer`, for a step without a checkpoint, for one of another configuration, and
    for wandb that is wanted but not installed.
    """
    trainer = config.trainer
    if trainer is None:
        raise ValueError("the configuration has no trainer: add one, with train_dataset_dir and log_dir.")
    folder = Path(trainer.log_dir) / "checkpoints"
    start = _start(folder, restart)
    sides, log_dir = config.model.image_sides, Path(trainer.log_dir)
    images = ImageFolder(trainer.train_dataset_dir, sides, config.model.channels, written=log_dir)
    accelerator = _begin(trainer, config)
    accelerator.print(f"{len(images)} images")
    torch.manual_seed(trainer.seed)
    training = Training(PatchDenoiser(config.model), _options(trainer, accelerator.num_processes), accelerator)
    if start is not None:
        _go_on(training, start, config, trust)
        accelerator.print(f"{start}: going on from step {training.step}")
    if accelerator.is_main_process:
        _forget_later(folder, start)
        read_losses(log_dir / "loss.csv")  # what could not be added to is said before any work
    training.run(images, Loss(config.diffusion), partial(_keep, training, config, folder, accelerator.trackers))
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
    options: dict[str, Any] = {"name": trainer.wandb_name, "dir": trainer.log_dir}
    Path(trainer.log_dir).mkdir(parents=True, exist_ok=True)
    values = json.loads(config.to_json())
    accelerator.init_trackers(trainer.wandb_project or "patch-based-ddpm", values, {"wandb": options})
    return accelerator


def _options(trainer: TrainerConfig, processes: int) -> Options:
    batch = trainer.train_batch_size
    if batch % processes:
        raise ValueError(f"trainer.train_batch_size is {batch} and {processes} processes share it: use a multiple.")
    return Options(
        steps=trainer.train_num_steps,
        batch=batch // processes,
        accumulate=trainer.gradient_accumulate_every,
        learning_rate=trainer.train_lr,
        betas=(0.9, 0.999),
        ema_decay=trainer.ema_decay,
        ema_every=trainer.update_ema_every,
        ema_start=trainer.step_start_ema,
        every=trainer.save_and_sample_every,
        seed=trainer.seed,
        workers=trainer.num_workers,
    )


def _go_on(training: Training[PatchDenoiser], path: Path, config: Config, trust: bool) -> None:
    state = opened(path, mmap=False, trust=trust)
    other = f"{path} is a training of another configuration: {{}}. Give another log_dir, or begin anew with step 1."
    difference = None
    if "config" in state:
        difference = configuration(path, Config.from_json, str(state["config"])).difference(config)
    if difference is not None:
        raise ValueError(other.format(difference))
    try:
        for name in ("model", "ema"):
            state[name] = without_prefix(state[name])
        training.load_state(state)
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(other.format(first_line(error))) from error


def _forget_later(folder: Path, start: Optional[Path]) -> None:
    """Let the last checkpoint be the one that this training goes on from, or none."""
    last = folder / "model-last.pt"
    if start is None:
        for path in (last, folder.parent / "loss.csv"):
            path.unlink(missing_ok=True)
    elif start != last:
        copy_whole(start, last)


def _keep(
    training: Training[PatchDenoiser],
    config: Config,
    folder: Path,
    trackers: list[Any],
    losses: list[tuple[int, float]],
) -> None:
    """Write the files of a step; `folder` is that of the checkpoints."""
    for each in (folder, folder.parent / "samples"):
        each.mkdir(parents=True, exist_ok=True)
    state, buffers = training.state(), schedule_buffers(config.diffusion)
    for name in ("model", "ema"):
        state[name] = {**buffers, **{PREFIX + key: value for key, value in state[name].items()}}
    state["config"] = Config(config.model, config.diffusion).to_json()
    numbered = folder / f"model-{training.step}.pt"
    add_losses(folder.parent / "loss.csv", losses)
    write_whole(numbered, lambda file: torch.save(state, file))
    save(training.ema, config.diffusion, folder / "model-last.safetensors")
    pictures = grid(_samples(training.ema, config))
    save_image(folder.parent / "samples" / f"{training.step:08}.png", pictures)
    for tracker in trackers:
        tracker.log_images({"sample": [levels(pictures).numpy()]}, step=training.step)
    # last: a training that is killed before writes the others again
    copy_whole(numbered, folder / "model-last.pt")


def _samples(model: PatchDenoiser, config: Config) -> Tensor:
    """Images in -1..1, from the same noise each time, so that pictures of one training can be compared."""
    shape = (_SHOWN, config.model.channels, *config.model.image_sides)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).device)
    steps = min(_PREVIEW_STEPS, config.diffusion.timesteps)
    return sample(model, config.diffusion, noise, steps=steps, sampler="ddim") * 2 - 1
