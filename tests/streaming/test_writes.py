"""Writes in place, in the presence of deferred maps: the result is eager's, whoever sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Tuning, streamed

SMALL = Tuning(strip_bytes=4_000, allocator_bytes=0, always=True)

WEIGHT = nn.Parameter(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)), requires_grad=False)
Function = Callable[[Tensor], Any]


def convolved(x: Tensor) -> Tensor:
    return F.conv2d(x, WEIGHT, padding=1)


def into_a_plain_tensor(x: Tensor) -> Tensor:
    total = torch.zeros(1, 4, 16, 16)
    total += convolved(x)
    total.add_(x)
    return total


def into_a_part_of_a_plain_tensor(x: Tensor) -> Tensor:
    total = torch.zeros(1, 4, 16, 16)
    total[:, :, 4:] += convolved(x)[:, :, 4:] * 2
    return total


def into_an_operand(x: Tensor) -> Tensor:
    bias, map = torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 16, 16)
    y = x + bias + map
    bias.add_(1)
    map.add_(10)
    return y


def into_scores(x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    scores = torch.bmm(tokens.transpose(1, 2), tokens)
    scores *= 0.1
    scores /= 2
    return torch.bmm(scores.softmax(-1), tokens.transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def into_turned_scores(x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    scores = torch.bmm(tokens.transpose(1, 2), tokens)
    turned = scores.transpose(1, 2)
    scores *= 0.1
    return torch.bmm(turned.softmax(-1), tokens.transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def into_scores_otherwise(x: Tensor) -> Tensor:
    tokens = x.flatten(2)
    scores = torch.bmm(tokens.transpose(1, 2), tokens)
    scores.sub_(scores.amax(-1, keepdim=True))
    return torch.bmm(scores.softmax(-1), tokens.transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def into_a_row(x: Tensor) -> Tensor:
    y = convolved(x)
    z = y * 2
    y[:, :, 0] = 0
    return z + y


def into_a_row_of_some_channels(x: Tensor) -> Tensor:
    y = convolved(x)
    y[:, 1:3, 0] = 0
    return y * 2


def into_a_row_of_one_channel(x: Tensor) -> Tensor:
    y = convolved(x)
    z, row = y * 2, y[0, 0, 0]
    row[3:].fill_(5)
    return z + y


def into_exchanged_dimensions(x: Tensor) -> Tensor:
    y = x * 1
    z = y * 2
    y.swapaxes(1, 2).add_(1)
    return y + z


def out_of_an_operator(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 1
    z = y * 2
    torch.add(x, 1, out=y)
    return z, y


def out_of_an_operator_into_a_plain_tensor(x: Tensor) -> Tensor:
    y = torch.empty(1, 4, 16, 16)
    torch.add(convolved(x), 1, out=y)
    z = y * 2
    y.zero_()
    return z + y


def into_what_was_contiguous_already(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 1
    z = y.contiguous(memory_format=torch.channels_last)
    z.add_(1)
    return y, z


def into_what_had_that_type_already(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 1
    y.to(torch.float32).add_(1)
    y.type_as(x).mul_(3)
    y.to(torch.float32, copy=True).mul_(7)
    F.dropout(y, 0.5, training=False).sub_(2)
    return y, y.to(torch.float64).add_(1)


def into_the_argument(x: Tensor) -> Tensor:
    y = convolved(x)
    x.add_(1)
    return y + x


def into_a_part_of_the_argument(x: Tensor) -> Tensor:
    x[:, 1:3] = convolved(x)[:, :2]
    return x * 2


def into_both_parts_of_a_split(x: Tensor) -> Tensor:
    y = convolved(x)
    first, rest = torch.split(y, [1, 3], 1)
    first.add_(x[:, :1])
    rest.mul_(x[:, 1:])
    return convolved(y) + y


def into_parts_that_overlap(x: Tensor) -> tuple[Tensor, ...]:
    y = convolved(x)
    first, second = y[:, :3], y.narrow(1, 1, 2)
    doubled = first * 2
    first.add_(1)
    second.mul_(3)
    y.sub_(x)
    return y, first, second, doubled


def into_parts_of_what_is_gone(x: Tensor) -> tuple[Tensor, Tensor]:
    y = convolved(x)
    first, second = y[:, :3], y[:, 1:]
    del y
    first.add_(1)
    return first, second


def into_a_part_of_a_part(x: Tensor) -> tuple[Tensor, Tensor]:
    y = convolved(x)
    part = y.unflatten(1, (2, 2)).transpose(1, 2)[:, 1]
    part[:, :1].mul_(x[:, :1])
    return y, part


def into_one_of_several(x: Tensor) -> Tensor:
    y = torch.stack([convolved(x), x, x * 2], 2)
    one, _, other = y.unbind(2)
    one.neg_()
    other.copy_(x)
    y.select(2, 1).mul_(5)
    return y


def into_what_may_be_a_copy(x: Tensor) -> tuple[Tensor, Tensor]:
    y = convolved(x).unflatten(1, (2, 2)).transpose(1, 2)
    z = y.reshape(1, 4, 16, 16)
    z.add_(1)
    return y, z


def into_what_was_shuffled(x: Tensor) -> Tensor:
    y = convolved(x).unflatten(1, (1, 2, 2)).permute(0, 1, 4, 2, 5, 3).reshape(1, 1, 32, 32)
    y.add_(1)
    z = convolved(x).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
    first, rest = torch.split(z, [1, 3], 1)
    first.add_(x[:, :1])
    rest.mul_(x[:, 1:])
    return z + F.pixel_unshuffle(y, 2)


def into_an_empty_map(x: Tensor) -> Tensor:
    y, z = torch.empty_like(x), x.new_empty(1, 4, 16, 16)
    for channel in range(0, 4, 2):
        y[:, channel : channel + 2] = convolved(x)[:, channel : channel + 2]
        z[:, channel : channel + 2].copy_(y[:, channel : channel + 2] * 2)
    return y + z


def into_rows_of_an_empty_map(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:, :, ::2], y[:, :, 1::2] = convolved(x)[:, :, ::2], x[:, :, ::2]
    return y


def into_an_empty_map_of_another_type(x: Tensor) -> Tensor:
    y = torch.empty(1, 4, 16, 16, dtype=torch.float64)
    y[:, :1], y[:, 1:] = x[:, :1], convolved(x)[:, :1]
    return y


def into_twice_the_argument(x: Tensor) -> Tensor:
    x[:, :2] = x[:, 2:]
    x.mul_(2)
    x[:, 3:] = convolved(x)[:, :1]
    return x[:, 1:]


WRITES: list[Function] = [
    into_a_plain_tensor, into_a_part_of_a_plain_tensor, into_an_operand, into_scores, into_turned_scores,
    into_scores_otherwise, into_a_row, into_a_row_of_some_channels, into_a_row_of_one_channel,
    into_exchanged_dimensions, out_of_an_operator, out_of_an_operator_into_a_plain_tensor,
    into_what_was_contiguous_already, into_what_had_that_type_already, into_the_argument, into_a_part_of_the_argument,
    into_both_parts_of_a_split, into_parts_that_overlap, into_parts_of_what_is_gone, into_a_part_of_a_part,
    into_one_of_several, into_what_may_be_a_copy, into_what_was_shuffled, into_an_empty_map,
    into_rows_of_an_empty_map, into_an_empty_map_of_another_type, into_twice_the_argument,
]  # fmt: skip


@pytest.mark.parametrize("function", WRITES, ids=lambda function: function.__name__)
def test_a_write_is_seen_by_whom_eager_has_see_it(function: Function) -> None:
    given, same = torch.randn(2, 1, 4, 16, 16).unbind()
    same.copy_(given)
    expected, found = function(same), streamed(function, tuning=SMALL)(given)
    assert_same(given, same, 1e-5)
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for one, other in pairs:
        assert type(one) is Tensor
        assert_same(one, other, 1e-5)


@pytest.mark.parametrize(
    "function",
    [
        into_both_parts_of_a_split, into_parts_that_overlap, into_a_part_of_a_part, into_one_of_several,
        into_an_empty_map, into_rows_of_an_empty_map, into_a_row, into_parts_of_what_is_gone,
    ],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_writes_are_deferred(function: Function) -> None:
    report: dict[str, int] = {}
    streamed(function, report=report, tuning=SMALL)(torch.randn(1, 4, 16, 16))
    assert not report


def test_arguments_in_one_memory() -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return x + y

    memory, other = torch.randn(2, 1, 5, 8, 8).unbind()
    other.copy_(memory)
    expected = run(memory[:, :4], memory[:, 1:])
    assert_same(streamed(run, tuning=SMALL)(other[:, :4], other[:, 1:]), expected, 1e-6)
    assert_same(other, memory, 1e-6)


def test_a_kept_frame_is_written_in_place() -> None:
    def run(x: Tensor, kept: list[Tensor]) -> Tensor:
        kept[0].mul_(2)
        return convolved(x) + kept[0]

    frame, same = torch.randn(2, 1, 4, 16, 16).unbind()
    same.copy_(frame)
    x = torch.randn(1, 4, 16, 16)
    lists = [frame], [same]
    assert_same(streamed(run, tuning=SMALL)(x, lists[0]), run(x, lists[1]), 1e-5)
    assert lists[0][0] is frame
    assert_same(frame, same, 1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.amax(1).softmax(1),
        lambda x: F.group_norm(x.mean(1), 4),
        lambda x: F.conv2d(x[0], WEIGHT),
        lambda x: x.flatten(0, 1).sum(1),
        lambda x: F.batch_norm(x[0], torch.zeros(16), torch.ones(16)),
    ],
    ids=["softmax", "group_norm", "conv2d", "sum", "batch_norm"],
)
def test_three_dimensions_are_no_map(function: Function) -> None:
    x = torch.randn(1, 4, 16, 16)
    assert_same(streamed(function, tuning=SMALL)(x), function(x), 1e-5)
