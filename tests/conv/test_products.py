"""Convolutions with fewer multiplications: three rows by six products, and upsampled maps by nine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from comfyui_patchconv.conv import doubled, winograd

CONVOLVE: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual - exact).square().mean().sqrt() / exact.std())


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("biased", [True, False])
def test_nine_products_are_about_as_close_to_float64_as_eager(order: torch.memory_format, biased: bool) -> None:
    torch.manual_seed(0)
    map, weight = torch.randn(2, 48, 11, 7), torch.randn(40, 48, 3, 3)
    bias = torch.randn(40) if biased else None
    large = F.interpolate(map, scale_factor=2.0, mode="nearest")
    exact = F.conv2d(large.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    eager = F.conv2d(large, weight, bias, padding=1)
    rows = F.pad(map, (0, 0, 1, 1)).contiguous(memory_format=order)
    actual = doubled.convolve(rows, doubled.kernels(weight), bias)
    assert actual.is_contiguous(memory_format=order)
    assert error(actual, exact) <= 1.5 * error(eager, exact)  # 0.9 to 1.07 of it, as the processor has it


def test_nine_products_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    map, kernels = torch.randn(1, 8, 11, 5), doubled.kernels(torch.randn(8, 8, 3, 3))
    whole = doubled.convolve(map, kernels, None)
    monkeypatch.setattr(doubled, "_BLOCK_BYTES", 4 * 8 * 10 * 2 * 2)  # two rows
    torch.testing.assert_close(doubled.convolve(map, kernels, None), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sides", [1, 2, 3])
@pytest.mark.parametrize("biased", [True, False])
def test_six_products_make_four_rows(sides: int, biased: bool) -> None:
    torch.manual_seed(0)
    for dim in range(2, sides + 2):
        shape = [5] * sides
        shape[dim - 2] = 14
        map, weight = torch.randn(2, 64, *shape), torch.randn(64, 64, *[3] * sides) / 24
        bias = torch.randn(64) if biased else None
        padding = [int(side != dim - 2) for side in range(sides)]

        def by(map: torch.Tensor, kernel: torch.Tensor, bias: Any, padding: Any = padding) -> torch.Tensor:
            return CONVOLVE[sides](map, kernel, bias, padding=padding)

        exact = by(map.double(), weight.double(), None if bias is None else bias.double())
        actual = winograd.convolve(map, winograd.kernels(weight, dim), bias, dim, by)
        assert actual.shape == exact.shape
        assert error(actual, exact) < 1e-6


def test_six_products_round_about_as_eager_does() -> None:
    torch.manual_seed(0)
    map, weight = torch.randn(1, 256, 34, 16) + 0.3, torch.randn(64, 256, 3, 3) / 48
    exact = F.conv2d(map.double(), weight.double(), padding=(0, 1))
    kernels = winograd.kernels(weight, 2)
    for order in (torch.contiguous_format, torch.channels_last):
        actual = winograd.convolve(
            map.contiguous(memory_format=order), kernels, None, 2, lambda x, k, b: F.conv2d(x, k, b, padding=(0, 1))
        )
        assert actual.is_contiguous(memory_format=order)
        rows = [error(actual[:, :, row :: winograd.ROWS], exact[:, :, row :: winograd.ROWS]) for row in range(4)]
        assert max(rows) < 2e-6


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC", True),
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC 9755", False),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R)", False),
        ("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", False),
        ("", False),
    ],
)
def test_zen_4_is_known_by_what_the_system_says(processor: str, expected: bool) -> None:
    assert winograd.is_zen_4(processor) is expected


def test_fewer_channels_pay_off_where_multiplying_is_not_twice_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        for zen_4 in (False, True):
            monkeypatch.setattr(winograd, "is_zen_4", lambda _, zen_4=zen_4: zen_4)
            found[capability, zen_4] = winograd.least_channels.__wrapped__()
    assert found == {("AVX2", False): 64, ("AVX2", True): 64, ("AVX512", False): 512, ("AVX512", True): 64}
