"""A training loop that can be killed at any moment, and goes on from its last checkpoint bit for bit.

What a step draws, images, noise and dropout, is seeded by its number: a checkpoint needs no state of generators.
"""

from __future__ import annotations

import copy
import csv
import io
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Optional, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...files.atomic import write_whole
from ...memory.errors import first_line, is_out_of_memory
from ...terminal import watched
from .images import Batches, ImageFolder, derived_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

Model = TypeVar("Model", bound=nn.Module)

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Gives what to make smaller, a scalar, of a model, images `[N, C, H, W]` in 0..1 and their classes `[N]`."""

_REPORT = 50  # steps between two losses that are read back, which waits for the device

_LARGEST_RATE = 1e30
"""Beyond that Adam's numbers are none of float32; training ends in NaN long before."""


@dataclass(frozen=True)
class Options:
    """How to train.

    steps: in all. batch: images of a step, on each device. accumulate: how many such batches a step adds up.
    learning_rate: of Adam, reached from 0 in `warm_up` steps. betas: of Adam.
    ema_decay: what the averaged weights keep of themselves every `ema_every` steps, from step `ema_start` on; until
        then they are the trained ones. clip: the largest norm of a step's gradient.
    every: steps between two checkpoints. workers: processes that read images. mirror: images, by chance.
    """

    steps: int = 100_000
    batch: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    warm_up: int = 0
    clip: float = math.inf
    ema_decay: float = 0.995
    ema_every: int = 10
    ema_start: int = 0
    every: int = 1000
    seed: int = 0
    workers: int = 0
    mirror: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "ema_every", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use 1 or more.")
        if not 0 < self.learning_rate < _LARGEST_RATE:
            raise ValueError(f"the learning rate is {self.learning_rate}: use a number above 0, such as 1e-4.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"the betas of Adam are {self.betas}: use 0 to below 1.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"the decay of the averaged weights is {self.ema_decay}: use 0 to below 1.")


class Training(Generic[Model]):
    """A model under training: `model`, `ema` (a copy with averaged weights), `optimizer`, and `step`, steps done."""

    def __init__(self, model: Model, options: Options, accelerator: Accelerator) -> None:
        self.options, self.accelerator = options, accelerator
        self.model, self.ema = model, copy.deepcopy(model).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(model.parameters(), options.learning_rate, options.betas)
        self.step = 0
        self._wrapped, self._stepping = accelerator.prepare(model, self.optimizer)
        self.ema.to(accelerator.device)

    def state(self) -> dict[str, Any]:
        """What `load_state` goes on from; of tensors, numbers and names alone."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "opt": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for the state of another model, or of none."""
        try:
            self._load_state(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(first_line(error)) from error

    def _load_state(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["opt"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def run(self, images: ImageFolder, loss: Loss, keep: Callable[[list[tuple[int, float]]], None]) -> None:
        """Train to the end of the steps.

        keep: called every `every` steps and at the end, in the main process alone, with the steps and mean losses
            since its last call: the place to write a checkpoint.

        Raises ValueError when a loss is no number any more, and for an image that cannot be read.
        """
        options, accelerator = self.options, self.accelerator
        first = self.step * options.accumulate
        order = Batches(
            len(images),
            options.batch,
            options.seed,
            first,
            accelerator.process_index,
            accelerator.num_processes,
            options.mirror,
        )
        loader: Any = DataLoader(images, batch_sampler=order, num_workers=options.workers)
        batches, losses, mean = iter(loader), [], _Mean()
        with self._bar() as bar:
            while self.step < options.steps:
                mean.add(self._one_step(batches, loss))
                self.step += 1
                keeps = self.step % options.every == 0 or self.step == options.steps
                if keeps or self.step % _REPORT == 0:
                    losses.append((self.step, self._checked(mean.take(accelerator))))
                    accelerator.log({"loss": losses[-1][1]}, step=self.step)
                    bar.set_postfix(loss=f"{losses[-1][1]:.4g}")
                bar.update()
                if keeps and bar.disable:
                    accelerator.print(f"step {self.step} of {options.steps}: loss {losses[-1][1]:.4g}", flush=True)
                if keeps:
                    if accelerator.is_main_process:
                        keep(losses)
                    losses = []
                    accelerator.wait_for_everyone()

    def _one_step(self, batches: Any, loss: Loss) -> Tensor:
        options, accelerator = self.options, self.accelerator
        rate = options.learning_rate * min(1, (self.step + 1) / max(options.warm_up, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        total = torch.zeros((), device=accelerator.device)
        for number in range(options.accumulate):
            images, labels = (part.to(accelerator.device) for part in _next(batches))
            torch.manual_seed(derived_seed(options.seed, self.step, number, accelerator.process_index))
            last = number + 1 == options.accumulate
            with nullcontext() if last else accelerator.no_sync(self._wrapped):
                found = loss(self._wrapped, images, labels) / options.accumulate
                accelerator.backward(found)
            total += found.detach()
        if options.clip < math.inf:
            accelerator.clip_grad_norm_(self.model.parameters(), options.clip)
        self._stepping.step()
        self._stepping.zero_grad()
        self._average()
        return total

    @torch.no_grad()
    def _average(self) -> None:
        done, options = self.step + 1, self.options
        if done % options.ema_every:
            return
        keep = options.ema_decay if done > options.ema_start else 0.0
        for averaged, trained in zip(self.ema.parameters(), self.model.parameters()):
            averaged.lerp_(trained, 1 - keep)

    def _checked(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.step}: use a smaller learning rate, or float32.")
        return loss

    def _bar(self) -> Any:
        from tqdm import tqdm

        shown = self.accelerator.is_main_process and watched()
        return tqdm(total=self.options.steps, initial=self.step, unit="step", disable=not shown)


def _next(batches: Iterator[Any]) -> Any:
    try:
        return next(batches)
    except (ValueError, OSError) as error:  # a worker puts its whole traceback before the sentence
        kind, last = type(error), str(error).strip().splitlines()[-1]
        raise kind(last.removeprefix(f"{kind.__name__}: ")) from error


class _Mean:
    """A mean of numbers that stay on the device."""

    def __init__(self) -> None:
        self.total: Optional[Tensor] = None
        self.count = 0

    def add(self, value: Tensor) -> None:
        self.total = value if self.total is None else self.total + value
        self.count += 1

    def take(self, accelerator: Accelerator) -> float:
        """The mean so far, over all processes; the next one begins."""
        assert self.total is not None
        mean = cast(Tensor, accelerator.reduce(self.total / self.count, "mean")).item()
        self.total, self.count = None, 0
        return mean


def begin(mixed_precision: str = "no", tracker: Optional[str] = None) -> Accelerator:
    """The devices of this process, as `accelerate launch` or the machine has them. tracker: such as "wandb"."""
    from accelerate import Accelerator

    return Accelerator(mixed_precision=mixed_precision, log_with=tracker)


def add_losses(path: Path, losses: list[tuple[int, float]]) -> None:
    """Go on with a table of steps and losses; what it holds from the first of these steps on gives way."""
    rows = [row for row in read_losses(path) if row[0] < losses[0][0]] + losses

    text = io.StringIO(newline="")
    csv.writer(text).writerows([("step", "loss"), *rows])
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def read_losses(path: Path) -> list[tuple[int, float]]:
    """The steps and losses of a table that `add_losses` wrote; none without a file. Raises ValueError for another."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no table of steps and losses, which goes there: move it away.") from None
