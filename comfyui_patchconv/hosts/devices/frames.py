"""Messages with tensors over a pipe: a header, and the bytes of each tensor behind it."""

from __future__ import annotations

import ctypes
import pickle
import struct
from typing import Any, BinaryIO, NamedTuple, Optional

import torch
from torch import Tensor

from ...streaming.spread.ranks import bytes_of
from .packing import Looks, Packed

START = b"\x93patchconv answers\n"
"""Stands before the first message of a pipe into which others may have printed."""

_SIZE = struct.Struct("<Q")


class Frame(NamedTuple):
    """kind: what is asked or told. plain: numbers and texts. looks, received, rest: a value taken apart, whose tensors
    are flat bytes now."""

    kind: str
    plain: dict[str, Any]
    looks: list[Looks]
    received: list[Tensor]
    rest: bytes


def begin(file: BinaryIO) -> None:
    """Have messages begin here, in a pipe into which others may have printed."""
    file.write(START)
    file.flush()


def skip_to_start(file: BinaryIO) -> bool:
    """Leave behind what was printed before `begin`; False where that does not come."""
    last = b""
    while last != START:
        one = file.read(1)
        if not one:
            return False
        last = (last + one)[-len(START) :]
    return True


def write(file: BinaryIO, kind: str, plain: dict[str, Any], value: Optional[Packed] = None) -> None:
    """Write one message. Raises OSError where nobody reads any more."""
    looks, tensors, rest = ([], [], b"") if value is None else value
    header = pickle.dumps((kind, plain, looks, rest))
    file.write(_SIZE.pack(len(header)))
    file.write(header)
    for tensor in tensors:
        if tensor.numel():
            flat = bytes_of(tensor, torch.device("cpu"))
            file.write(_memory(flat))
    file.flush()


def read(file: BinaryIO) -> Optional[Frame]:
    """The next message, of the program at the other end, which has started this one or was started by it; None where
    there will be none."""
    size = file.read(_SIZE.size)
    if len(size) < _SIZE.size:
        return None
    header = file.read(_SIZE.unpack(size)[0])
    if len(header) < _SIZE.unpack(size)[0]:
        return None
    kind, plain, looks, rest = pickle.loads(header)
    received = []
    for look in looks:
        flat = torch.empty(look.bytes, dtype=torch.uint8, device="cpu")
        if flat.numel() and not _filled(file, flat):
            return None
        received.append(flat)
    return Frame(kind, plain, looks, received, rest)


def _filled(file: BinaryIO, flat: Tensor) -> bool:
    room, done = _memory(flat), 0
    while done < len(room):
        count = file.readinto(room[done:])  # type: ignore[attr-defined]
        if not count:
            return False
        done += count
    return True


def _memory(flat: Tensor) -> memoryview:
    """The memory of a flat tensor of bytes, which has to be there as long as this."""
    room = (ctypes.c_char * flat.numel()).from_address(flat.data_ptr())
    return memoryview(room).cast("B")
