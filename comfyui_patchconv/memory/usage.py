"""What memory is in use and what is free: of a device, and of this process."""

from __future__ import annotations

import contextlib
import mmap
import re
import sys
from pathlib import Path
from typing import Any, Optional

import torch

from .allocator import trim

_MEMINFO, _STATM, _STATUS = Path("/proc/meminfo"), Path("/proc/self/statm"), Path("/proc/self/status")


def free(device: torch.device) -> int:
    """Bytes that `device` can still give to this process; for a device that cannot tell, those of the host."""
    of_device: Any = getattr(torch, device.type, None)
    if hasattr(of_device, "mem_get_info"):
        unused = of_device.memory_reserved(device) - of_device.memory_allocated(device)
        return of_device.mem_get_info(device)[0] + unused
    return _of_host("available", "MemAvailable")


def total(device: torch.device) -> int:
    """Bytes that `device` has in all; for a device that cannot tell, those of the host."""
    of_device: Any = getattr(torch, device.type, None)
    if hasattr(of_device, "mem_get_info"):
        return of_device.mem_get_info(device)[1]
    return _of_host("total", "MemTotal")


def _of_host(name: str, field: str) -> int:
    """Bytes of the host's memory, by psutil's `name` where the system has no `field`."""
    if _MEMINFO.exists():
        found = re.search(rf"^{field}:\s+(\d+) kB$", _MEMINFO.read_text(encoding="utf-8"), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    import psutil

    return getattr(psutil.virtual_memory(), name)


def anonymous() -> int:
    """Bytes of memory that are this process's own; 0 where the system does not tell (proc(5), statm)."""
    if not _STATM.exists():
        return 0
    _, resident, shared, *_ = map(int, _STATM.read_text(encoding="utf-8").split())
    return (resident - shared) * mmap.PAGESIZE


def resident() -> int:
    """Resident memory of this process in bytes; without `/proc`, by psutil."""
    found = _status("VmRSS")
    if found is not None:
        return found
    import psutil

    return psutil.Process().memory_info().rss


def peak_resident() -> int:
    """The most bytes of resident memory that this process has had, since the last reset where that is possible."""
    found = _status("VmHWM")
    if found is not None:
        return found
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_resident() -> None:
    """Set `peak_resident` back to what is resident now, where that is possible."""
    trim()  # what earlier work freed would hide as much of what is to come
    with contextlib.suppress(OSError):  # elsewhere the peak is the process's own: hence a fresh one for each case
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): sets VmHWM back to VmRSS


def _status(field: str) -> Optional[int]:
    """Bytes that the system tells of this process; None where it does not: gVisor has no `VmHWM`."""
    if not _STATUS.exists():
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return None if found is None else int(found[1]) * 1024
