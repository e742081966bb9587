"""A device `second` beside the CPU, whose tensors cannot be mixed with the CPU's, and that counts its bytes."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.backend_registration import (
    generate_methods_for_privateuse1_backend,
    rename_privateuse1_backend,
)
from torch.utils.cpp_extension import load

NAME = "second"


SOURCE = Path(__file__).with_suffix(".cpp")


def register_for_worker() -> None:
    """The same in a worker process, of what is built already."""
    register(Path(os.environ["SECOND_DEVICE"]))


def register(folder: Path) -> Any:
    """Build it in `folder` unless it lies there, and have torch know it. What it returns tells `now` and `peak` bytes,
    and can `reset_peak`.

    To build it needs a compiler and ninja; it stays until the process ends.
    """
    library = folder / "second_device.so"
    if library.exists():
        torch.ops.load_library(str(library))
    else:
        _build(library)
    functions = ctypes.CDLL(str(library))
    functions.start()
    rename_privateuse1_backend(NAME)
    module = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        manual_seed_all=lambda seed: None,
        _is_in_bad_fork=lambda: False,
        get_rng_state=lambda device=0: torch.zeros(1, dtype=torch.uint8),
        set_rng_state=lambda state, device=0: None,
        get_amp_supported_dtype=list,
    )
    torch._register_device_module(NAME, module)
    sys.modules[f"torch.{NAME}"] = module  # type: ignore[assignment]
    generate_methods_for_privateuse1_backend()
    for name in ("now_bytes", "peak_bytes"):
        getattr(functions, name).restype = ctypes.c_int64
    return SimpleNamespace(now=functions.now_bytes, peak=functions.peak_bytes, reset_peak=functions.reset_peak)


def _build(library: Path) -> None:
    """Build and load it, apart until it is whole: others may build it at the same time."""
    with tempfile.TemporaryDirectory(dir=library.parent) as apart:
        flags = ["-O1", "-w"]
        made = load("second_device", [str(SOURCE)], extra_cflags=flags, build_directory=apart, is_python_module=False)
        os.replace(str(made), library)
