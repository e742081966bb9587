"""Lets the tests import their helpers and an uninstalled package, and keeps them quick and steady on a busy machine."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from processes import Ready  # noqa: E402

with suppress(ImportError):  # tests/on_cuda does without, on a machine that has little but PyTorch
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "patchconv", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("patchconv")
torch.set_num_threads(1)  # small tensors, and several test processes at a time
if not torch.cuda.is_available():  # Triton looks at it when it is imported, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--device`, of the tests in `cuda/`."""
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="of the tests of tests/on_cuda")


SHARED = {"answers", "ranks", "ready"}
"""Fixtures that start processes, which serve all tests that ask for them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Such tests come first: of several processes of pytest-xdist only the first starts them, for none of them is left
    to be taken by another."""
    items.sort(key=lambda item: SHARED.isdisjoint(getattr(item, "fixturenames", ())))


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays: nobody who looks for garbage need go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def ready() -> Iterator[Ready]:
    """What runs the command line in processes that need not import it first."""
    ready = Ready()
    yield ready
    ready.stop()


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A folder in which no file can be made, by root neither."""
    folder = tmp_path / "unwritable"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        folder = Path("/proc")
    if not os.path.isdir(folder):
        pytest.skip("this user, or this system, can write to any folder")
    return folder
