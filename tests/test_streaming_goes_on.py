"""Streaming goes on behind what was evaluated whole, with plain maps that others may still write to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from conv_helpers import assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv import planner
from comfyui_patchconv.streaming import choose, origins, streamed
from comfyui_patchconv.streaming.tensor import LazyTensor

WEIGHT = nn.Parameter(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)), requires_grad=False)


class Sub(Tensor):
    """A tensor that is something else besides."""


Mode = Callable[[Tensor], tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 4_000)
    monkeypatch.setattr(origins, "_SMALL", 1)


def convolved(x: Tensor) -> Tensor:
    return F.conv2d(x, WEIGHT, padding=1)


def evaluated(x: Tensor) -> Tensor:
    """A map that is plain: what is done to its pixels in one line is not known, and what comes of it is no map yet."""
    y = torch.cumsum(convolved(x).flatten(2), -1).view(x.shape)
    assert type(y) is Tensor
    return y


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


def a_subclass(y: Tensor) -> tuple[Tensor, ...]:
    return (convolved(y.as_subclass(Sub)).as_subclass(Tensor),)


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
    given_other_values, a_subclass, written_through_a_view, a_part_of_another, a_view_with_dimensions_exchanged, twice,
    read_again_behind_a_pass,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES, ids=[mode.__name__ for mode in MODES])
def test_what_is_written_later_is_not_seen(mode: Mode) -> None:
    if mode is a_subclass and torch.__version__.startswith("2.1."):
        pytest.skip("torch 2.1 makes no subclass of a tensor where operators are watched")

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return mode(evaluated(x))

    x = torch.randn(2, 4, 16, 16)
    plain = mode(torch.cumsum(convolved(x).flatten(2), -1).view(x.shape))
    report: dict[str, int] = {}
    results = streamed(run, report=report)(x)
    for result, expected in zip(results, plain, strict=True):
        assert_same(result, expected, 1e-5)
    assert not [name for name in report if "writes" in name]  # it was streamed


@pytest.mark.parametrize(
    "operator",
    [
        convolved,
        lambda y: F.conv3d(y[:, :, None], WEIGHT[:, :, None]),
        lambda y: F.conv_transpose2d(y, WEIGHT, stride=2),
        lambda y: F.conv_transpose3d(y[:, :, None], WEIGHT[:, :, None]),
        lambda y: F.group_norm(y, 2),
        lambda y: F.interpolate(y, scale_factor=2.0),
        lambda y: F.interpolate(y[:, :, None], scale_factor=(1.0, 2.0, 2.0)),
    ],
    ids=["conv2d", "conv3d", "transposed", "transposed 3d", "norm", "upsampled", "upsampled 3d"],
)
def test_it_waits_again(operator: Any) -> None:
    seen: list[Any] = []

    def run(x: Tensor) -> Tensor:
        y = F.silu(operator(evaluated(x)))
        seen.append(type(y))
        return y

    x = torch.randn(1, 4, 16, 16)
    plain = F.silu(operator(torch.cumsum(convolved(x).flatten(2), -1).view(x.shape)))
    assert_same(streamed(run)(x), plain, 1e-5)
    assert seen == [LazyTensor]


@pytest.mark.parametrize("budget", [None, 1, 1 << 20])
def test_a_call_inside_another_computes_for_itself(budget: Optional[int]) -> None:
    report: dict[str, int] = {}

    def inner(y: Tensor) -> Tensor:
        return F.group_norm(convolved(convolved(y)), 2)

    def outer(x: Tensor) -> Tensor:
        return streamed(inner, budget=budget, report=report)(evaluated(x)) + 1

    x = torch.randn(1, 4, 64, 64)
    plain = inner(torch.cumsum(convolved(x).flatten(2), -1).view(x.shape)) + 1
    assert_same(streamed(outer)(x), plain, 1e-5)
    assert report == {}


class Remembers(nn.Module):
    """Makes something of a parameter once."""

    made: Optional[Tensor] = None

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4, 8, 8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.made is None:
            self.made = F.interpolate(self.table[None, 0], scale_factor=2.0)
        return convolved(x) + self.made


def test_what_a_module_makes_of_its_parameters_is_plain() -> None:
    model, x = Remembers(), torch.randn(1, 4, 16, 16)
    result = streamed(model)(x)
    assert type(model.made) is Tensor
    assert_same(result, model(x), 1e-5)


class InOneLine(nn.Module):
    """Three tensors that are no maps are alive at once."""

    def forward(self, x: Tensor) -> Tensor:
        line = torch.cumsum(convolved(x).flatten(2), -1)
        return convolved((line + line.exp()).view(x.shape))


def test_a_plan_counts_what_is_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "ALLOCATOR_BYTES", {"cpu": 0})
    x = torch.empty(1, 4, 128, 64, device="meta")
    assert 3 * x.nbytes <= choose(InOneLine(), (x,), {}, device=torch.device("cpu")).peak < 4 * x.nbytes


class OfAPart(nn.Module):
    """All of a tensor is alive while a part of its channels is a map that waits."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cumsum(convolved(x).flatten(2), -1).view(x.shape).repeat(1, 8, 1, 1)
        z = convolved(y[:, :4])
        return y.repeat(1, 2, 1, 1).flatten(2).sum(2, keepdim=True).sum() + z


class ReadOften(nn.Module):
    """One plain map, read by several convolutions."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cumsum(convolved(x).flatten(2), -1).view(x.shape)
        return torch.cat([convolved(y) for _ in range(self.times)], 1).sum(1, keepdim=True)


def test_a_plan_counts_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "ALLOCATOR_BYTES", {"cpu": 0})
    x = torch.empty(1, 4, 128, 64, device="meta")
    assert choose(OfAPart(), (x,), {}, device=torch.device("cpu")).peak >= 24 * x.nbytes
    one, eight = (choose(ReadOften(n), (x,), {}, device=torch.device("cpu")).stored for n in (1, 8))
    assert eight == one


def test_what_is_small_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origins, "_SMALL", 1 << 20)
    seen: list[Any] = []

    def run(x: Tensor) -> Tensor:
        y = convolved(evaluated(x))
        seen.append(type(y))
        return y

    streamed(run)(torch.randn(1, 4, 16, 16))
    assert seen == [Tensor]
