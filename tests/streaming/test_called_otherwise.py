"""Operators in ways that programs rarely call them, which mean something else there, give what eager gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from comfyui_patchconv.streaming import streamed

from .comparing import MODES, ONE_ROW, Mode, assert_alike, assert_as_eager

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(2, 4, 11, 6, generator=GENERATOR)
WEIGHT = torch.randn(4, 4, 3, 3, generator=GENERATOR) / 6
SCALE, SHIFT, MEAN, VARIANCE = (torch.rand(4, generator=GENERATOR) + 0.5 for _ in range(4))
MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def c(x: Tensor) -> Tensor:
    return F.conv2d(x, WEIGHT.to(x.dtype), padding=1)


SUMS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16, torch.float64, torch.complex64)


@MODE
@pytest.mark.parametrize("dtype", SUMS, ids=str)
def test_a_sum_in_another_type(dtype: torch.dtype, mode: Mode) -> None:
    """Of whole numbers: what is added is cut off first, each by itself."""

    def run(x: Tensor) -> list[Tensor]:
        maps = (4 * c(x)).abs(), (4 * c(x)).to(torch.int8)
        return [one.sum(dims, dtype=dtype) for one in maps for dims in ((2, 3), (2,), (1, 2), (0, 1, 2, 3))]

    assert_as_eager(run, X, tuning=ONE_ROW, mode=mode)
    assert_as_eager(lambda x: torch.complex(c(x), x).sum((2, 3)), X, tuning=ONE_ROW, mode=mode)


NATIVE: dict[str, Callable[[Tensor], Any]] = {
    "layer norm": lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[0],
    "layer norm and all": lambda x: torch.native_layer_norm(x, (11, 6), None, None, 1e-5),
    "group norm": lambda x: torch.native_group_norm(x, SCALE, SHIFT, 2, 4, 66, 2, 1e-5)[0],
    "batch norm": lambda x: torch.native_batch_norm(x, SCALE, SHIFT, MEAN, VARIANCE, False, 0.1, 1e-5)[0],
}


@MODE
@pytest.mark.parametrize("name", NATIVE)
def test_a_norm_by_the_name_that_pytorch_has_for_it_itself(name: str, mode: Mode) -> None:
    assert_as_eager(lambda x: c(NATIVE[name](c(x))[0] if "all" in name else NATIVE[name](c(x))), X, mode=mode)


MADE: dict[str, Callable[[Tensor], Any]] = {
    "new": lambda y: y.new(2, 3).zero_(),
    "new, none": lambda y: y.new(),
    "new, of numbers": lambda y: y.new([1.0, 2.0]).add_(1),
    "new, of another": lambda y: y.new(torch.ones(3)).add_(1),
    "new_tensor": lambda y: y.new_tensor([1.0, 2.0]).mul_(2),
    "new_tensor, of another": lambda y: y.new_tensor(torch.ones(3)).mul_(2),
    "new_zeros": lambda y: y.new_zeros(3).add_(1),
    "type": lambda y: y.type("torch.DoubleTensor").add_(1),
    "cross-map": lambda y: torch.nn.CrossMapLRN2d(2)(y),
}


@MODE
@pytest.mark.parametrize("name", MADE)
def test_what_is_made_after_the_looks_of_a_map_may_be_written_to(name: str, mode: Mode) -> None:
    """And is of the caller's mode, which decides what it may be used for later."""

    def run(x: Tensor) -> Any:
        y = c(x)
        made = MADE[name](y)
        return made, c(y) + made.sum()

    with mode():
        expected, actual = run(X), streamed(run, tuning=ONE_ROW)(X)
        assert_alike(actual, expected)
        assert [one.is_inference() for one in actual] == [one.is_inference() for one in expected]


@MODE
@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_convolution_of_a_map_that_is_narrower_than_its_kernel(width: int, mode: Mode) -> None:
    x = torch.randn(1, 4, 11, width, generator=GENERATOR).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4, 4, 3, 6, generator=GENERATOR)
    assert_as_eager(lambda x: F.conv2d(c(x), weight, padding="same"), x, tuning=ONE_ROW, mode=mode)
    assert_as_eager(lambda x: F.conv2d(c(x), weight[..., :2, :2], padding="same"), x, tuning=ONE_ROW, mode=mode)
