"""What one piece of work takes: memory, time by the device's own clock, kernels; and how far it is from the truth."""

from __future__ import annotations

import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from comfyui_patchconv.memory.recorder import Recorder

Work = Callable[[], Tensor]

SECONDS_OF_RUNS = 1.5
"""As long as a case is repeated, `MOST_RUNS` times at most."""

MOST_RUNS = 7

LONG = 10.0
"""Seconds from which the first run is the only one: what warms up is little beside it."""

SECONDS_TO_PROFILE = 1.0
"""A run that takes longer is not run once more for the number of its kernels."""


def measured(
    work: Work, device: torch.device, most_runs: int = MOST_RUNS, count: bool = True
) -> tuple[Tensor, dict[str, Any]]:
    """The result of `work`, and what it takes. most_runs: behind the first one. count: its kernels, by one run more.

    peak: bytes beyond what was there before. all: bytes at once, weights and input among them; reserved: those that the
    allocator took for that (both on CUDA alone). seconds: the median of runs behind the first one, which warms up.
    launches: kernels on CUDA, operators on a CPU; None where they were not counted.
    """
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.empty_cache()  # what is reserved shall be for this alone
    with Recorder(device) as record:
        result = work()
    first, seconds = record.seconds, []
    for _ in range(max(min(most_runs, int(SECONDS_OF_RUNS / max(first, 1e-6))), min(most_runs, int(first < LONG)))):
        del result  # of two results at once the peak would be another
        result, taken = timed(work, device)
        seconds.append(taken)
    found = {"peak": record.peak, "seconds": statistics.median(seconds or [first]), "runs": len(seconds)}
    if gpu:
        found |= {"all": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    found["launches"] = launches(work, device) if count and found["seconds"] < SECONDS_TO_PROFILE else None
    return result, found


def clean(device: torch.device) -> None:
    """Nothing is left of the work before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def timed(work: Work, device: torch.device) -> tuple[Tensor, float]:
    """The result of `work`, and its seconds: between two events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        return work(), time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = work()
    end.record()
    end.synchronize()
    return result, begin.elapsed_time(end) / 1000


def kernels(work: Work, device: torch.device) -> tuple[dict[str, tuple[int, float]], float]:
    """Of each kernel how often it ran and how many milliseconds in all, and the seconds of `work` while watched.

    On a CPU operators stand for kernels. Empty where the profiler sees none, as without the right to.
    """
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    start = time.perf_counter()
    with profile(activities=activities) as profiled:
        work()
        if gpu:
            torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if not gpu:
        averages = [event for event in profiled.key_averages() if event.key.startswith("aten::")]
        return {event.key: (event.count, event.self_cpu_time_total / 1000) for event in averages}, seconds
    counts: Counter[str] = Counter()
    milliseconds: Counter[str] = Counter()
    events: Any = profiled.events()
    for event in events:
        if str(event.device_type).endswith("CUDA"):
            counts[event.name] += 1
            milliseconds[event.name] += event.time_range.elapsed_us() / 1000  # pyright: ignore
    return {name: (count, float(milliseconds[name])) for name, count in counts.items()}, seconds


def launches(work: Work, device: torch.device) -> int | None:
    """Kernels of one run; None where the profiler does not tell."""
    with suppress(RuntimeError):
        found, _ = kernels(work, device)
        return sum(count for count, _ in found.values()) or None
    return None


def errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest and root mean square difference to `exact`, which is float64 on the CPU, of its range."""
    apart, span = result.double().cpu() - exact, float(exact.max() - exact.min())
    return float(apart.abs().max()) / span, float(apart.square().mean().sqrt()) / span
