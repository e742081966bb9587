"""What a piece of work takes: time, peak memory, and memory over time. For a fresh process, one piece of work each."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Optional

import torch

_STATUS = Path("/proc/self/status")


class Recorder:
    """Measures the body of its `with` block; all figures are bytes beyond what was in use when it began.

    device: CUDA memory is read from torch's allocator, anything else as the resident memory of this process.
    interval: seconds between two samples of `timeline`, a list of (seconds, bytes); 0 for none.
    `peak` is exact (the kernel's or the allocator's high-water mark), `seconds` the wall time, device work included.
    """

    def __init__(self, device: torch.device | str = "cpu", interval: float = 0.0) -> None:
        self.device = torch.device(device)
        self.interval = interval
        self.timeline: list[tuple[float, int]] = []
        self.peak = 0
        self.seconds = 0.0
        self._end = threading.Event()

    def __enter__(self) -> Recorder:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_peak_resident()
        self._start_bytes, self._start = self._in_use(), time.perf_counter()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if self.interval:
            self._sampler.start()
        return self

    def __exit__(self, kind: Optional[type[BaseException]], error: object, trace: Optional[TracebackType]) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._start
        self._end.set()
        if self.interval:
            self._sampler.join()
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_resident()
        self.peak = max(peak - self._start_bytes, 0)

    def _in_use(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else resident()

    def _sample(self) -> None:
        while not self._end.wait(self.interval):
            self.timeline.append((time.perf_counter() - self._start, max(self._in_use() - self._start_bytes, 0)))


def resident() -> int:
    """Resident memory of this process in bytes; without `/proc`, by psutil."""
    if _STATUS.exists():
        return _status("VmRSS")
    import psutil

    return psutil.Process().memory_info().rss


def peak_resident() -> int:
    """The most bytes of resident memory that this process has had, since the last reset where that is possible."""
    if _STATUS.exists():
        return _status("VmHWM")
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak_resident() -> None:
    with contextlib.suppress(OSError, AttributeError):  # what earlier work freed would hide as much of what is to come
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # elsewhere the peak is the process's own: hence a fresh one for each case
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM back to VmRSS


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
