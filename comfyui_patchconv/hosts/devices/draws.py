"""Where random numbers stand: all processes of a call have to draw the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

States = list[Tensor]


def states(device: torch.device) -> States:
    """Of the generators of the CPU and of `device`."""
    own: Any = getattr(torch, device.type)
    return [torch.get_rng_state(), *([] if device.type == "cpu" else [own.get_rng_state(device)])]


def set_states(device: torch.device, given: States) -> None:
    """Set them to what they were, on this device or on another of its kind."""
    torch.set_rng_state(given[0])
    for state in given[1:]:
        getattr(torch, device.type).set_rng_state(state, device)
