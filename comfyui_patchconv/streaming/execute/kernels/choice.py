"""Which kernels are used: what the environment says, and where Triton's can run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Optional, TypeVar

import torch

from ....memory.errors import is_out_of_memory

Result = TypeVar("Result")

VARIABLE = "PATCHCONV_KERNELS"
"""Environment variable: `auto` (Triton's on CUDA and ROCm devices, where Triton is installed; else comfy-kitchen's on
CUDA devices, where a host has imported it), `torch` (neither), `triton` (also on a CPU, where TRITON_INTERPRET=1 has
Triton interpret them), or `kitchen` (comfy-kitchen's, on any device)."""

_CHOICES = ("auto", "torch", "triton", "kitchen")

LEAST_TRITON = (3, 2)
"""The kernels never ran by an older one, which a torch for CUDA below 2.6 brings, and whose interpreter runs none."""


def uses_triton(device: torch.device) -> bool:
    """Whether chains on `device` are computed by Triton's kernels. Raises ValueError for a choice that is none."""
    choice = _choice()
    return choice in ("auto", "triton") and _works_on(device, choice) and has_triton()


def uses_kitchen(device: torch.device) -> bool:
    """Whether chains on `device` may be computed by comfy-kitchen's kernel, if that is there, and Triton is not. Raises
    as `uses_triton`."""
    choice = _choice()
    return choice == "kitchen" or (choice == "auto" and device.type == "cuda")


def _choice() -> str:
    choice = os.environ.get(VARIABLE, "") or "auto"
    if choice not in _CHOICES:
        raise ValueError(
            f"{VARIABLE}={choice} is none of {', '.join(_CHOICES)}: set it to one of these, or to nothing."
        )
    return choice


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


class Failures:
    """Why kernels failed, from when on none is asked any more. what: the beginning of the sentence that says so.

    seen: what the first one that failed said; empty while none has.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.seen: list[str] = []

    def attempt(self, work: Callable[[], Result]) -> Optional[Result]:
        """What `work` gives; None, behind one warning, where it fails. Raises what says that memory ran out."""
        try:
            return work()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            text = (str(error).strip().splitlines() or [""])[0]
            self.seen.append(f"{type(error).__name__}: {text[:200]}")
        warnings.warn(
            f"{self.what} ({self.seen[-1]}): PyTorch's operators do its work from now on. {VARIABLE}=torch has them do "
            "it from the beginning.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
