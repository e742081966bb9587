"""Writes in place, in the presence of maps that wait: the result is plain's, whoever sees them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv import planner
from comfyui_patchconv.streaming import CannotStreamError, choose, streamed
from comfyui_patchconv.streaming.call import carry_out
from comfyui_patchconv.streaming.run import Run


@pytest.fixture(autouse=True)
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 4_000)


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


WRITES: list[Function] = [
    into_a_plain_tensor, into_a_part_of_a_plain_tensor, into_an_operand, into_scores, into_turned_scores,
    into_scores_otherwise, into_a_row, into_a_row_of_some_channels,
    into_a_row_of_one_channel, into_exchanged_dimensions, out_of_an_operator,
    out_of_an_operator_into_a_plain_tensor, into_what_was_contiguous_already, into_what_had_that_type_already,
]  # fmt: skip


@pytest.mark.parametrize("function", WRITES, ids=lambda function: function.__name__)
def test_a_write_is_seen_by_whom_plain_has_see_it(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 4_000)
    x = torch.randn(1, 4, 16, 16)
    given = x.clone()
    expected, found = function(x.clone()), streamed(function)(given)
    assert torch.equal(given, x)
    pairs = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for one, other in pairs:
        assert type(one) is Tensor
        assert_same(one, other, 1e-5)


def test_reading_rows_needs_no_plain_run() -> None:
    """Slices and views of a stored map that are only read."""
    report: dict[str, int] = {}

    def read(x: Tensor) -> Tensor:
        y = convolved(x)
        return convolved(y[:, :, ::2]) + y[:, :, :1] + y[0, 0, 0].mean()

    x = torch.randn(1, 4, 16, 16)
    assert_same(streamed(read, report=report)(x), read(x), 1e-5)
    assert not [name for name in report if "view" in name]


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
    assert_same(streamed(function)(x), function(x), 1e-5)


class Unplannable(nn.Module):
    """Writes through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        y[:, :1] = 0
        return self.convolution(y)


def test_what_runs_plain_has_no_plan_and_no_gradients() -> None:
    model, x = Unplannable(), torch.randn(1, 4, 16, 16)
    with pytest.raises(CannotStreamError):
        choose(model, (x,), {})
    with torch.enable_grad():
        assert not streamed(model)(x).requires_grad


class TestRoom:
    @pytest.fixture(autouse=True)
    def no_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))

    @pytest.mark.parametrize("budget", [None, 1 << 40])
    def test_where_all_fits_no_folder_is_needed(self, budget: int | None) -> None:
        x = torch.randn(1, 4, 16, 16)
        assert streamed(nn.Conv2d(4, 4, 3), budget=budget)(x).shape == (1, 4, 14, 14)

    def test_an_empty_batch_needs_no_file(self) -> None:
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))
        assert streamed(model, budget=1)(torch.empty(0, 4, 16, 16)).shape == (0, 4, 14, 14)


class Cumulative(nn.Module):
    """An operator that is evaluated whole between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(torch.cumsum(self.first(x), 1)))


def test_a_whole_evaluation_counts_with_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 20_000)
    model, x = Cumulative().requires_grad_(False), torch.randn(1, 4, 64, 64)
    plan, held = choose(model, (x,), {}), []
    run: Any = Run(plan, on_progress=lambda *steps: held.append(run.held))
    carry_out(model.forward, (x,), {}, run)
    assert 1.5 * x.nbytes < max(held) <= run.stored == plan.stored
