"""Operators of the real `comfy_kitchen`, which newer autoencoders of ComfyUI call, in strips: its eager backend runs on
the CPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from comfyui_patchconv.streaming import expect, streamed

from .comparing import TUNINGS, assert_as_eager

kitchen: Any = pytest.importorskip("comfy_kitchen", reason="comfy-kitchen is not installed: pip install comfy-kitchen")
if not hasattr(torch.ops.comfy_kitchen, "group_norm_silu_pad3d"):
    pytest.skip("this comfy-kitchen has no group_norm_silu_pad3d: 0.2.34 or newer has", allow_module_level=True)

HALO = [(1, 1, 1, 1, 2), (0, 1, 0, 1, 2), (2, 0, 3, 1, 0), (0, 0, 0, 0, 0)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pad(x: Tensor, **options: Any) -> Tensor:
    """One whose input is deferred, and whose result is read in strips."""
    return kitchen.group_norm_silu_pad3d(x * 2 - 0.5, **options).mul(3.0)


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("sides", HALO, ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["norm", "pad alone"])
@pytest.mark.parametrize("batch", [1, 2])
def test_norms_and_pads_of_frames(tuning: Any, sides: tuple[int, ...], affine: bool, batch: int) -> None:
    weight, bias = (numbers(16, seed=1), numbers(16, seed=2)) if affine else (None, None)
    run = functools.partial(pad, weight=weight, bias=bias, num_groups=4, eps=1e-6, pad=sides, silu=affine)
    assert_as_eager(run, numbers(batch, 16, 3, 12, 10), tuning=tuning)


@pytest.mark.parametrize("more", [{"zero_pad": True}, {"stats": True}], ids=str)
def test_zeros_around_and_statistics_that_are_given(more: dict[str, Any]) -> None:
    names = {argument.name for argument in torch.ops.comfy_kitchen.group_norm_silu_pad3d.default._schema.arguments}
    if not names >= set(more):
        pytest.skip(f"this comfy-kitchen has no {', '.join(more)}: 0.2.40 has")
    if "stats" in more:
        more = {"stats": torch.stack((numbers(3, 4, seed=3), numbers(3, 4, seed=4).abs()), -1)}
    options = dict(weight=numbers(16, seed=1), bias=None, num_groups=4, pad=(1, 1, 1, 1, 2), silu=True, **more)
    for tuning in TUNINGS.values():
        assert_as_eager(functools.partial(pad, **options), numbers(1, 16, 3, 12, 10), tuning=tuning)


def block(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """A residual block as MiniMax H3's encoder has it."""
    x = x + 1
    padded = kitchen.group_norm_silu_pad3d(x, numbers(16, seed=1), None, 4, 1e-6, (1, 1, 1, 1, 2), silu=True)
    residual = x if stride == 1 else None
    return kitchen.fp16_conv3d(padded, weight, bias, residual, (1, stride, stride)) * 2


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_that_add_a_residual(tuning: Any, stride: int) -> None:
    weight, bias = numbers(16, 16, 3, 3, 3, seed=5) / 20, numbers(16, seed=6)
    assert_as_eager(lambda x: block(x, weight, bias, stride), numbers(1, 16, 3, 12, 10), tuning=tuning)


def test_nothing_is_evaluated_whole_and_an_estimate_knows() -> None:
    weight, bias = numbers(16, 16, 3, 3, 3, seed=5) / 20, numbers(16, seed=6)
    report: dict[str, int] = {}
    run = streamed(lambda x: block(x, weight, bias, 1), report=report, tuning=TUNINGS["few rows"])
    run(numbers(1, 16, 3, 64, 64))
    assert not report
    model = torch.nn.Conv3d(16, 16, 3)
    expected = expect(
        model, lambda copy, make: block(make((1, 16, 5, 512, 512)), copy.weight, copy.bias, 1),
        device=torch.device("cpu"), report=report,
    )  # fmt: skip
    assert not report
    assert expected.in_strips
    assert expected.peak < expected.eager / 2
