"""Where stored maps and line buffers lie that a device shall not hold: host memory, or a file where it is the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Union

import torch

from ...memory.usage import free
from ..graph.node import Node
from .copies import copies_of
from .to_file import LinesInFile, StripsInFile, free_on_disk
from .to_host import LinesOnHost, StripsOnHost

OffloadedStrips = Union[StripsOnHost, StripsInFile]
OffloadedLines = Union[LinesOnHost, LinesInFile]


def strips_for(device: torch.device, size: int, dim: int = -2) -> OffloadedStrips:
    """Where a map of `size` bytes lies that `device` shall not hold, and that comes in rows along `dim`."""
    return StripsInFile(size) if device.type == "cpu" else StripsOnHost(copies_of(device), dim)


def room(device: torch.device) -> int:
    """Bytes of what does not fit on `device` that there is room for."""
    return free_on_disk() if device.type == "cpu" else free(torch.device("cpu"))


def lines_for(device: torch.device, sizes: Mapping[Node, int]) -> OffloadedLines:
    """Where line buffers of so many bytes lie."""
    return LinesInFile(sizes.values()) if device.type == "cpu" else LinesOnHost(device)
