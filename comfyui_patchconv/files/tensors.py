"""Tensors in files of safetensors and of `torch.save`: checked before any is read, written whole or not at all."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Optional
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..memory.errors import is_out_of_memory
from .atomic import write_whole
from .words import short

Header = dict[str, tuple[str, tuple[int, ...]]]

FLOATS = {"F64", "F32", "F16", "BF16"}

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls torch's types."""

_MAX_HEADER = 100_000_000  # as safetensors itself has it

_MAX_DIMENSIONS = 64  # more, and torch's operators raise whatever they like

_PICKLES = {".bin", ".ckpt", ".pt", ".pth"}


def read_header(path: str | os.PathLike[str]) -> Header:
    """Type and shape of each tensor in a safetensors file, without reading any.

    Raises FileNotFoundError, or ValueError if the file is no safetensors file, cut short, or contradicts itself.
    """
    path = existing(path)
    _check_name(path)
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
                f"{path} is cut short or damaged: {short(name)} is said to lie at bytes {short(start, 20)} to "
                f"{short(stop, 20)} of {size - 8 - length}; download or export it again."
            )
    try:
        with safe_open(path, "pt"):  # its own checks: overlaps, gaps, sizes that do not match shapes
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({short(str(error))}): download or export it again.") from None
    return {name: (dtype, shape) for name, (dtype, shape, _, _) in tensors.items()}


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What a safetensors file says of itself, by name; nothing for a file of `torch.save`.

    Raises what `safe_open` does for a file that `read_header` refuses.
    """
    if Path(path).suffix.lower() in _PICKLES:
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    start, stop = entry["data_offsets"]
    numbers = (*entry["shape"], start, stop)
    if (
        not isinstance(entry["dtype"], str)
        or len(entry["shape"]) > _MAX_DIMENSIONS
        or any(type(number) is not int or number < 0 for number in numbers)
    ):
        raise TypeError
    return entry["dtype"], tuple(entry["shape"]), start, stop


def existing(path: str | os.PathLike[str]) -> Path:
    """`path`, if it is a file. Raises FileNotFoundError or ValueError if not."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the name and the folder.")
    if not path.is_file():
        raise ValueError(f"{path} is a {'folder' if path.is_dir() else 'device or a pipe'}: give a file.")
    return path


def _check_name(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a name that neither safetensors nor torch can open, whatever is in the file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{short(path)} has a name that is not UTF-8, by which it cannot be read: rename it."
        ) from None


def opened(path: Path, trust: bool = False) -> tuple[Header, Callable[[str], Tensor]]:
    """Type and shape of each tensor in a checkpoint, and the function that reads one. trust: see `unpickled`."""
    if path.suffix.lower() not in _PICKLES:
        return read_header(path), safe_open(path, "pt").get_tensor
    content = unpickled(existing(path), mmap=True, trust=trust)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if isinstance(content, Tensor):  # saved alone
        content = {"tensor": content}
    pairs = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): value for name, value in pairs if isinstance(value, Tensor) and is_usable(value)}
    header = {name: (_CODES.get(value.dtype, str(value.dtype)), tuple(value.shape)) for name, value in tensors.items()}
    return header, tensors.__getitem__


def unpickled(path: str | os.PathLike[str], mmap: bool = False, trust: bool = False) -> Any:
    """What a file of `torch.save` holds, on the CPU, if that is tensors, numbers, names and containers of them alone.

    mmap: leave on the disk what is not used.
    trust: read it on a torch that code hidden in it could get past, too. It is read as weights alone all the same.

    Raises OSError for a file that cannot be opened, and ValueError for one that is something else, for one in the form
    of torch before 1.6, and, unless trusted, for any on torch before 2.6.
    """
    _check_name(path)
    with open(path, "rb") as file:
        start = file.read(4)
    if start != b"PK\3\4" or not is_zipfile(path):  # torch goes by the start, a zip file by its end
        raise ValueError(
            f"{path} is damaged, or not in the form of torch.save since torch 1.6, which alone is read safely: save "
            "its tensors as a .safetensors file."
        )
    if not trust and not _loads_safely():
        raise ValueError(
            f"{path} can run code on torch {torch.__version__} (CVE-2025-32434): on torch 2.6 or newer load it with "
            "torch.load(weights_only=True), save the tensors with safetensors.torch.save_file and use that file, or "
            "give the command line --trust if you know who made it."
        )
    try:
        # A string: torch 2.1 maps no other paths.
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged or hostile pickle raises anything
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path} cannot be read safely, as weights alone ({type(error).__name__}): use a .safetensors file of it."
        ) from None


def _loads_safely() -> bool:
    """Whether `torch.load(weights_only=True)` keeps code in a file from running, as far as is known: from 2.6 on."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 6)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Optional[dict[str, str]] = None
) -> None:
    """Write `tensors` as a safetensors file, whole or not at all, one after another: none is copied on the CPU that is
    contiguous. Raises OSError where that cannot be."""

    def write(file: BinaryIO) -> None:
        order = sorted(tensors.items(), key=lambda pair: (-pair[1].element_size(), pair[0]))
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        start = 0
        for name, value in order:
            stop = start + value.numel() * value.element_size()
            header[name] = {"dtype": _CODES[value.dtype], "shape": list(value.shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in order:
            held = value.detach().cpu().contiguous()
            memory = ctypes.c_char * (held.numel() * held.element_size())
            file.write(memory.from_address(held.data_ptr()) if held.numel() else b"")

    write_whole(path, write)


def is_usable(value: Tensor) -> bool:
    """Whether a tensor of a pickle is an ordinary one, with values at hand: neither sparse, nor nested, nor on meta."""
    return (
        value.layout is torch.strided
        and not value.is_nested
        and value.device.type == "cpu"
        and value.dim() <= _MAX_DIMENSIONS
    )
