"""One call over worker processes: the same result, weights that are sent once, and whatever ends one of them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from devices_toys import Drawing, Kept, half, latent
from processes import environment
from torch import nn

from comfyui_patchconv.hosts.devices import spread as spreading
from comfyui_patchconv.hosts.devices.packing import CannotSendError, packed, unpacked
from comfyui_patchconv.hosts.devices.spread import Outcome, Spread, end_all, others_than
from comfyui_patchconv.hosts.devices.team import Team
from comfyui_patchconv.hosts.streamed import StreamedForward
from comfyui_patchconv.streaming import Tuning

CPU = torch.device("cpu")
SECONDS = 20.0
ALWAYS = Tuning(strip_bytes=1, always=True, silent_seconds=SECONDS, allocator_bytes=0)


class Run:
    """A stand-in for a network's `forward` that spreads, and what it has told."""

    def __init__(self, network: nn.Module, wanted: str = "all", seconds: float = SECONDS, **options: Any) -> None:
        self.outcomes: list[Outcome] = []
        spread = Spread(
            wanted, look=options.pop("look", lambda: None), on_outcome=self.outcomes.append, seconds=seconds
        )
        forward = type(network).forward.__get__(network)
        tuning = ALWAYS if seconds == SECONDS else Tuning(1, 0, True, silent_seconds=seconds)
        self.stand_in = StreamedForward(forward, 0, lambda _: 1 << 30, tuning=tuning, spread=spread, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.stand_in.start()
        with torch.inference_mode():
            return self.stand_in(*args, **kwargs)


@pytest.fixture(autouse=True)
def workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(spreading.WORKERS, "2")


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    running = pids()
    end_all()
    assert running
    assert not any(is_there(pid) for pid in running)


def pids() -> list[int]:
    return [pid for team in spreading._teams.values() for pid in team.processes]


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert float((one - other).abs().max()) <= 1e-5 * float(other.max() - other.min())


@pytest.mark.parametrize(("wanted", "over"), [("all", "3 processes"), ("2", "2 processes"), ("8", "3 processes")])
def test_the_same_picture(wanted: str, over: str) -> None:
    network, z = half(), latent()
    run = Run(network, wanted)
    made = run(z)
    assert run.outcomes == [Outcome(over)]
    assert_same(made, network(z))


def test_workers_and_weights_stay_until_weights_change(tmp_path: Path) -> None:
    network, z = half(), latent()
    run = Run(network)
    run(z)
    before, (team,) = pids(), {team for team in spreading._teams.values() if team.processes == pids()}
    held = [worker.held for worker in team._workers]
    run(z)
    assert pids() == before
    assert [worker.held for worker in team._workers] == held
    network.last.weight.mul_(2)
    assert_same(run(z), network(z))
    assert [worker.held for worker in team._workers] != held
    other = half(7)
    for one in (other, network, half(8), other):
        assert_same(Run(one)(z), one(z))
    assert pids() == before


def test_lists_and_random_numbers() -> None:
    """What a call puts into a list is there once, and random numbers are those of one process."""
    network, z = half(), latent()
    seen: list[Any] = []
    Run(network)(z, seen)
    assert seen == [24]
    drawing = Drawing().requires_grad_(False)
    torch.manual_seed(3)
    expected = drawing(z)
    torch.manual_seed(3)
    run = Run(drawing)
    assert_same(run(z), expected)
    assert run.outcomes == [Outcome("3 processes")]
