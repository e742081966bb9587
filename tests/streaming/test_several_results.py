"""Operators with several results, of which the first comes row by row: pools with the places of values, norms."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.streaming import Tuning, expect, stream, streamed
from comfyui_patchconv.streaming.record.operators import pools
from comfyui_patchconv.streaming.record.schema import operator_of

X = torch.randn(1, 16, 128, 96, generator=torch.Generator().manual_seed(0))
IN_STRIPS = Tuning(strip_bytes=1, allocator_bytes=0, always=True)
Function = Callable[[Tensor], Any]

ALIKE: dict[str, tuple[Function, Function]] = {
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, 4), lambda x: F.adaptive_max_pool2d(x, 4)),
    "adaptive, to one": (lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_max_pool2d(x, 1)),
    "of windows": (lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    "over the last": (
        lambda x: F.layer_norm(x, (96,)), lambda x: torch.native_layer_norm(x, (96,), None, None, 1e-5)[0],
    ),
    "over groups": (
        lambda x: F.group_norm(x, 4), lambda x: torch.native_group_norm(x, None, None, 1, 16, 128 * 96, 4, 1e-5)[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("tuning", [Tuning(), IN_STRIPS], ids=["as it is", "in strips"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ALIKE)
@torch.no_grad()
def test_no_schedule_is_taken_for_that_of_another_operator(name: str, turned: bool, tuning: Tuning) -> None:
    first, second = reversed(ALIKE[name]) if turned else ALIKE[name]
    function = streamed(lambda x, pool: pool(x.relu()), tuning=tuning)
    for pool in (first, second, first):
        torch.testing.assert_close(function(X, pool), pool(X.relu()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_only_pools_is_streamed() -> None:
    pool = nn.AdaptiveMaxPool2d(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with stream(pool):
            pool(X)


@torch.no_grad()
def test_places_that_are_read_are_said_to_be_evaluated_whole() -> None:
    values, places = {}, {}
    streamed(lambda x: F.max_pool2d(x.relu(), 2, return_indices=True)[0], report=values)(X)
    streamed(lambda x: F.max_pool2d(x.relu(), 2, return_indices=True), report=places, tuning=IN_STRIPS)(X)
    assert (values, places) == ({}, {"max_pool2d_with_indices": 1})


@torch.no_grad()
def test_eager_pools_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the program's own operator, not by one call for each row."""

    def refuse(*args: Any) -> Tensor:
        raise AssertionError("by rows")

    monkeypatch.setattr(pools, "_ADAPTIVE_LARGEST", [refuse] * 3)
    small = X[:, :1, :8, :8]
    result = streamed(lambda x: F.adaptive_max_pool2d(x.relu(), (5, 3)))(small)
    assert torch.equal(result, F.adaptive_max_pool2d(small.relu(), (5, 3)))
    with pytest.raises(AssertionError, match="by rows"):
        streamed(lambda x: F.adaptive_max_pool2d(x.relu(), (5, 3)), tuning=IN_STRIPS)(small)


@torch.no_grad()
def test_nothing_is_left_of_a_call() -> None:
    function = streamed(lambda x: torch.native_layer_norm(x.relu(), (96,), None, None, 1e-5)[0])
    function(X)
    before = operator_of.cache_info().currsize
    for _ in range(3):
        function(X)
    assert operator_of.cache_info().currsize == before


def test_work_of_adaptive_pools_is_that_of_their_windows() -> None:
    found = {}

    def pooled(x: Tensor, sizes: tuple[int, int]) -> Tensor:
        y = F.adaptive_avg_pool2d(x.relu(), sizes)
        found[sizes] = y.view_.node().step.work  # type: ignore[attr-defined]
        return y

    with torch.no_grad():
        for sizes in ((4, 2), (5, 2), (3, 1)):
            streamed(pooled, tuning=IN_STRIPS)(X, sizes)
    assert found == {(4, 2): 32 * 48, (5, 2): 26 * 48, (3, 1): 43 * 96}


@pytest.mark.parametrize(
    "several",
    [lambda y: y.sort(-1)[0], lambda y: y.sort(-1)[1], lambda y: y.cummax(2)[0], lambda y: y.flatten().sort()[0]],
    ids=["sorted", "places", "largest so far", "of all"],
)
def test_results_that_nothing_reads_count_in_an_estimate(several: Callable[[Tensor], Tensor]) -> None:
    """They are made with the one that is read: of a sort the places, in 8 bytes each."""
    model = nn.Conv2d(4, 4, 3, padding=1)
    run = lambda copy, make: several(copy(make((1, 4, 800, 800)))) * 1  # noqa: E731
    device, one = torch.device("cpu"), 4 * 800 * 800 * 4
    found = expect(model, run, device=device, tuning=Tuning(allocator_bytes=0))
    assert found.peak >= 4 * one  # the map, what is sorted of it, and the places
