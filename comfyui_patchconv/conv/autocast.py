"""The state of autocast, for what is computed later or elsewhere: it has to run as the call did."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_state(device_type: str) -> tuple[torch.dtype, bool]:
    """What `torch.autocast(device_type, …)` takes for the present state: the type, and whether it is on. torch before
    2.4 asks for it per device."""
    try:
        return torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    except (TypeError, AttributeError):
        if device_type == "cpu":
            return torch.get_autocast_cpu_dtype(), torch.is_autocast_cpu_enabled()
        return torch.get_autocast_gpu_dtype(), torch.is_autocast_enabled()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Within the block all is computed in the types that it has."""
    try:
        return torch.autocast(device_type, enabled=False)
    except RuntimeError:  # this device has none
        return nullcontext()
