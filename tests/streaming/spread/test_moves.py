"""Which rows are whose, in integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyui_patchconv.conv.halo import Axis
from comfyui_patchconv.streaming.graph.node import Node
from comfyui_patchconv.streaming.graph.steps import Convolve
from comfyui_patchconv.streaming.plan import bands
from comfyui_patchconv.streaming.plan.bands import band, reach
from comfyui_patchconv.streaming.plan.choose import choose
from comfyui_patchconv.streaming.plan.schedule import Pass, Target, Tuning
from comfyui_patchconv.streaming.spread.moves import bands_of, moves_before


def node(rows: int, kernel: int = 3, *inputs: Node) -> Node:
    step = Convolve(Axis.of(kernel, 1, 1, kernel // 2), rows, 2, lambda pieces: pieces[0])
    return Node(
        step if inputs else None, inputs, (2,) * len(inputs), shape=(1, 1, rows, 4), strides=(rows * 4, rows * 4, 4, 1),
        dtype=None, device=None, itemsize=4, dim=2,
    )  # fmt: skip


def a_pass(rows: int, kernels: tuple[int, ...]) -> tuple[Pass, Node]:
    source = node(rows)
    order = []
    for kernel in kernels:
        order.append(node(rows, kernel, order[-1] if order else source))
    targets = [Target(order[-1])]
    one_pass = Pass(
        targets, order, None, rows, 1, recomputed=set(), keeping=[], shrinking=[], freed=[], work=0, line_bytes=0,
        offloaded_lines={}, workspace=0,
    )  # fmt: skip
    return one_pass, source


@given(st.integers(0, 40), st.integers(1, 9))
def test_each_row_is_one_ranks(rows: int, ranks: int) -> None:
    found = [band(rows, rank, ranks) for rank in range(ranks)]
    assert [row for first, last in found for row in range(first, last)] == list(range(rows))
    sizes = [last - first for first, last in found]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 30), st.integers(1, 6), st.lists(st.sampled_from([1, 3, 5, 9]), min_size=1, max_size=3))
def test_what_a_rank_reads_is_its_own_or_comes(rows: int, ranks: int, kernels: list[int]) -> None:
    one_pass, source = a_pass(rows, tuple(kernels))
    moves = moves_before(one_pass, [source], ranks)
    for rank in range(ranks):
        first, last = reach(one_pass.order, bands_of(one_pass, rank, ranks)).get(source, (0, 0))
        own = set(range(*band(rows, rank, ranks)))
        coming = [row for move in moves if move.reader == rank for row in range(*move.rows)]
        assert len(coming) == len(set(coming))
        assert not own & set(coming)
        assert set(range(first, last)) <= own | set(coming)
        assert set(coming) <= set(range(first, last))
        for move in moves:
            low, high = band(rows, move.owner, ranks)
            assert low <= move.rows[0] < move.rows[1] <= high


@pytest.mark.parametrize("ranks", [2, 3])
def test_only_halos_move(ranks: int) -> None:
    one_pass, source = a_pass(60, (3, 3))
    moves = moves_before(one_pass, [source], ranks)
    assert len(moves) == 2 * (ranks - 1)
    assert {move.rows[1] - move.rows[0] for move in moves} == {2}
    assert {move.bytes for move in moves} == {2 * 4 * 4}


def test_few_rows_are_computed_twice() -> None:
    """A hundred convolutions, one behind the other, over bands of 64 rows: what lies between some of them is stored."""
    tuning = Tuning(always=True, worth_an_exchange=0)
    cpu, rows, ranks = torch.device("cpu"), 256, 4
    last = node(rows)
    last.tensor = "the input"
    last.device = cpu
    for _ in range(100):
        last = node(rows, 3, last)
        last.device = cpu
    schedule = choose([last], [], tuning, None, 0, ranks=ranks)
    passes = [step for step in schedule.steps if isinstance(step, Pass)]
    assert 1 < len(passes) < 20
    computed = sum(
        high - low
        for one_pass in passes
        for one, (low, high) in reach(one_pass.order, bands_of(one_pass, 1, ranks)).items()
        if one in one_pass.order
    )
    assert computed <= (1 + bands._TWICE) * 100 * rows / ranks
    assert len(choose([last], [], tuning, None, 0).steps) == 1
