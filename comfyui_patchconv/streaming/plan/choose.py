"""Tries several schedules for one graph, all of them integers, and keeps the best: eager's where none is better."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import NamedTuple, Optional

from ...memory.sizes import allocator_bytes
from ..graph.node import Node
from .eagerly import eager_schedule
from .everywhere import computed_by_all, worth_a_byte
from .passes import Passes
from .schedule import Schedule, Tuning
from .sweep import suitable_bytes
from .way import Ways

_WORTH = 0.95
"""A schedule that computes more has to take less than this share of the other's memory."""

_SLOWER = 1.25
"""How much longer strips may take where eager fits."""

_MODEST = 0.35
"""The part of what eager's maps take above which smaller strips than suit the device are tried without a budget."""

_MUCH = 0.1
"""Of what a schedule takes, the part that strips have to be for smaller ones to be tried."""

_SMALLER = (1 / 2, 1 / 4, 1 / 8)
"""Of what suits the device, which parts: in smaller strips, calls of operators take longer than what they compute."""


class Variant(NamedTuple):
    """What a schedule does otherwise. in_turn, everywhere: of several ranks, which else send their bands of what a step
    needs whole to all others, keys and values of attention stay in bands; maps that each of them computes whole.
    halved: passes are parted where their line buffers weigh much. worth_a_byte: and where ranks send less for it; see
    `cut_to_send_less`."""

    in_turn: bool = False
    everywhere: Collection[Node] = ()
    halved: bool = False
    worth_a_byte: int = 0


_USUAL = Variant()


def choose(
    roots: Sequence[Node],
    keep: Sequence[Node],
    tuning: Tuning,
    budget: Optional[int] = None,
    held: int = 0,
    room: Callable[[], int] = lambda: 1 << 62,
    ranks: int = 1,
) -> Schedule:
    """The schedule for `roots`: `in_strips`, or eager's where strips take no less memory, or far longer though eager
    fits. Strips are smaller than suits the device where they do not fit a budget, or, without one, take much of what
    eager takes.

    The rest: see `in_strips`.
    """
    if tuning.always:
        return in_strips(roots, keep, tuning, budget, held, room, ranks)
    eager = eager_schedule(roots, keep, held)
    longest = _SLOWER * eager.seconds
    schedule = in_strips(roots, keep, tuning, budget, held, room, ranks, longest)
    device_type = max(roots, key=lambda node: node.bytes).device.type
    slack, offered = allocator_bytes(device_type), schedule.offloaded_at_once

    def smaller(part: float) -> Optional[Schedule]:
        strips = replace(tuning, strip_share=part)
        found = in_strips(roots, keep, strips, budget, held, room, ranks, longest)
        slow = budget is None and found.seconds > ranks * longest
        return None if slow or (budget is not None and found.offloaded_at_once > max(offered, room())) else found

    if tuning.strip_bytes is None:
        wanted = _MODEST * eager.stored if budget is None else budget
        schedule = _in_smaller_strips(schedule, wanted, suitable_bytes(tuning, device_type), slack, smaller)
    with_slack = eager.peak + (slack if eager.peak > slack else 0)
    if budget is None or with_slack <= budget:
        better = eager.peak <= schedule.peak or longest < schedule.seconds / ranks
    else:  # neither may fit: eager where it is sure to take less, and more than nothing
        better = slack < eager.peak <= schedule.peak - slack
    return replace(eager, peak=with_slack) if better else schedule


def _in_smaller_strips(
    schedule: Schedule, wanted: float, usual: int, slack: int, smaller: Callable[[float], Optional[Schedule]]
) -> Schedule:
    """A schedule, or what takes less in smaller strips, if it takes over `wanted` bytes. usual: of strips that suit the
    device. slack: of the allocator, which all count. smaller: plans for a part of these; None for what is no good."""
    for part in _SMALLER:
        if schedule.peak <= wanted or usual < _MUCH * schedule.peak:
            break
        found = smaller(part)
        if found is not None and found.peak - slack < _WORTH * (schedule.peak - slack):
            schedule = found
    return schedule


def in_strips(
    roots: Sequence[Node], keep: Sequence[Node], tuning: Tuning, budget: Optional[int] = None, held: int = 0,
    room: Callable[[], int] = lambda: 1 << 62, ranks: int = 1, seconds: float = inf,
) -> Schedule:  # fmt: skip
    """The schedule in strips: the first that stays within `budget`, and that finds `room` for what it offloads, of
    those that recompute nothing, then more and more of the large maps, and then are made for smaller budgets; passes
    whose line buffers weigh much are parted where that helps.

    Of several ranks, each computes what is little to compute beside the bytes that they would send else, and passes are
    parted where less is sent then, where that takes no more memory (`everywhere`, `bands`). Where they would have to
    offload, or do not fit, keys and values of attention go from rank to rank in turn if that helps. Where none does,
    the one that offloads least, or one for a smaller budget that takes less. Without a budget, the one of the lowest
    peak that takes each rank no longer than `seconds`, or than the one that recomputes nothing.

    keep, held: see `Lifetimes` and `Placement`. room: bytes that can be offloaded, asked where it matters. ranks: see
    `Placement`.
    """
    ways = Ways()
    spare: Optional[int] = None
    if ranks > 1 and budget is None:  # strips that one process has room for beside its maps are too high for a band
        alone = Passes(roots, keep, tuning, None, None, held, ways).plan()
        assert alone is not None
        spare = alone.peak // ranks

    def trial(
        variant: Variant, size: Optional[int], budget: Optional[int], below: Optional[float] = None
    ) -> Optional[Schedule]:
        return Passes(roots, keep, tuning, budget, size, held, ways, ranks, spare, *variant).plan(below)

    def planned(variant: Variant) -> Schedule:
        schedule = trial(variant, None, budget)
        assert schedule is not None
        return schedule

    def least(first: Schedule, variant: Variant) -> Schedule:
        return _in_less(first, partial(trial, variant), budget, unused, max(ranks * seconds, first.seconds))

    first, variant = planned(_USUAL), _USUAL
    unused = room() if first.offloaded_at_once else 0
    if budget is not None and ranks > 1 and (first.peak > budget or first.offloaded):
        in_turn = planned(Variant(in_turn=True))
        if _saves(in_turn, first, budget, unused):
            first, variant = in_turn, Variant(in_turn=True)
    best = least(first, variant)
    if best.could_be_halved and (budget is None or best.peak > budget or best.offloaded):
        of_halves = variant._replace(halved=True)
        halved = planned(of_halves)
        if budget is not None or halved.seconds <= max(ranks * seconds, best.seconds):
            halved = least(halved, of_halves)
            if _better(halved, best, budget, unused):
                best, variant = halved, of_halves
    if ranks > 1:
        worth = worth_a_byte(tuning, max(roots, key=lambda node: node.bytes).device.type)
        by_all = computed_by_all(ways.steps_to(roots, (), 0), worth)
        variant = variant._replace(in_turn=False, everywhere=by_all, worth_a_byte=worth)
        schedule = least(planned(variant), variant)
        if schedule.peak <= max(best.peak, budget or 0) and schedule.offloaded <= best.offloaded:
            return schedule
    return best


def _in_less(
    first: Schedule,
    trial: Callable[..., Optional[Schedule]],
    budget: Optional[int],
    room: int,
    seconds: float,
) -> Schedule:
    """A schedule, or one that takes less because it recomputes more of the large maps, or is made for a smaller budget.
    trial: plans for what is recomputed, a budget, and bytes to stay below. seconds: what it may take at most."""
    if budget is not None and first.peak <= budget and first.offloaded_at_once <= room:
        return first
    best, chosen = first, None
    for size in sorted((size for size in first.recomputable_sizes if size >= first.peak / 8), reverse=True):
        schedule = trial(size, budget, _WORTH * best.peak if budget is None else None)
        slow = budget is None and schedule is not None and schedule.seconds > seconds
        if schedule is None or slow or not _better(schedule, best, budget, room):
            break
        best, chosen = schedule, size
    # What is placed while there is room stays where it is: less of it leaves more for what has to be there.
    for smaller in () if budget is None or best.peak <= budget else (budget // 2, budget // 4):
        schedule = trial(chosen, smaller, _WORTH * best.peak)
        if schedule is not None and schedule.offloaded_at_once <= max(room, best.offloaded_at_once):
            best = schedule
    return best


def _saves(schedule: Schedule, other: Schedule, budget: int, room: int) -> bool:
    """Whether a schedule that sends keys and values in turn is worth it: it offloads less, or comes nearer a budget."""
    if schedule.peak > budget and other.peak > budget:
        return schedule.peak < _WORTH * other.peak
    return _better(schedule, other, budget, room)


def _better(schedule: Schedule, best: Schedule, budget: Optional[int], room: int) -> bool:
    """Whether a schedule that computes more is worth it. room: bytes that can be offloaded."""
    if budget is None:
        return schedule.peak < _WORTH * best.peak
    misses, best_misses = ((one.peak > budget, one.offloaded_at_once > room) for one in (schedule, best))
    return (*misses, schedule.offloaded) < (*best_misses, _WORTH * best.offloaded)
