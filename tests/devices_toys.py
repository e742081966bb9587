"""Functions that worker processes import by this module's name, of networks that they are sent."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Half(nn.Module):
    """A decoder in which there is a norm, and an attribute for what happens where."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.kept = Kept()

    def forward(self, x: Tensor, seen: list[Any] | None = None) -> Tensor:
        self.kept.note()
        if seen is not None:
            seen.append(x.shape[-1])
        y = F.interpolate(F.silu(self.norm(self.first(x))), scale_factor=2.0)
        return self.last(y)


class Drawing(Half):
    def forward(self, x: Tensor, seen: list[Any] | None = None) -> Tensor:
        return super().forward(x + torch.randn(x.shape), seen)


class Kept:
    """Does something in one process or in all others than that which has made it. folder: for a file by each process
    that runs."""

    def __init__(self, how: str = "", folder: Path = Path()) -> None:
        self.how, self.folder, self.home = how, folder, os.getpid()

    def note(self) -> None:
        here = os.getpid() == self.home
        if self.folder != Path():
            with (self.folder / str(os.getpid())).open("a") as file:
                file.write("x")
        if here or not self.how:
            return
        if self.how == "raises":
            raise LookupError("nothing is there")
        if self.how == "runs out":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if self.how == "is killed":
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has one end for all
        if self.how == "hangs" and hasattr(signal, "SIGSTOP"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.how == "hangs":  # Windows stops no process
            time.sleep(10_000)
        if self.how == "is slow":
            time.sleep(1)


def refuse_to_load() -> None:
    """As Automatic1111 does, whose `torch.load` takes files alone."""

    def load(*_: Any, **__: Any) -> Any:
        raise TypeError("expected str, bytes or os.PathLike object, not BytesIO")

    torch.load = load


class EndingSoon:
    """Has a worker that reads it wait for the next question for a moment only."""

    def __reduce__(self) -> Any:
        return end_soon, ()


def end_soon() -> None:
    (worker,) = (module for name, module in sys.modules.items() if name.endswith(".hosts.devices.worker"))
    worker.__dict__["IDLE"] = 0.1


class Unreadable:
    """Cannot be made again from its bytes."""

    def __reduce__(self) -> Any:
        return fail, ()


def fail() -> Any:
    raise LookupError("nothing is there")


def half(seed: int = 0) -> Half:
    torch.manual_seed(seed)
    return Half().requires_grad_(False).eval()


def latent(height: int = 40, width: int = 24) -> Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(1))
