"""The device that these tests run on: CUDA, or with `--device cpu` the CPU, so that they cannot rot without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are of CUDA."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """What `--device` names; the test is skipped where there is none."""
    name = str(request.config.getoption("--device"))
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is here; pytest tests/on_cuda --device cpu runs what a CPU can of these tests")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """The same, for what a CPU has not."""
    if device.type != "cuda":
        pytest.skip("a CPU has no streams, no allocator of CUDA's and nothing to wait for")
    return device


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Products in float32 as they are written: no TF32, which has 10 bits. Afterwards no memory is kept."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
