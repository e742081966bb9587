"""Time and peak memory of a piece of work, and what a convolution in strips takes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conv_helpers import run_python
from processes import until

from comfyui_patchconv.memory import usage
from comfyui_patchconv.memory.recorder import Recorder
from comfyui_patchconv.memory.usage import peak_resident, resident

PEAKS = """
import torch
from torch import nn
from comfyui_patchconv import convert_model
from comfyui_patchconv.memory.recorder import Recorder

torch.manual_seed(0)
conv, input = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 512, 1024)
peaks = []
with torch.inference_mode():
    for splits in (0, 32):
        if splits:
            convert_model(conv, splits, threshold=0)
        conv(input[..., :64, :])
        with Recorder() as recorder:
            output = conv(input)
        peaks.append(recorder.peak / output.nbytes)
        del output
print(*peaks)
"""


def test_strips_take_little_more_memory_than_the_output() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system has no /proc/self/clear_refs to reset a process's peak memory")
    whole, tiled = (float(peak) for peak in run_python(PEAKS).split())
    assert 1 <= tiled < 1.2
    assert whole > 1.5


def test_the_peak_outlives_the_memory() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system has no /proc/self/clear_refs to reset a process's peak memory")
    with Recorder() as recorder:
        block = torch.ones(48 << 20, dtype=torch.uint8)
        del block
    assert 40 << 20 <= recorder.peak < 64 << 20
    with Recorder() as recorder:
        pass
    assert recorder.peak < 8 << 20


def seen(recorder: Recorder) -> int:
    """The most bytes of its timeline so far."""
    return max((size for _, size in recorder.timeline), default=0)


def test_the_timeline_has_rising_times_and_sees_the_memory() -> None:
    with Recorder(interval=0.01) as recorder:
        block = torch.ones(48 << 20, dtype=torch.uint8)
        until(lambda: seen(recorder) >= 32 << 20)
        until(lambda: len(recorder.timeline) > 1)
    times, sizes = zip(*recorder.timeline, strict=True)
    assert list(times) == sorted(times)
    assert 0 < times[0] < times[-1]
    assert recorder.seconds > times[0]
    assert max(sizes) >= 32 << 20
    assert block.nbytes == 48 << 20


def test_samples_are_thinned_and_peaks_stay() -> None:
    with Recorder(interval=0.002, samples=16) as recorder:
        until(lambda: recorder.interval > 0.002)
        block = torch.ones(48 << 20, dtype=torch.uint8)
        until(lambda: seen(recorder) >= 32 << 20)
        del block
        interval = recorder.interval
        until(lambda: recorder.interval > interval)
        recorder.update()
        so_far = recorder.peak, recorder.seconds
    assert 4 <= len(recorder.timeline) < 16
    times = [at for at, _ in recorder.timeline]
    assert times == sorted(times)
    assert max(size for _, size in recorder.timeline) >= 32 << 20
    assert so_far[0] <= recorder.peak
    assert times[0] < so_far[1] <= recorder.seconds


def test_without_an_interval_there_is_no_timeline() -> None:
    with Recorder() as recorder:
        time.sleep(0.02)
    assert recorder.timeline == []


def test_an_exception_ends_the_measurement_and_passes() -> None:
    recorder = Recorder(interval=0.01)
    with pytest.raises(KeyError), recorder:
        raise KeyError
    count = len(recorder.timeline)
    time.sleep(0.05)
    assert len(recorder.timeline) == count


def test_resident_memory_is_at_most_its_peak() -> None:
    assert 0 < resident() <= peak_resident()


class Cuda:
    """Stands in for `torch.cuda`: notes which of its functions the recorder calls."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda device: self.called.append(name) or 0


@pytest.mark.parametrize("own_peak", [True, False])
def test_the_hosts_peak_counter_is_left_alone_unless_it_is_ours(
    own_peak: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = Cuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    with Recorder("cuda", own_peak=own_peak) as recorder:
        recorder.update()
    assert [name for name in cuda.called if name.startswith("reset")] == ["reset_peak_memory_stats"] * own_peak


def test_a_system_that_tells_no_peak_of_its_own_is_asked_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gVisor does, under which containers run in clouds."""
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmSize:\t100 kB\nVmRSS:\t50 kB\nThreads:\t1\n", encoding="utf-8")
    monkeypatch.setattr(usage, "_STATUS", status)
    assert resident() == 50 * 1024
    assert peak_resident() > 50 * 1024
    with Recorder() as recorder:
        pass
    assert recorder.seconds >= 0
