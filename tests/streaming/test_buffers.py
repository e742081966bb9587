"""Files that maps are kept in, and memory that is used again."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from comfyui_patchconv.streaming import Tuning
from comfyui_patchconv.streaming.execute.buffers import FileBuffer, is_borrowed, lasting

SMALL = Tuning(strip_bytes=20_000, allocator_bytes=0, always=True)


class TestFiles:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return tmp_path

    def test_nothing_is_left(self, folder: Path) -> None:
        buffer = FileBuffer(4 * 12)
        strips = [buffer.keep(torch.full((1, 2, 3), float(n))) for n in range(2)]
        assert [strip.unique().item() for strip in strips] == [0.0, 1.0]
        assert list(folder.iterdir()) == []

    def test_a_discarded_strip_leaves_its_neighbours(self) -> None:
        buffer = FileBuffer(3 * 4 * 5000)
        first, second, third = (buffer.keep(torch.full((5000,), float(n + 1))) for n in range(3))
        buffer.discard(second)
        assert first.unique().tolist() == [1.0]
        assert third.unique().tolist() == [3.0]

    def test_no_room_is_said_with_the_way_out(self) -> None:
        with pytest.raises(OSError, match=r"has no room for it \(.+\): have TMPDIR name .+, or raise the budget"):
            FileBuffer(1 << 63)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dim", [-2, -1])
def test_memory_that_is_used_again_is_no_strip_to_keep(device: str, dim: int) -> None:
    line = lasting(torch.empty(1, 4, 3, 5, device=device), dim)
    assert line.shape == (1, 4, 3, 5)
    assert is_borrowed(line)
    if hasattr(line.untyped_storage(), "resizable"):  # torch 2.1 cannot tell, and copies all
        assert not is_borrowed(torch.empty(1, 4, 3, 5, device=device))
