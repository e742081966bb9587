"""Measures what torch's own allocator gives out on the CPU during a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocated:
    """Of one call: the most bytes at one time beyond what there was before, and the largest single allocation."""

    peak: int
    largest: int


def allocated(call: Callable[[], Any]) -> tuple[Any, Allocated]:
    """What `call` returns, and what it allocated. Files, and memory of the system's own, do not count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    now = peak = largest = 0
    recorded: Any = profiled.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=_start):
        now += event.nbytes()
        peak, largest = max(peak, now), max(largest, event.nbytes())
    return result, Allocated(peak, largest)


def _start(event: Any) -> int:
    """In the microseconds of torch 2.1 where it has no nanoseconds."""
    return event.start_ns() if hasattr(event, "start_ns") else event.start_us()
