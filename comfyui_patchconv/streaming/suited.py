"""Bytes of a strip that suit a GPU: from its processors and its cache, by a short measurement on first use, and kept.

It takes less than half a second beside what the device's libraries take to start, in planning, never within a sweep.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from ..memory.sizes import STRIPS_AT_ONCE

VARIABLE = "PATCHCONV_CACHE"
"""Environment variable: the folder that figures are kept in, instead of `patchconv` in the user's for caches."""

LEAST, MOST = 4 << 20, 256 << 20
"""Bytes of a strip."""

_TILE_BYTES = 128 * 128 * 2
"""Of a map in half precision that a processor's kernel for convolutions makes at once: 128 pixels of 128 channels."""

_WAVES = (1, 2, 4, 8)
"""Tiles of a strip for each processor: with few of them, the last round leaves many processors idle."""

_SECONDS = 0.35
"""For all sizes that are tried, behind the first run of the first."""

_RUNS = 3
"""Of each size, of which the shortest counts."""

_ALIKE = 1.05
"""How much longer than the best a size may take that takes less memory."""

_WIDTH, _CHANNELS = 1024, 128
"""Of the map that is convolved: as a decoder of images has them at the end."""


class Traits(NamedTuple):
    """What a device is: its name, its multiprocessors, and bytes of the cache that they share (0 if not told)."""

    name: str
    processors: int
    cache: int


def traits_of(device: torch.device) -> Optional[Traits]:
    """Those of a CUDA or ROCm device that is here; None for others."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    found: Any = torch.cuda.get_device_properties(device)
    return Traits(found.name, found.multi_processor_count, getattr(found, "L2_cache_size", 0))


def candidates(traits: Traits) -> list[int]:
    """Bytes of strips to try, the smallest first: so many rounds of tiles, and what the cache has room for."""
    sizes = [STRIPS_AT_ONCE * waves * traits.processors * _TILE_BYTES for waves in _WAVES]
    return sorted({min(max(size, LEAST), MOST) for size in (*sizes, traits.cache)})


Clock = Callable[[Callable[[], object]], float]
"""Seconds that a piece of work takes."""


def clock_of(device: torch.device) -> Clock:
    """The device's own: between two events on CUDA."""

    def by_events(work: Callable[[], object]) -> float:
        with torch.cuda.device(device):  # whose stream events are recorded on
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1000

    def by_host(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return by_events if device.type == "cuda" else by_host


def measured(
    device: torch.device, sizes: Sequence[int], clock: Optional[Clock] = None, seconds: float = _SECONDS
) -> int:
    """The smallest of `sizes`, in rising order, with which rows take about as long as with the best one.

    Sizes for which no time was left are not tried. Raises what the device raises, as where memory runs out.
    """
    clock = clock or clock_of(device)
    of_rows: dict[int, float] = {}
    end: Optional[float] = None
    for size in sizes:
        work, rows = _work(device, size)
        clock(work)  # libraries choose their kernels
        end = end or time.monotonic() + seconds
        taken = []
        while len(taken) < _RUNS and (not taken or time.monotonic() < end):
            taken.append(clock(work))
        of_rows[size] = min(taken) / rows
        if time.monotonic() >= end:
            break
    best = min(of_rows.values())
    return next(size for size, each in of_rows.items() if each <= _ALIKE * best)


def _work(device: torch.device, size: int) -> tuple[Callable[[], Tensor], int]:
    """What a pass does to a strip, in small: a convolution, SiLU and a sum; and of how many rows."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    dtype = torch.float16 if fast else torch.float32
    rows = max(size // STRIPS_AT_ONCE // (_WIDTH * _CHANNELS * dtype.itemsize), 1)
    order = torch.channels_last if fast and torch.version.hip is None else torch.contiguous_format
    map = torch.zeros(1, _CHANNELS, rows + 2, _WIDTH, device=device, dtype=dtype).contiguous(memory_format=order)
    weight = torch.zeros(_CHANNELS, _CHANNELS, 3, 3, device=device, dtype=dtype)
    return lambda: F.silu(F.conv2d(map, weight, padding=(0, 1))) + map[:, :, 1:-1], rows


class Kept:
    """Figures in a file, by name; where it cannot be read or written, none are. path: None for the usual one."""

    def __init__(self, path: Optional[Path] = None) -> None:
        self._path = path

    @property
    def path(self) -> Path:
        return self._path or _folder() / "strips.json"

    def read(self) -> dict[str, int]:
        """All that are there."""
        with suppress(OSError, ValueError, RuntimeError):  # the last of a user without a home
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return {name: size for name, size in found.items() if type(size) is int and LEAST <= size <= MOST}
        return {}

    def write(self, name: str, size: int) -> None:
        """One more, whole or not at all."""
        with suppress(OSError, RuntimeError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, encoding="utf-8", delete=False) as file:
                beside = Path(file.name)
            try:
                beside.write_text(json.dumps(self.read() | {name: size}, indent=1), encoding="utf-8")
                beside.replace(self.path)
            finally:
                beside.unlink(missing_ok=True)


def _folder() -> Path:
    """The one for what programs keep of the user's."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    if sys.platform == "win32":
        usual = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        usual = Path.home() / "Library" / "Caches"
    else:
        usual = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(usual) / "patchconv"


class Suited:
    """What suits each device, found once. kept, traits, measure: what finds it, for who wants that otherwise."""

    def __init__(
        self, kept: Optional[Kept] = None, traits: Callable[[torch.device], Optional[Traits]] = traits_of,
        measure: Callable[[torch.device, Sequence[int]], int] = measured,
    ) -> None:  # fmt: skip
        self._kept, self._traits, self._measure = kept or Kept(), traits, measure
        self._found: dict[Traits, Optional[int]] = {}
        self._lock = threading.Lock()

    def strip_bytes(self, device: torch.device) -> Optional[int]:
        """Bytes of a strip that suit `device`; None where it is none that is measured, or that failed."""
        traits = self._traits(device)
        if traits is None:
            return None
        with self._lock:
            if traits not in self._found:
                self._found[traits] = self._find(device, traits)
            return self._found[traits]

    def _find(self, device: torch.device, traits: Traits) -> Optional[int]:
        name = (
            f"{traits.name}, {traits.processors} processors, {traits.cache} bytes of cache, torch {torch.__version__}"
        )
        size = self._kept.read().get(name)
        if size is None:
            try:
                with _disable_current_modes(), torch.inference_mode():
                    size = self._measure(device, candidates(traits))
            except RuntimeError:  # memory is short, or a library is not there: the next process may do it
                return None
            self._kept.write(name, size)
        return size


USUAL = Suited()
"""The one that calls ask."""
