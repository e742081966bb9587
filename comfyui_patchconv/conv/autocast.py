"""The state of autocast, for what is computed later or elsewhere: it has to run as the call did."""

from __future__ import annotations

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
