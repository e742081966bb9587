"""Small networks on a device, how near results are, and what a device has in use."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from gpu.networks import Autoencoder

from comfyui_patchconv.streaming import Tuning

SMALL = Tuning(strip_bytes=50_000, always=True)
"""Small maps come in several strips, too."""

HALVES = (torch.float16, torch.bfloat16)


def vae(device: torch.device, dtype: torch.dtype = torch.float32, widths: Any = (8, 8, 16, 16)) -> Autoencoder:
    """Stable Diffusion's VAE in small, with the same weights on every device."""
    torch.manual_seed(0)
    model = Autoencoder(4, widths, 1, 4)
    return model.to(device, dtype).eval().requires_grad_(False)


def drawn(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """The same values on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def apart(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference, of the range of `exact`."""
    difference, span = result.double() - exact, float(exact.max() - exact.min())
    return float(difference.abs().max()) / span, float(difference.square().mean().sqrt()) / span


def assert_near(result: Tensor, eager: Tensor, exact: Tensor) -> None:
    """In float32 within 1e-5 of the range of `exact`, or no farther than eager is; else no farther than eager is."""
    assert (result.shape, result.dtype, result.device) == (eager.shape, eager.dtype, eager.device)
    ours, theirs = apart(result, exact), apart(eager, exact)
    if result.dtype == torch.float32:
        assert ours[0] <= max(1e-5, 1.5 * theirs[0]), f"{ours[0]:.1e} of the range; eager is off by {theirs[0]:.1e}"
    else:
        assert 0 < ours[1] <= 1.05 * theirs[1], f"{ours[1]:.2e} of the range; eager is off by {theirs[1]:.2e}"


def exactly(model: nn.Module, run: Callable[[Any, Tensor], Tensor], input: Tensor) -> Tensor:
    """What `run(model, input)` is in float64; the model is as it was before, bit by bit."""
    dtype = input.dtype
    try:
        return run(model.double(), input.double())
    finally:
        model.to(dtype)


def in_use(device: torch.device) -> int:
    """Bytes of the device's tensors that are alive; 0 on a CPU, which does not count them."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)
