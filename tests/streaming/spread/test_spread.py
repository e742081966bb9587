"""One call over several processes: eager's result on all of them, in a part of the memory each."""

from __future__ import annotations

from math import gcd
from typing import Any

import pytest
from products import crossed

from comfyui_patchconv.streaming import Streamed

from .conftest import Ranks

MIXED = (
    "mean", "largest", "roll", "flip", "index", "softmax", "held", "exchanged", "one", "shifted", "joined", "norm",
    "cumulated", "written", "trained", "product",
)  # fmt: skip
"""How `cases.mixed` mixes samples."""

RANKS = [2, 3, 4]
COUNTS = pytest.mark.parametrize("count", RANKS)


@crossed(
    1,
    case=[
        ("decoder", 13), ("decoder", 2), ("decoder", 1), ("vae_decoder", 7), ("vae_encoder", 72), ("circular", 11),
        ("video", 5, 11), ("video", 5, 1), ("codec", 1201), ("linear_attention", 13), ("reductions", 17),
        ("reductions", 2), ("evaluated_whole", 11), ("demanded", 11), ("several", 11), ("without_norms", 40),
        ("written", 11),
    ],
    count=RANKS,
)  # fmt: skip
def test_all_ranks_give_eagers_result(ranks: Ranks, case: tuple[Any, ...], count: int) -> None:
    for strip_bytes in (1, 2_000):
        ranks.run(*case, ranks=count, strip_bytes=strip_bytes)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_give_eagers_result_on_all_ranks(ranks: Ranks, seed: int) -> None:
    for count, height in ((2, 9), (3, 14), (4, 7)):
        ranks.run("network", seed, height, ranks=count, strip_bytes=400, inference=bool(seed % 2))


@crossed(1, seed=range(40), count=[2, 3])
def test_random_programs_give_eagers_result_on_all_ranks(ranks: Ranks, seed: int, count: int) -> None:
    ranks.run("program", seed, ranks=count, strip_bytes=200, strides=False)


BY_ALL = {"worth_a_byte": 1 << 40, "budget": 1 << 30}
"""Each rank computes all that leads to a map that is read whole."""


@crossed(
    1,
    case=[
        ("decoder", 13), ("decoder", 5, 9, 2), ("vae_decoder", 7), ("vae_encoder", 72), ("circular", 11),
        ("attention", 13, 10), ("linear_attention", 13), ("evaluated_whole", 11), ("demanded", 11), ("several", 11),
        ("video", 5, 11), ("written", 11),
    ],
    count=RANKS,
)  # fmt: skip
def test_what_leads_to_whole_maps_may_be_computed_by_all_ranks(ranks: Ranks, case: tuple[Any, ...], count: int) -> None:
    ranks.run(*case, ranks=count, strip_bytes=500, **BY_ALL)


@crossed(1, seed=range(8), count=[2, 3])
def test_random_programs_of_which_all_ranks_compute_a_part(ranks: Ranks, seed: int, count: int) -> None:
    ranks.run("program", seed, ranks=count, strip_bytes=200, strides=False, **BY_ALL)
    ranks.run("network", seed, 9, ranks=count, strip_bytes=400, **BY_ALL)


@COUNTS
def test_what_all_ranks_compute_is_not_sent(ranks: Ranks, count: int) -> None:
    """The keys and values of the attention in the middle are much of what the ranks of a VAE's decoder send."""
    sent = {}
    for worth in (0, 1 << 40):
        found = ranks.run("vae_decoder", 16, 16, ranks=count, worth_a_byte=worth, budget=1 << 30)
        sent[worth] = max(one["sent"] for one in found)
    keys_and_values = 2 * 64 * 16 * 16 * 4
    assert sent[1 << 40] <= sent[0] - keys_and_values * (count - 1) // count


@COUNTS
def test_a_pass_is_two_where_less_is_sent_then(ranks: Ranks, count: int) -> None:
    """A convolution, what it is added to, and one behind the upsampling read three rows beside a band; two, where the
    sum is stored."""
    sent = {}
    for worth in (0, 1 << 40):
        found = ranks.run("upsampled", 24, 90, ranks=count, worth_a_byte=worth, strip_bytes=500)
        sent[worth] = max(one["sent"] for one in found)
    assert sent[1 << 40] < sent[0]


def test_what_all_ranks_compute_is_planned_for(ranks: Ranks) -> None:
    ranks.run("vae_decoder", ranks=2)
    for count in (2, 4):
        options = {"strip_bytes": 20_000, "allocator_bytes": 0, "worth_a_byte": 1 << 40}
        found = ranks.run("vae_decoder", 21, 16, ranks=count, budget=1 << 30, measured=True, **options)
        assert all(one["peak"] <= one["planned"] for one in found)


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


@COUNTS
def test_a_strip_that_does_not_fit_is_halved_where_it_does_not(ranks: Ranks, count: int) -> None:
    """What is sent stays the same: no other rank notices."""
    usual = ranks.run("without_norms", ranks=count, strip_bytes=1 << 30)
    halved = ranks.run("without_norms", ranks=count, strip_bytes=1 << 30, short_of_memory=1)
    assert [one["sent"] for one in halved] == [one["sent"] for one in usual]


@crossed(1, batch=range(1, 6), count=RANKS)
def test_samples_are_split_over_as_many_groups_as_divide_both(ranks: Ranks, batch: int, count: int) -> None:
    for case, options, strip_bytes in (("decoder", (5, 9, batch), 1), ("apart", (batch,), 2_000)):
        found = ranks.run(case, *options, ranks=count, strip_bytes=strip_bytes)
        assert {one["parts"] for one in found} == {gcd(batch, count)}


@COUNTS
def test_samples_copied_into_memory_that_lies_otherwise(ranks: Ranks, count: int) -> None:
    found = ranks.run("copied", count, ranks=count, strip_bytes=500)
    assert {one["parts"] for one in found} == {count}


@pytest.mark.parametrize("how", MIXED)
def test_samples_that_are_mixed_are_not_split(ranks: Ranks, how: str) -> None:
    for count, batch in ((2, 4), (3, 3)):
        found = ranks.run("mixed", batch, how, ranks=count, strip_bytes=500)
        assert {one["parts"] for one in found} == {1}


def test_groups_of_samples_send_the_result_alone(ranks: Ranks) -> None:
    """Where each rank has whole samples, nothing but the agreement and the results is sent."""
    found = ranks.run("decoder", 13, 9, 4, ranks=4, strip_bytes=1)
    sample = 3 * 52 * 36 * 4
    assert all(3 * sample <= one["sent"] <= 3 * sample + 100_000 for one in found)


def test_samples_within_the_least_budget(ranks: Ranks) -> None:
    found = ranks.run(
        "decoder", 13, 9, 4, ranks=4, strip_bytes=1, allocator_bytes=0, budget=[90_000, None, 200_000, None]
    )
    assert len({one["planned"] for one in found}) == 1
    assert all(one["offloaded"] > 0 for one in found)


def test_memory_of_samples_is_shared_out(ranks: Ranks) -> None:
    ranks.run("vae_decoder", ranks=2)
    peaks = {}
    for count in (1, 2):
        found = ranks.run("vae_decoder", 17, 16, 4, ranks=count, strip_bytes=50_000, allocator_bytes=0, measured=True)
        peaks[count] = max(one["peak"] for one in found)
        assert all(one["peak"] <= one["planned"] for one in found)
    result = 4 * 3 * 136 * 128 * 4  # which all have
    assert peaks[2] - result <= (1 / 2 + 0.05) * (peaks[1] - result)


@pytest.mark.parametrize("seed", range(8))
def test_random_networks_of_batches(ranks: Ranks, seed: int) -> None:
    for count, batch in ((2, 4), (4, 2), (3, 3)):
        ranks.run("network", seed, 9, batch, ranks=count, strip_bytes=400, inference=bool(seed % 2))


@crossed(
    1,
    case=[
        ("decoder", 3), ("decoder", 5, 9, 2), ("video", 3, 5), ("codec", 601), ("several", 11), ("written", 11),
        ("reductions", 11), ("evaluated_whole", 11), ("demanded", 11),
    ],
    count=RANKS,
)  # fmt: skip
def test_results_in_bands_put_together_on_any_rank_are_eagers(ranks: Ranks, case: tuple[Any, ...], count: int) -> None:
    found = ranks.run(*case, ranks=count, strip_bytes=500, in_bands=True)
    for places in zip(*(one["bands"] for one in found)):
        ends = [first + shape[dim] for shape, dim, first, _ in places]
        assert [first for _, _, first, _ in places] == [0, *ends[:-1]]
        assert ends[-1] == places[0][-1]


def test_results_in_bands_take_a_part_of_the_memory_and_are_not_sent(ranks: Ranks) -> None:
    """Of a call that stores nothing else whole."""
    case = "without_norms", 2_000
    whole = 3 * 2_000 * 8 * 4
    usual, bands = (ranks.run(*case, ranks=4, strip_bytes=1, allocator_bytes=0, in_bands=one) for one in (False, True))
    for one, other in zip(usual, bands):
        assert one["sent"] - other["sent"] >= 3 * whole // 4
        assert one["planned"] - other["planned"] >= whole // 2


def test_one_process_has_one_band(ranks: Ranks) -> None:
    (found,) = ranks.run("decoder", 3, ranks=1, strip_bytes=500, in_bands=True)
    ((shape, dim, first, rows),) = found["bands"]
    assert (shape[dim], first) == (rows, 0)


@crossed(2, dtype=["float32", "float64", "bfloat16"], causal={"all": False, "causal": True}, count=RANKS)
def test_keys_and_values_go_in_turn_where_the_budget_asks_for_it(
    ranks: Ranks, count: int, causal: bool, dtype: str
) -> None:
    case, options = ("attention", 61, 8, causal, dtype, 1 + causal), {"strip_bytes": 1, "allocator_bytes": 0}
    whole = ranks.run(*case, ranks=count, **options)
    assert {one["in_turn"] for one in whole} == {0}
    found = ranks.run(*case, ranks=count, **options, budget=whole[0]["planned"] * 9 // 10)
    assert {one["in_turn"] for one in found} == {1}


@crossed(
    1,
    case=[("attention", 3, 2), ("attention", 5, 2), ("decoder", 5), ("decoder", 1), ("vae_decoder", 7)],
    count=RANKS,
)
def test_keys_and_values_in_turn_of_any_network_and_of_few_rows(
    ranks: Ranks, case: tuple[Any, ...], count: int
) -> None:
    found = ranks.run(*case, ranks=count, strip_bytes=1, allocator_bytes=0, budget=1, at_all_costs=True)
    assert {one["in_turn"] for one in found} == {1}


@COUNTS
def test_a_result_in_bands_may_be_attention_in_turn(ranks: Ranks, count: int) -> None:
    options = {"strip_bytes": 1, "allocator_bytes": 0, "in_bands": True, "budget": 1, "at_all_costs": True}
    found = ranks.run("attended", 61, ranks=count, **options)
    assert {one["in_turn"] for one in found} == {1}


def test_what_keys_and_values_in_turn_take_is_planned(ranks: Ranks) -> None:
    options = {"strip_bytes": 1, "allocator_bytes": 0, "budget": 40_000}
    ranks.run("attention", 61, 8, ranks=4, **options)  # what is allocated once
    found = ranks.run("attention", 61, 8, ranks=4, **options, measured=True)
    assert {one["in_turn"] for one in found} == {1}
    assert all(one["peak"] <= one["planned"] for one in found)


def test_eager_where_that_takes_less(ranks: Ranks) -> None:
    found = ranks.run("decoder", 2, ranks=3, always=False)
    assert not any(one["in_strips"] for one in found)


def test_memory_is_shared_out(ranks: Ranks) -> None:
    """Each rank takes a part, and little more; no more than what was planned."""
    ranks.run("vae_decoder", ranks=3)  # what is allocated once
    peaks = {}
    for count in (1, 2, 3):
        found = ranks.run("vae_decoder", 49, 32, ranks=count, strip_bytes=200_000, allocator_bytes=0, measured=True)
        peaks[count] = max(one["peak"] for one in found)
        assert all(one["peak"] <= one["planned"] for one in found)
    assert peaks[2] <= (1 / 2 + 0.05) * peaks[1]
    assert peaks[3] <= (1 / 3 + 0.05) * peaks[1]


@COUNTS
def test_cut_where_rows_would_be_computed_twice(ranks: Ranks, count: int) -> None:
    cut = ranks.run("without_norms", ranks=count, strip_bytes=1, worth_an_exchange=0)
    usual = ranks.run("without_norms", ranks=count, strip_bytes=1)
    assert [one["messages"] for one in cut] > [one["messages"] for one in usual]
    ranks.run("several", ranks=count, strip_bytes=1, worth_an_exchange=0)


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_with_cuts(ranks: Ranks, seed: int) -> None:
    ranks.run("network", seed, 23, ranks=2 + seed % 3, strip_bytes=400, worth_an_exchange=0)


def test_a_group_where_there_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no process groups: call torch"):
        Streamed(group="all of them")
