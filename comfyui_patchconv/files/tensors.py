"""Tensors in files of safetensors and of `torch.save`: what is in them, checked before any is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..memory.errors import is_out_of_memory

Header = dict[str, tuple[str, tuple[int, ...]]]

FLOATS = {"F64", "F32", "F16", "BF16"}

_MAX_HEADER = 100_000_000  # as safetensors itself has it

_PICKLES = {".bin", ".ckpt", ".pt", ".pth"}


def read_header(path: str | os.PathLike[str]) -> Header:
    """Type and shape of each tensor in a safetensors file, without reading any.

    Raises FileNotFoundError, or ValueError if the file is no safetensors file, cut short, or contradicts itself.
    """
    path = existing(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(
                f"{path} is not a safetensors file, or is cut short: its first 8 bytes announce a header of {length} "
                f"bytes and the file has {size}; download or export it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        tensors = {name: _entry(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"{path} is not a safetensors file: its header is not the JSON that the format asks for; download or "
            "export it again."
        ) from None
    for name, (_, _, start, stop) in tensors.items():
        if not start <= stop <= size - 8 - length:
            raise ValueError(
                f"{path} is cut short or damaged: {short(name)} is said to lie at bytes {start} to {stop} of "
                f"{size - 8 - length}; download or export it again."
            )
    try:
        with safe_open(path, "pt"):  # its own checks: overlaps, gaps, sizes that do not match shapes
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({short(str(error))}): download or export it again.") from None
    return {name: (dtype, shape) for name, (dtype, shape, _, _) in tensors.items()}


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    start, stop = entry["data_offsets"]
    numbers = (*entry["shape"], start, stop)
    if not isinstance(entry["dtype"], str) or any(type(number) is not int or number < 0 for number in numbers):
        raise TypeError
    return entry["dtype"], tuple(entry["shape"]), start, stop


def existing(path: str | os.PathLike[str]) -> Path:
    """`path`, if it is a file. Raises FileNotFoundError or ValueError if not."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the name and the folder.")
    if not path.is_file():
        raise ValueError(f"{path} is a folder: give a file.")
    return path


def opened(path: Path) -> tuple[Header, Callable[[str], Tensor]]:
    """Type and shape of each tensor in a checkpoint, and the function that reads one."""
    if path.suffix.lower() not in _PICKLES:
        return read_header(path), safe_open(path, "pt").get_tensor
    content = unpickled(existing(path), mmap=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    pairs = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): value for name, value in pairs if isinstance(value, Tensor) and _is_dense(value)}
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header = {name: (kinds.get(value.dtype, str(value.dtype)), tuple(value.shape)) for name, value in tensors.items()}
    return header, tensors.__getitem__


def unpickled(path: str | os.PathLike[str], mmap: bool = False) -> Any:
    """What a file of `torch.save` holds, on the CPU, if that is tensors, numbers, names and containers of them alone.

    mmap: leave on the disk what is not used, where the file's form allows that.
    Raises OSError for a file that cannot be opened, and ValueError for one that is something else.
    """
    with open(path, "rb"):
        pass
    try:
        # A string: torch 2.1 maps no other paths.
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap and is_zipfile(path))
    except Exception as error:  # a damaged or hostile pickle raises anything
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path} cannot be read safely, as weights alone ({type(error).__name__}): use a .safetensors file of it."
        ) from None


def _is_dense(value: Tensor) -> bool:
    return value.layout is torch.strided and value.device.type == "cpu"


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first `most` of these names in one line, and how many more there are."""
    names = [short(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "no tensors"


def short(name: str) -> str:
    """`name`, which a stranger may have written, fit for one line."""
    return ascii(name)[1:-1][:80]
