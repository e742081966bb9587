"""The toggle in half precision, where rounding differs between two ways to compute the same.

Slow: few CPUs have arithmetic in float16, and these take minutes for a picture of 64 pixels.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from .conftest import A1111, MODES, Result, WebUI, host_of, python, serve

pytestmark = pytest.mark.slow


def run(webui: WebUI, settings: Any = None) -> Result:
    return webui.run(width=64, height=64, patch_conv=settings)


@pytest.fixture(scope="module")
def exact(checkout: Path, checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The picture in float32."""
    with serve(checkout, checkpoint, tmp_path_factory.mktemp("exact")) as webui:
        return run(webui).images[0].astype(int)


@pytest.fixture(scope="module", params=["half", "mixed", "bfloat16"])
def half_webui(
    request: pytest.FixtureRequest,
    exact: np.ndarray,
    checkout: Path,
    checkpoint: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[WebUI]:
    """In half precision, or with a VAE that is not, or in bfloat16; after `exact`, for want of memory for two."""
    host = host_of(checkout)
    flags = getattr(host, request.param)
    if not flags:
        pytest.skip(f"{host.name} has no flags for {request.param}")
    code = "import torch; torch.nn.Conv2d(1, 1, 1).half()(torch.ones(1, 1, 1, 1).half())"
    if not torch.cuda.is_available() and subprocess.run([python(), "-c", code], capture_output=True).returncode:
        pytest.skip(f"the torch of {python()} has no convolution in half precision on the CPU, and there is no GPU")
    if request.param == "mixed" and host is A1111 and not torch.cuda.is_available():
        pytest.skip(
            "Automatic1111 takes --no-half-vae in mixed precision only, for which it asks CUDA, and there is none"
        )
    with serve(checkout, checkpoint, tmp_path_factory.mktemp(request.param), flags) as webui:
        run(webui)  # what the WebUI puts on a model itself is there from the first run on
        yield webui


@MODES
def test_no_farther_from_full_precision(
    half_webui: WebUI, exact: np.ndarray, settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    before = half_webui.get("/probe/now")
    eager = run(half_webui).images[0].astype(int)
    result = run(half_webui, settings)
    picture = result.images[0].astype(int)
    ours, theirs, apart = (np.abs(one - other) for one, other in ((picture, exact), (eager, exact), (picture, eager)))
    print(f"from float32: mean {ours.mean():.4f}, largest {ours.max()}; eager {theirs.mean():.4f}, {theirs.max()}")
    print(f"from eager: largest {apart.max()}, values that differ {(apart > 0).mean():.2e}")
    mixed = request.node.callspec.params["half_webui"] == "mixed"
    # Forge and reForge compute with a U-Net's weights of half precision in float32 where there is no GPU.
    in_full = mixed and half_webui.host is not A1111 and not torch.cuda.is_available()
    assert theirs.any() != in_full
    assert apart.max() <= 1 or (ours.mean() <= 1.05 * theirs.mean() and ours.max() <= 1.05 * theirs.max())
    assert "U-Net in up to 3 strips" in result.log
    assert half_webui.get("/probe/now") == before
    assert np.array_equal(run(half_webui).images[0], eager)
