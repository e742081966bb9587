"""Tensors in files without a name, on systems that have more and fewer calls for them."""

from __future__ import annotations

import mmap
import os
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch

from comfyui_patchconv.memory.mapped import MappedFile

LACKING = {
    "Linux": [],
    "macOS": [(os, "posix_fallocate"), (mmap, "MADV_REMOVE")],
    "Windows": [(os, "posix_fallocate"), (os, "pwrite"), (mmap, "MADV_REMOVE")],
}
"""What systems have not, of what is used where it is there."""


def no_room(size: int, why: object) -> str:
    return f"no room for {size} bytes: {why}"


@pytest.fixture(params=LACKING)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For temporary files, on a system that lacks some calls."""
    for owner, name in LACKING[request.param]:
        monkeypatch.delattr(owner, name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_parts_hold_their_values_and_no_file_is_seen(folder: Path) -> None:
    file = MappedFile(2 * 4 * 6 + 3, no_room)
    first, second = (file.empty((2, 3), torch.float32).fill_(value) for value in (1, 2))
    third = file.empty((3,), torch.uint8).fill_(3)
    del file
    assert (first == 1).all()
    assert (second == 2).all()
    assert (third == 3).all()
    assert list(folder.iterdir()) == []


def test_a_large_part_takes_no_memory_of_python(folder: Path) -> None:
    size = 64 << 20
    file = MappedFile(size, no_room)
    tracemalloc.start()
    try:
        part = file.empty((size,), torch.uint8)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert part.nbytes == size
    assert peak < 4 << 20


def test_a_part_that_is_discarded_leaves_its_neighbours(folder: Path) -> None:
    file = MappedFile(3 * 4 * 5000, no_room)
    first, second, third = (file.empty((5000,), torch.float32).fill_(value) for value in (1, 2, 3))
    file.discard(second)
    assert (first == 1).all()
    assert (third == 3).all()


def test_bytes_that_are_written_are_the_next_part(tmp_path: Path) -> None:
    if not hasattr(os, "pwrite"):
        pytest.skip("this system has no os.pwrite")
    file = MappedFile(8, no_room)
    file.empty((4,), torch.uint8).zero_()
    assert file.filled(b"\x01\x02\x03\x04", (2, 2), torch.uint8).tolist() == [[1, 2], [3, 4]]


def test_room_that_is_missing_is_an_error_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "posix_fallocate") or not Path("/dev/shm").is_dir():
        pytest.skip("there is no os.posix_fallocate, or no small file system (/dev/shm) to ask for too much of")
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    size = os.statvfs("/dev/shm").f_frsize * os.statvfs("/dev/shm").f_bavail + (1 << 30)
    with pytest.raises(OSError, match=f"no room for {size} bytes: .*No space left"):
        MappedFile(size, no_room).empty((size,), torch.uint8)
