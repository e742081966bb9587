"""Where random numbers stand: all processes of a call have to draw the same."""

from __future__ import annotations

from typing import Any

import torch

States = list[bytes]
"""Not tensors: these go into a message, and what reads a pickled one is `torch.load`, which hosts replace."""


def states(device: torch.device) -> States:
    """Of the generators of the CPU and of `device`."""
    own: Any = getattr(torch, device.type)
    found = [torch.get_rng_state(), *([] if device.type == "cpu" else [own.get_rng_state(device)])]
    return [bytes(state.tolist()) for state in found]


def set_states(device: torch.device, given: States) -> None:
    """Set them to what they were, on this device or on another of its kind."""
    first, *others = (torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in given)
    torch.set_rng_state(first)
    for state in others:
        getattr(torch, device.type).set_rng_state(state, device)
