"""Which kernels are used: what the environment says, and where Triton's can run."""

from __future__ import annotations

import os
from functools import cache

import torch

VARIABLE = "PATCHCONV_KERNELS"
"""Environment variable: `auto` (Triton's on CUDA and ROCm devices, where Triton is installed), `torch` (never), or
`triton` (also on a CPU, where TRITON_INTERPRET=1 has Triton interpret them)."""

_CHOICES = ("auto", "torch", "triton")

LEAST_TRITON = (3, 2)
"""The kernels never ran by an older one, which a torch for CUDA below 2.6 brings, and whose interpreter runs none."""


def uses_triton(device: torch.device) -> bool:
    """Whether chains on `device` are computed by Triton's kernels. Raises ValueError for a choice that is none."""
    choice = os.environ.get(VARIABLE, "") or "auto"
    if choice not in _CHOICES:
        raise ValueError(
            f"{VARIABLE}={choice} is none of {', '.join(_CHOICES)}: set it to one of these, or to nothing."
        )
    if choice == "torch" or not _works_on(device, choice):
        return False
    return has_triton()


def _works_on(device: torch.device, choice: str) -> bool:
    if device.type == "cpu":
        return choice == "triton" and interprets()
    return device.type == "cuda" and not interprets()


def interprets() -> bool:
    """Whether Triton interprets its kernels, on the CPU, rather than compile them."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def has_triton() -> bool:
    """Whether Triton can be imported, of a version that the kernels have run by."""
    try:
        import triton
        import triton.language  # type: ignore[import-not-found]

        major, minor = map(int, triton.__version__.split(".")[:2])
    except Exception:  # one that is broken is as none
        return False
    return (major, minor) >= LEAST_TRITON
