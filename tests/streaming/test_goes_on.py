"""Streaming goes on behind what was evaluated whole, with maps that others may still write to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Tuning, streamed

SMALL = Tuning(strip_bytes=4_000, allocator_bytes=0, always=True)

WEIGHT = nn.Parameter(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)), requires_grad=False)


Mode = Callable[[Tensor], tuple[Tensor, ...]]


def convolved(x: Tensor) -> Tensor:
    return F.conv2d(x, WEIGHT, padding=1)


def evaluated(x: Tensor) -> Tensor:
    """A map that is evaluated whole: what is done to its pixels in one line needs all of them."""
    return torch.cumsum(convolved(x).flatten(2), -1).view(x.shape)


def nothing_else(y: Tensor) -> tuple[Tensor, ...]:
    z = convolved(y)
    return z, y, F.group_norm(z, 2)


def added_to(y: Tensor) -> tuple[Tensor, ...]:
    z = convolved(y)
    y.add_(1)
    return z, y


def added_to_by_what_waits_for_it(y: Tensor) -> tuple[Tensor, ...]:
    z = convolved(y)
    y += z
    return z, y, convolved(y)


def given_as_out(y: Tensor) -> tuple[Tensor, ...]:
    z = F.group_norm(y, 2)
    torch.mul(torch.ones_like(y), 3, out=y)
    return z, y


def given_as_one_of_several(y: Tensor) -> tuple[Tensor, ...]:
    z = convolved(y)
    torch.sort(torch.ones_like(y), out=(y, torch.empty(y.shape, dtype=torch.long)))
    return z, y


def in_a_list(y: Tensor) -> tuple[Tensor, ...]:
    z = convolved(y)
    torch._foreach_add_([y[:, 1:], torch.ones(3)], 1.0)  # type: ignore[reportPrivateImportUsage]
    return z, y


def given_other_values(y: Tensor) -> tuple[Tensor, ...]:
    z = convolved(y)
    y.data = torch.zeros_like(y)
    return z, y


def written_through_a_view(y: Tensor) -> tuple[Tensor, ...]:
    z = F.interpolate(y, scale_factor=2.0)
    y[:, 1:3, 4:] = 0
    y.view(-1)[:7] = 5
    return z, y, convolved(y)


def a_part_of_another(y: Tensor) -> tuple[Tensor, ...]:
    z = convolved(y[:, :, 2:])
    y.mul_(2)
    return z, y, convolved(y[..., :5])


def a_view_with_dimensions_exchanged(y: Tensor) -> tuple[Tensor, ...]:
    z = convolved(y.transpose(-1, -2))
    y.zero_()
    return z, y


def twice(y: Tensor) -> tuple[Tensor, ...]:
    one, other = convolved(y), F.group_norm(y, 2)
    y.sub_(3)
    again = convolved(y)
    y.sub_(3)
    return one, other, again, y


def read_again_behind_a_pass(y: Tensor) -> tuple[Tensor, ...]:
    z = convolved(y)
    return torch.cumsum(z.flatten(2), -1), convolved(y), z


MODES: list[Mode] = [
    nothing_else, added_to, added_to_by_what_waits_for_it, given_as_out, given_as_one_of_several, in_a_list,
    given_other_values, written_through_a_view, a_part_of_another, a_view_with_dimensions_exchanged, twice,
    read_again_behind_a_pass,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES, ids=[mode.__name__ for mode in MODES])
def test_what_is_written_later_is_not_seen(mode: Mode) -> None:
    def run(x: Tensor) -> tuple[Tensor, ...]:
        return mode(evaluated(x))

    x = torch.randn(2, 4, 16, 16)
    eager = mode(torch.cumsum(convolved(x).flatten(2), -1).view(x.shape))
    results = streamed(run, tuning=SMALL)(x)
    for result, expected in zip(results, eager, strict=True):
        assert_same(result, expected, 1e-5)
