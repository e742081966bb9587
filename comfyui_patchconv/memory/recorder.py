"""What a piece of work takes: time, peak memory, and memory over time. For a fresh process, one piece of work each."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Optional

import torch

from .usage import peak_resident, reset_peak_resident, resident


class Recorder:
    """Measures the body of its `with` block; all figures are bytes beyond what was in use when it began.

    device: CUDA memory is read from torch's allocator, anything else as the resident memory of this process.
    interval: seconds between two samples of `timeline`, a list of (seconds, bytes); 0 for none.
    samples: where there are so many of them, the higher of each two neighbours stays and the interval doubles; 0 for
        any number.
    own_peak: set the CUDA allocator's high-water mark back at the start. False leaves that mark to the host around us,
        untouched: then `peak` is 0 where this work did not raise it. Without CUDA the kernel's mark of this process's
        resident memory is set back at the start in either case.
    `peak` is exact (the kernel's or the allocator's high-water mark), `seconds` the wall time, device work included.
    """

    def __init__(
        self, device: torch.device | str = "cpu", interval: float = 0.0, own_peak: bool = True, samples: int = 0
    ) -> None:
        self.device = torch.device(device)
        self.interval, self.own_peak, self.samples = interval, own_peak, samples
        self.timeline: list[tuple[float, int]] = []
        self.peak = 0
        self.seconds = 0.0
        self._end = threading.Event()

    def __enter__(self) -> Recorder:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            if self.own_peak:
                torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_peak_resident()
        self._peak_before = 0 if self.own_peak else self._peak()
        self._start_bytes, self._start = self._in_use(), time.perf_counter()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if self.interval:
            self._sampler.start()
        return self

    def __exit__(self, kind: Optional[type[BaseException]], error: object, trace: Optional[TracebackType]) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self._start
        self._end.set()
        if self.interval:
            self._sampler.join()
        self.update()
        self.seconds = seconds

    def update(self) -> None:
        """Set `peak` and `seconds` to what they are so far, from inside the block, without synchronising."""
        self.seconds = time.perf_counter() - self._start
        peak = self._peak()
        raised = peak - self._start_bytes if peak > self._peak_before else 0
        self.peak = max(raised, 0, *(size for _, size in self.timeline))  # the kernel's mark lags by some pages

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_resident()

    def _in_use(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else resident()

    def _sample(self) -> None:
        while not self._end.wait(self.interval):
            self.timeline.append((time.perf_counter() - self._start, max(self._in_use() - self._start_bytes, 0)))
            if self.samples and len(self.timeline) >= self.samples:
                self.timeline = thinned(self.timeline)
                self.interval *= 2


def thinned(timeline: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Half of the samples: the higher of each two neighbours, so that peaks stay."""
    return [max(timeline[first : first + 2], key=lambda sample: sample[1]) for first in range(0, len(timeline), 2)]
