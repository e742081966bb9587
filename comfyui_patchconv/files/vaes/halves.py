"""TAESD's encoder and decoder in files of their own, as its authors and ComfyUI have them: read as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Optional

from torch import Tensor

from ..tensors import Header, opened
from .tiny import DECODER, ENCODER

Read = Callable[[str], Tensor]

_FIRST = {ENCODER: ("0.weight", "1.conv.0.weight"), DECODER: ("1.weight", "3.conv.0.weight")}
"""Tensors that the first layers of each have; the decoder's very first has none."""

_WORDS = {ENCODER: "encoder", DECODER: "decoder"}

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def joined(path: Path, header: Header, read: Read, trust: bool) -> tuple[Header, Read]:
    """The tensors of a file, and how they are read; of a half of a TAESD with those of the other half, if that lies
    beside it, by ComfyUI's names. trust: see `tensors.unpickled`. Raises ValueError for a damaged other half."""
    part = _part_of(header)
    if part is None:
        return header, read
    sources: dict[str, Read] = {part: read}
    whole = {part + name: entry for name, entry in header.items()}
    other = ENCODER if part == DECODER else DECODER
    beside = _beside(path, _WORDS[part], _WORDS[other])
    if beside is not None:
        second, read_second = opened(beside, trust)
        if _part_of(second) != other:
            raise ValueError(
                f"{beside} lies beside {path.name} and is no TAESD's {_WORDS[other]}: put the right one there, or none."
            )
        sources[other] = read_second
        whole |= {other + name: entry for name, entry in second.items()}

    def read_either(name: str) -> Tensor:
        half = ENCODER if name.startswith(ENCODER) else DECODER
        return sources[half](name[len(half) :])

    return whole, read_either


def _part_of(header: Header) -> Optional[str]:
    """Which half these tensors are; None for anything else."""
    return next((part for part, names in _FIRST.items() if all(name in header for name in names)), None)


def _beside(path: Path, word: str, other: str) -> Optional[Path]:
    """The file of the other half: its name is the same but for that word."""
    if word not in path.stem.lower():
        return None
    at = path.stem.lower().rindex(word)
    stem = path.stem[:at] + other + path.stem[at + len(word) :]
    for suffix in dict.fromkeys((path.suffix, *_SUFFIXES)):
        found = path.with_name(stem + suffix)
        if found.is_file():
            return found
    return None
