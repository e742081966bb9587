"""One call over several processes: eager's result on all of them, in a part of the memory each."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import Ranks

COUNTS = pytest.mark.parametrize("count", [2, 3, 4])


@COUNTS
@pytest.mark.parametrize(
    "case",
    [
        ("decoder", 13), ("decoder", 2), ("decoder", 1), ("vae_decoder", 7), ("vae_encoder", 72), ("circular", 11),
        ("video", 5, 11), ("video", 5, 1), ("codec", 1201), ("linear_attention", 13), ("reductions", 17),
        ("reductions", 2), ("evaluated_whole", 11), ("demanded", 11), ("several", 11), ("without_norms", 40),
        ("written", 11),
    ],
    ids=str,
)  # fmt: skip
def test_as_eager(ranks: Ranks, case: tuple[Any, ...], count: int) -> None:
    for strip_bytes in (1, 2_000):
        ranks.run(*case, ranks=count, strip_bytes=strip_bytes)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks(ranks: Ranks, seed: int) -> None:
    for count, height in ((2, 9), (3, 14), (4, 7)):
        ranks.run("network", seed, height, ranks=count, strip_bytes=400, inference=bool(seed % 2))


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(ranks: Ranks, seed: int) -> None:
    for count in (2, 3):
        ranks.run("program", seed, ranks=count, strip_bytes=200, strides=False)


@COUNTS
def test_maps_in_files(ranks: Ranks, count: int) -> None:
    """Each rank keeps what its budget has no room for in a file: the budget is the least of theirs."""
    found = ranks.run(
        "decoder", 13, 9, ranks=count, strip_bytes=1, allocator_bytes=0, budget=[40_000, None, 200_000, None]
    )
    assert len({one["planned"] for one in found}) == 1
    assert all(one["offloaded"] > 0 for one in found)


def test_a_group_of_one_is_as_none(ranks: Ranks) -> None:
    (found,) = ranks.run("decoder", ranks=1)
    assert found["sent"] == 0
    assert found["in_strips"]
