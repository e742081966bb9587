"""Streaming goes on behind what was evaluated whole, with maps that others may still write to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from allocations import allocated
from conv_helpers import assert_same
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Streamed, Tuning, joins, streamed

SMALL = Tuning(strip_bytes=4_000, allocator_bytes=0, always=True)

WEIGHT = nn.Parameter(torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)), requires_grad=False)


Mode = Callable[[Tensor], tuple[Tensor, ...]]


def convolved(x: Tensor) -> Tensor:
    return F.conv2d(x, WEIGHT, padding=1)


class Sub(Tensor):
    """A tensor that is something else besides."""


def evaluated(x: Tensor) -> Tensor:
    """A map that is evaluated whole: what is done to its values in one line needs all of them."""
    return torch.cumsum(convolved(x).flatten(), 0).view(x.shape)


def looked_at(x: Tensor) -> Tensor:
    """One that has values already: the program has asked for them."""
    y = evaluated(x)
    assert y.sum().isfinite().item()
    return y


def given_away(x: Tensor) -> Tensor:
    """One that others can write to without an operator."""
    y = evaluated(x)
    y.numpy()[0, 0, 0] += 1
    return y


WAYS = [evaluated, looked_at, given_away]


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


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_what_is_written_later_is_not_seen(mode: Mode, way: Callable[[Tensor], Tensor]) -> None:
    if mode is a_subclass and torch.__version__.startswith("2.1."):
        pytest.skip("torch 2.1 makes no subclass of a tensor where operators are watched")

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return mode(way(x))

    x = torch.randn(2, 4, 16, 16)
    for result, expected in zip(streamed(run, tuning=SMALL)(x), run(x), strict=True):
        assert type(result) is Tensor
        assert_same(result, expected, 1e-5)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
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
def test_it_is_deferred_again(operator: Any, way: Callable[[Tensor], Tensor]) -> None:
    """What follows comes in strips, and no map of it is stored but the last."""
    seen: list[Any] = []

    def run(x: Tensor) -> Tensor:
        y = F.silu(F.silu(F.silu(operator(way(x)))))
        seen.append(joins((y,), {}))
        return y

    x = torch.randn(1, 4, 256, 256)  # as much as has to be, where no argument is deferred
    strips: list[int] = []
    runner = Streamed(on_progress=lambda done, work: strips.append(done), tuning=SMALL)
    result = runner.call(run, (x,), {})
    expected = run(x)
    assert_same(result, expected, 1e-5)
    assert seen == [True, False]
    assert len(strips) > 100
    assert runner.last is not None
    assert runner.last.stored <= 3 * x.nbytes + max(expected.nbytes - 2 * x.nbytes, 0) + 64


@pytest.mark.parametrize("budget", [None, 1, 1 << 20])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_streamed_call_inside_another_is_a_part_of_it(way: Callable[[Tensor], Tensor], budget: Optional[int]) -> None:
    report: dict[str, int] = {}
    inner = streamed(lambda y: F.group_norm(convolved(convolved(y)), 2), budget=budget, report=report, tuning=SMALL)
    x = torch.randn(1, 4, 64, 64)
    eager = F.group_norm(convolved(convolved(way(x))), 2) + 1
    assert_same(streamed(lambda x: inner(way(x)) + 1, tuning=SMALL)(x), eager, 1e-5)
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


def test_what_a_module_makes_of_its_parameters_is_ordinary() -> None:
    model, x = Remembers(), torch.randn(1, 4, 16, 16)
    result = streamed(model, tuning=SMALL)(x)
    assert type(model.made) is Tensor
    assert_same(result, model(x), 1e-5)


def taken(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """The peak of a streamed call, and what of it is stored."""
    runner = Streamed(tuning=SMALL)
    assert_same(runner.call(function, (x,), {}), function(x), 1e-5)
    assert runner.last is not None
    return runner.last.peak, runner.last.stored


def test_a_peak_counts_what_is_no_map() -> None:
    """Three tensors that are no maps are alive at once."""

    def in_one_line(x: Tensor) -> Tensor:
        line = torch.cumsum(convolved(x).flatten(), 0)
        return convolved((line + torch.cumsum(line.flip(0), 0)).view(x.shape))

    x = torch.randn(1, 4, 128, 64)
    assert 3 * x.nbytes <= taken(in_one_line, x)[0] < 4.5 * x.nbytes  # with strips of a quarter of a map


def test_a_peak_counts_all_of_a_map_of_which_a_part_is_read() -> None:
    def of_a_part(x: Tensor) -> Tensor:
        y = torch.cumsum(convolved(x).repeat(1, 8, 1, 1).flatten(), 0).view(1, -1, *x.shape[2:])
        return convolved(y[:, :4]) + torch.cumsum(y.flatten(), 0)[-1:] * 1e-6

    x = torch.randn(1, 4, 128, 64)
    assert taken(of_a_part, x)[0] >= 16 * x.nbytes


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_map_that_is_read_often_counts_once(way: Callable[[Tensor], Tensor]) -> None:
    def read_often(times: int) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            y = way(x)
            return torch.cat([convolved(y) for _ in range(times)], 1).sum(1, keepdim=True)

        return run

    x = torch.randn(1, 4, 128, 64)
    assert taken(read_often(8), x)[1] == taken(read_often(1), x)[1]


def test_small_maps_do_not_come_in_strips() -> None:
    strips: list[int] = []
    run = streamed(
        lambda x: convolved(evaluated(x)),
        on_progress=lambda done, work: strips.append(done),
        tuning=Tuning(strip_bytes=4_000, allocator_bytes=0),
    )
    x = torch.randn(1, 4, 16, 16)
    assert_same(run(x), convolved(evaluated(x)), 1e-5)
    assert len(strips) <= 3


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "a matrix that is not positive": lambda y: torch.linalg.cholesky(y[0, 0, :4, :4] - 9.0),
    "a weight of another type": lambda y: F.conv2d(y.double(), WEIGHT),
    "a weight for other channels": lambda y: F.conv2d(y, torch.ones(4, 3, 3, 3)),
    "a transposed weight for other channels": lambda y: F.conv_transpose2d(y, torch.ones(3, 3, 3, 3)),
    "a bias of another size": lambda y: F.conv2d(y, WEIGHT, torch.ones(3)),
    "a complex factor in place": lambda y: y.mul_(1j),
    "a broken factor of whole numbers in place": lambda y: y.int().mul_(0.5),
    "a mask that is taken off": lambda y: y - (y > 0),
    "a mask that is taken off in place": lambda y: y.sub_(y > 0),
    "bits of broken numbers": lambda y: y & 1,
    "an activation of whole numbers": lambda y: F.silu(y.int()),
    "the larger of complex numbers": lambda y: torch.maximum(y, y * 1j),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_eager_refuses_is_refused_where_it_is_called(name: str) -> None:
    """The program may have another way."""
    refused = REFUSED[name]

    def run(x: Tensor) -> tuple[str, Tensor]:
        y = convolved(x)
        try:
            return "taken", refused(y)
        except (RuntimeError, IndexError):
            return "refused", y * 2

    x = torch.randn(1, 4, 12, 9)
    with torch.no_grad():
        expected, actual = run(x), streamed(run, tuning=SMALL)(x)
    assert actual[0] == expected[0] == "refused"
    assert_same(actual[1], expected[1], 1e-5)


@pytest.mark.parametrize(
    "run",
    [
        lambda table, y: table.type_as(y),
        lambda table, y: table.double().type_as(y),
        lambda table, y: table.to(y),
        lambda table, y: table.half().to(y),
        lambda table, y: table[:1, :1].expand_as(y),
        lambda table, y: table.flatten(1).view_as(y),
        lambda table, y: table.permute(3, 2, 1, 0).reshape_as(y),
    ],
)
def test_tables_that_look_like_a_map_leave_it_deferred(run: Any) -> None:
    """A mask of its type, a bias of its shape: what the map holds does not matter."""
    table, x = torch.randn(1, 4, 64, 8), torch.randn(1, 4, 64, 8)

    def program(x: Tensor) -> Tensor:
        y = F.silu(x)
        return convolved(y + run(table, y))

    report: dict[str, int] = {}
    runner = Streamed(report=report, tuning=Tuning(1, allocator_bytes=0, always=True))
    with torch.no_grad():
        result = runner.call(program, (x,), {})
    assert_same(result, program(x), 1e-6)
    assert report == {}
    assert runner.last is not None
    assert runner.last.stored == result.nbytes  # the map itself was never stored


def test_a_map_that_is_freed_is_there_no_more_when_the_next_is_made() -> None:
    def run(x: Tensor) -> Tensor:
        x = F.interpolate(x + 0, scale_factor=2.0)
        x = F.interpolate(x, scale_factor=2.0)
        return x * 1.01

    runner, x = Streamed(), torch.randn(1, 4, 200, 100)
    with torch.no_grad():
        run(x)
        _, eager = allocated(lambda: run(x))
        runner.call(run, (x,), {})
        result, memory = allocated(lambda: runner.call(run, (x,), {}))
    assert runner.ran_eagerly
    assert_same(result, run(x))
    assert memory.peak <= eager.peak + 1000
