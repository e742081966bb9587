"""Files that maps are kept in, and memory that is used again."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_helpers import assert_same
from model_zoo import draw_weights, image, kl, wan
from torch import Tensor

from comfyui_patchconv.streaming import Streamed, Tuning, stream
from comfyui_patchconv.streaming.execute.buffers import FileBuffer, is_borrowed, lasting

SMALL = Tuning(strip_bytes=20_000, allocator_bytes=0, always=True)


def bytes_of_files(folder: Path) -> int:
    """What the open files without a name in `folder` take on the disk."""
    taken: dict[int, int] = {}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # of the listing itself, closed by now
            if os.readlink(link).startswith(f"{folder}/"):
                taken[link.stat().st_ino] = link.stat().st_blocks * 512
    return sum(taken.values())


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

    def test_room_that_is_just_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model: Any = draw_weights(kl(4))
        latent, runner = image(4, 19, 16), Streamed(1, tuning=SMALL)
        with torch.no_grad():
            runner.call(model.decode, (latent,), {})
            assert runner.last is not None
            needed = runner.last.elsewhere
            usage = shutil.disk_usage(tempfile.gettempdir())
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
            runner = Streamed(1, tuning=SMALL)
            runner.call(model.decode, (latent,), {})
        assert needed
        assert runner.last is not None
        assert runner.last.work

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what files take is read from /proc/self/fd")
    def test_files_take_what_is_expected(self, folder: Path) -> None:
        model: Any = draw_weights(kl(4))
        taken: list[int] = []
        tuning = Tuning(strip_bytes=2_000_000, allocator_bytes=0, always=True)
        runner = Streamed(1, on_progress=lambda *steps: taken.append(bytes_of_files(folder)), tuning=tuning)
        with torch.no_grad():
            runner.call(model.decode, (image(4, 96, 96),), {})
        assert runner.last is not None
        assert 0.95 * runner.last.elsewhere < max(taken) < 1.05 * runner.last.elsewhere
        assert bytes_of_files(folder) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dim", [-2, -1])
def test_memory_that_is_used_again_is_no_strip_to_keep(device: str, dim: int) -> None:
    line = lasting(torch.empty(1, 4, 3, 5, device=device), dim)
    assert line.shape == (1, 4, 3, 5)
    assert is_borrowed(line)
    if hasattr(line.untyped_storage(), "resizable"):  # torch 2.1 cannot tell, and copies all
        assert not is_borrowed(torch.empty(1, 4, 3, 5, device=device))


def test_frames_that_a_model_keeps_become_tensors() -> None:
    """Wan decodes frame by frame and hands its decoder a list, in which each convolution keeps frames for the next."""
    model: Any = draw_weights(wan())
    latent = image(16, 3, 7, 6)
    kept: list[Any] = []
    with torch.no_grad():
        expected = model.decode(latent, return_dict=False)[0]
        with stream(model.decoder, tuning=SMALL):
            streamed_forward = model.decoder.forward

            def watch(*args: Any, **kwargs: Any) -> Any:
                kept[:] = [kwargs["feat_cache"]]
                result = streamed_forward(*args, **kwargs)
                kept[:] = list(kwargs["feat_cache"])
                return result

            model.decoder.forward = watch
            result = model.decode(latent, return_dict=False)[0]
    assert_same(result, expected, 1e-5)
    frames = [one for one in kept if isinstance(one, Tensor)]
    assert frames
    assert all(type(one) is Tensor for one in frames)
