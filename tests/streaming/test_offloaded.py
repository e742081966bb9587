"""Files that maps are kept in, and memory that is used again."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ended
from torch import Tensor
from torch.nn import functional as F

from comfyui_patchconv.memory.usage import anonymous
from comfyui_patchconv.streaming import Tuning, streamed
from comfyui_patchconv.streaming.execute import loop, pass_loop
from comfyui_patchconv.streaming.execute.tensors import is_borrowed, lasting
from comfyui_patchconv.streaming.execute.to_file import StripsInFile

SMALL = Tuning(strip_bytes=20_000, allocator_bytes=0, always=True)


class TestFiles:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return tmp_path

    def test_nothing_is_left(self, folder: Path) -> None:
        buffer = StripsInFile(4 * 12)
        strips = [buffer.offload(torch.full((1, 2, 3), float(n))) for n in range(2)]
        assert [strip.unique().item() for strip in strips] == [0.0, 1.0]
        assert list(folder.iterdir()) == []

    def test_a_discarded_strip_leaves_its_neighbours(self) -> None:
        buffer = StripsInFile(3 * 4 * 5000)
        first, second, third = (buffer.offload(torch.full((5000,), float(n + 1))) for n in range(3))
        buffer.discard(second)
        assert first.unique().tolist() == [1.0]
        assert third.unique().tolist() == [3.0]

    def test_no_room_is_said_with_the_way_out(self) -> None:
        with pytest.raises(OSError, match=r"has no room for it \(.+\): have TMPDIR name .+, or raise the budget"):
            StripsInFile(1 << 63)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_memory_that_is_used_again_is_no_strip_to_keep(device: str, order: torch.memory_format) -> None:
    rows = torch.empty(1, 4, 3, 5, device=device).contiguous(memory_format=order)
    line = lasting(rows)
    assert (line.shape, line.stride()) == (rows.shape, rows.stride())
    assert is_borrowed(line)
    assert line.untyped_storage().nbytes() <= rows.nbytes + 4  # a plan counts the rows alone
    if hasattr(line.untyped_storage(), "resizable"):  # torch 2.1 cannot tell, and copies all
        assert not is_borrowed(torch.empty(1, 4, 3, 5, device=device))


def test_what_a_pass_held_is_freed_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line buffers, and the maps that it stored and nothing reads any more."""
    passes: list[Any] = []
    alive: list[int] = []
    finish, apply = pass_loop.PassLoop.finish, loop.Loop._apply

    def finished(one_pass: Any) -> None:
        passes.append(weakref.ref(one_pass))
        finish(one_pass)

    def applied(self: Any, step: Any) -> None:
        alive.append(sum(one() is not None for one in passes))
        apply(self, step)

    monkeypatch.setattr(pass_loop.PassLoop, "finish", finished)
    monkeypatch.setattr(loop.Loop, "_apply", applied)
    weight = torch.randn(4, 4, 3, 3)

    def program(x: Tensor) -> Tensor:
        return F.conv2d(torch.fft.irfft2(torch.fft.rfft2(F.conv2d(x, weight))), weight)

    x = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        assert torch.allclose(streamed(program, tuning=SMALL)(x), program(x), atol=1e-3)
    assert passes
    assert alive
    assert not any(alive)


_CHUNKS = """
import gc, torch
from torch import nn
from torch.nn import functional as F
from comfyui_patchconv.memory.usage import anonymous
from comfyui_patchconv.streaming import Streamed, Tuning

convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(12))
kept = [None] * len(convs)

def chunk(x):
    for place, conv in enumerate(convs):
        x, kept[place] = F.silu(conv(x)), x if kept[place] is None else x + kept[place].mean()
    return x

runner = Streamed(tuning=Tuning(always=True))
with torch.inference_mode():
    runner.call(chunk, (torch.randn(1, 16, 64, 64),), {})
    kept = [None] * len(convs)
    before = anonymous()
    for _ in range(3):
        result = runner.call(chunk, (torch.randn(1, 16, 512, 512),), {})
        gc.collect()
    print(anonymous() - before - result.nbytes * (1 + len(kept)))
"""


def test_a_call_of_several_leaves_what_the_program_holds() -> None:
    """A video's chunks: what is freed once a call is over is no part of what the next one finds."""
    if not anonymous():
        pytest.skip("this system does not say what memory is a process's own (no /proc/self/statm)")
    done = ended(["-c", _CHUNKS])
    assert done.returncode == 0, done.stderr
    print(f"left beside what is held: {int(done.stdout) / 1e6:.0f} MB")
    assert int(done.stdout) < 100e6
