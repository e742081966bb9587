"""Norms of maps that hardly vary: what is subtracted is the mean, not a product that is rounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comfyui_patchconv.streaming import Tuning, streamed

ONE_ROW = Tuning(strip_bytes=1, allocator_bytes=0, always=True)
WEIGHT, BIAS = torch.tensor([1.5, -0.3, 40.0, 0.0]), torch.tensor([0.25, 0.0, -3.0, 7.0])

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "one group": lambda x: F.group_norm(x * 1, 1),
    "groups": lambda x: F.group_norm(x * 1, 2, WEIGHT.to(x.dtype), BIAS.to(x.dtype)),
    "instances": lambda x: F.instance_norm(x * 1, weight=WEIGHT.to(x.dtype), bias=BIAS.to(x.dtype)),
}


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max())


@pytest.mark.parametrize("value", [0.0, 1.1, 1000.1, -100000.3])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["usual", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_a_flat_map_becomes_the_bias(norm: str, dtype: torch.dtype, order: torch.memory_format, value: float) -> None:
    x = torch.full((2, 4, 24, 16), value).to(dtype).contiguous(memory_format=order)
    with torch.no_grad():
        exact = NORMS[norm](x.double())
        result, eager = streamed(NORMS[norm], tuning=ONE_ROW)(x), NORMS[norm](x)
    assert result.dtype == dtype
    assert error(result, exact) <= error(eager, exact) + 1e-7


@pytest.mark.parametrize("spread", [1e-3, 1e-1, 1.0])
@pytest.mark.parametrize("value", [1.1, 1000.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_a_map_that_hardly_varies_is_as_near_as_eagers(
    norm: str, dtype: torch.dtype, value: float, spread: float
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 4, 24, 16) * spread + value).to(dtype)
    with torch.no_grad():
        exact = NORMS[norm](x.double())
        result, eager = streamed(NORMS[norm], tuning=ONE_ROW)(x), NORMS[norm](x)
    assert error(result, exact) <= 1.05 * error(eager, exact) + 1e-6
