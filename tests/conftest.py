"""Lets the tests import their helpers and an uninstalled package, and keeps them quick and steady on a busy machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from processes import Ready  # noqa: E402

settings.register_profile("patchconv", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patchconv")
torch.set_num_threads(1)  # small tensors, and several test processes at a time


@pytest.fixture(scope="session")
def ready() -> Iterator[Ready]:
    """What runs the command line in processes that need not import it first."""
    ready = Ready()
    yield ready
    ready.stop()
