"""Line buffers that are offloaded: of a video's frames, where the budget has no room for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conv_helpers import assert_same
from model_zoo import image
from network_helpers import Frames
from processes import ended
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.conv.halo import Axis
from comfyui_patchconv.memory.usage import anonymous
from comfyui_patchconv.streaming import Streamed, Tuning, call
from comfyui_patchconv.streaming.execute import pass_loop, to_host
from comfyui_patchconv.streaming.execute.copies import OneAfterTheOther
from comfyui_patchconv.streaming.execute.lines import Lines
from comfyui_patchconv.streaming.graph.node import Node
from comfyui_patchconv.streaming.graph.steps import Convolve, Resample
from comfyui_patchconv.streaming.plan.choose import choose
from comfyui_patchconv.streaming.plan.schedule import Pass
from comfyui_patchconv.streaming.plan.sweep import Sweep
from comfyui_patchconv.streaming.plan.way import Way
from comfyui_patchconv.streaming.record.operators import convolution

SMALL = Tuning(strip_bytes=20_000, allocator_bytes=0, always=True)


def called(model: nn.Module, x: Tensor, budget: Any = None) -> tuple[Tensor, Any]:
    runner = Streamed(budget, tuning=SMALL)
    with torch.no_grad():
        result = runner.call(model, (x,), {})
    assert runner.last is not None
    return result, runner.last


def test_a_budget_without_room_for_them_has_them_in_a_file() -> None:
    """To the same values; a budget that has room leaves them where they are."""
    model, x = Frames(), image(8, 24, 48, 32)
    expected, free = called(model, x)
    result, roomy = called(model, x, free.peak)
    assert roomy.offloaded == 0
    assert_same(result, expected, 1e-6)
    result, tightest = called(model, x, 1)
    assert_same(result, expected, 1e-6)
    budget = (roomy.peak + tightest.peak) // 2
    result, tight = called(model, x, budget)
    assert_same(result, expected, 1e-6)
    assert tightest.peak < tight.peak <= budget
    assert 0 < tight.offloaded < tightest.offloaded  # as few as will do


def test_more_frames_take_no_more_than_their_result() -> None:
    model, long = Frames(), image(8, 64, 96, 32)
    expected, free = called(model, long)
    _, few = called(model, long[:, :, :8], 1)
    result, bounded = called(model, long, 1)
    assert_same(result, expected, 1e-6)
    assert bounded.peak - few.peak <= result.nbytes
    gain = 0.67 if torch.__version__.startswith("2.1.") else 0.6  # without a budget a call takes less there
    assert bounded.peak < gain * free.peak


def test_strips_that_do_not_fit_are_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the middle of strips of more than one row: halves are tried, to the same values."""
    model, x = Frames(), image(8, 8, 48, 32)
    monkeypatch.setattr(convolution, "_CONVOLVE", (F.conv1d, F.conv2d, F.conv3d))  # as below: oneDNN rounds otherwise
    expected, free = called(model, x)
    calls = 0

    def limited(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 7 == 0 and x.shape[-2] > 3:
            raise MemoryError
        return F.conv3d(x, *args, **kwargs)

    monkeypatch.setattr(convolution, "_CONVOLVE", (F.conv1d, F.conv2d, limited))
    result, tight = called(model, x, free.peak // 2)
    assert tight.offloaded
    assert calls > 7
    assert_same(result, expected, 1e-6)


@pytest.mark.parametrize(("late", "begun_again"), [(2, True), (-1, False)])
def test_a_pass_is_begun_again_while_what_it_has_read_is_there(
    late: int, begun_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its second strip does not fit; or its last one, when the map that it reads is nearly freed."""
    torch.manual_seed(0)
    last = nn.Conv2d(8, 4, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), last
    ).requires_grad_(False)
    x, seen, fails_at = torch.randn(1, 8, 96, 16), [], -1

    def limited(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if weight.data_ptr() == last.weight.data_ptr():
            seen.append(None)
            if len(seen) == fails_at:
                raise MemoryError
        return F.conv2d(x, weight, *args, **kwargs)

    monkeypatch.setattr(convolution, "_CONVOLVE", (F.conv1d, limited, F.conv3d))
    called(model, x)
    strips = len(seen)
    assert strips > 4
    fails_at = late if late > 0 else strips + 1 + late
    seen.clear()
    if begun_again:
        result, _ = called(model, x)
        assert len(seen) > strips
        assert_same(result, model(x), 1e-6)
    else:
        with pytest.raises(MemoryError):
            called(model, x)


_OWN = """
import torch
from comfyui_patchconv.memory.usage import anonymous
from comfyui_patchconv.streaming import streamed
from network_helpers import Frames

torch.set_num_threads(1)
model, x = Frames(channels=16), torch.randn(1, 16, 96, 96, 96)
most = 0

def strip(done, planned):
    global most
    most = max(most, anonymous())

with torch.no_grad():
    streamed(model, budget=48 << 20)(x[:, :, :4])  # what a first call allocates for good
    for budget in (None, 48 << 20):
        most, before = 0, anonymous()
        streamed(model, budget=budget, on_progress=strip)(x)
        print((most - before) >> 20)
"""


def test_lines_in_a_file_are_no_memory_of_the_process() -> None:
    if not anonymous():
        pytest.skip("this system does not say what memory is a process's own (no /proc/self/statm)")
    done = ended(["-c", _OWN], PYTHONPATH=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    free, bounded = map(int, done.stdout.split())
    print(f"MiB of its own: {free} without a budget, {bounded} with one of 48")
    assert bounded < 0.75 * free


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offloaded", [True, False])
def test_what_is_kept_takes_the_place_of_what_was(offloaded: bool, dtype: torch.dtype) -> None:
    """Wherever it lies, and whatever its layout."""
    device = torch.device("cpu")
    node = Node(
        None, (), (), shape=(1, 4, 9, 5), strides=(180, 45, 5, 1), dtype=dtype, device=device, itemsize=4, dim=2
    )
    lines = Lines([node], {node: 4 * 4 * 5 * 4} if offloaded else {}, device)
    assert lines.read(node) is None
    first = torch.randn(1, 4, 4, 5).to(dtype)
    second = torch.randn(1, 4, 2, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    lines.keep(node, first, 2)
    memory = kept(lines, node).data_ptr()
    assert torch.equal(kept(lines, node), first)
    lines.keep(node, second, 2)
    assert torch.equal(kept(lines, node), second)
    assert kept(lines, node).data_ptr() == memory
    lines.drop(node)
    assert lines.read(node) is None


def kept(lines: Lines, node: Node) -> Tensor:
    rows = lines.read(node)
    assert rows is not None
    return rows


@pytest.mark.parametrize(("steps", "device", "helps"), [(2, "cpu", True), (2, "cuda", False), (9, "cuda", True)])
def test_lines_leave_only_where_that_helps(steps: int, device: str, helps: bool) -> None:
    """On their way to and from a device some of them are there twice: of a few that is more than all of them."""

    def node(*inputs: Node) -> Node:
        step = Convolve(Axis.of(3, 1, 1, 1), 64, 2, lambda pieces: pieces[0])
        return Node(
            step if inputs else None, inputs, (2,) * len(inputs), shape=(1, 8, 64, 64),
            strides=(8 * 64 * 64, 64 * 64, 64, 1), dtype=torch.float32, device=torch.device(device), itemsize=4, dim=2,
        )  # fmt: skip

    source = node()
    source.tensor = True
    order = [node(source)]
    for _ in range(steps - 1):
        order.append(node(order[-1]))
    sweep = Sweep(Way([order[-1]], order, {}), Tuning(1), budget=1)
    assert sweep.line_bytes == (steps - 1) * 2 * 8 * 64 * 4
    most = sweep.lines_to_offload(1 << 40)
    assert bool(most) == helps
    assert sweep.bytes_saved(most) > 0 or not helps
    assert sweep.lines_to_offload(0) == {}
    few = sweep.lines_to_offload(1)
    assert sweep.bytes_saved(few) >= int(helps)
    assert len(few) <= len(most)


def test_what_is_upsampled_has_no_line_buffer() -> None:
    """The rows that it is made of have one, of a quarter of the bytes."""

    def node(step: Any, side: int, *inputs: Node) -> Node:
        return Node(
            step, inputs, (2,) * len(inputs), shape=(1, 8, side, side), strides=(8 * side * side, side * side, side, 1),
            dtype=torch.float32, device=torch.device("cpu"), itemsize=4, dim=2,
        )  # fmt: skip

    def convolve(side: int) -> Convolve:
        return Convolve(Axis.of(3, 1, 1, 1), side, 2, lambda pieces: pieces[0])

    source = node(None, 64)
    source.tensor = True
    small = node(convolve(64), 64, source)
    large = node(Resample(2, 1, 64, 2, lambda piece: piece, repeats=(1, 1, 2, 2)), 128, small)
    last = node(convolve(128), 128, large)
    sweep = Sweep(Way([last], [small, large, last], {}), Tuning(1), None)
    assert sweep.way.buffered == [small]
    assert 0 < sweep.line_bytes <= 2 * small.row_bytes


class Counted(OneAfterTheOther):
    """Counts the copies that are started."""

    started = 0

    def start(self, target: Tensor, source: Tensor) -> OneAfterTheOther:
        self.started += 1
        return super().start(target, source)


def test_what_is_coming_already_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Counted()
    monkeypatch.setattr(to_host, "copies_of", lambda device: copies)
    node = Node(
        None, (), (), shape=(1, 4, 9, 5), strides=(180, 45, 5, 1), dtype=torch.float32, device=torch.device("cpu"),
        itemsize=4, dim=2,
    )  # fmt: skip
    memory, line = to_host.LinesOnHost(torch.device("cpu")), torch.randn(1, 4, 2, 5)
    for _ in range(2):
        memory.prefetch(node, line)
    assert copies.started == 1
    assert torch.equal(memory.fetch(node, line), line)


def _below_each_other(x: Tensor) -> Tensor:
    """Behind the seam the rows of a map are read once more."""
    first = F.conv2d(x, torch.ones(8, 8, 3, 3), padding=1)
    both = torch.cat([first[:, :, :90].tanh(), F.conv2d(first, torch.ones(8, 8, 3, 3), padding=1)], 2)
    return F.conv2d(both, torch.ones(1, 8, 3, 3), padding=1)


def test_line_buffers_are_counted_where_most_rows_are_kept() -> None:
    runner, x = Streamed(tuning=Tuning(strip_bytes=200_000, allocator_bytes=0, always=True)), torch.randn(1, 8, 300, 80)
    planned, kept = [], []

    def choosing(*args: Any, **kwargs: Any) -> Any:
        schedule = choose(*args, **kwargs)
        planned.extend(step.line_bytes for step in schedule.steps if isinstance(step, Pass))
        return schedule

    class Counted(Lines):
        def keep(self, node: Node, rows: Tensor, dim: int) -> None:
            super().keep(node, rows, dim)
            kept.append(sum(room.nbytes for room in self._rooms.values()))

    with torch.no_grad(), patch.object(call, "choose", choosing), patch.object(pass_loop, "Lines", Counted):
        assert_same(runner.call(_below_each_other, (x,), {}), _below_each_other(x), 1e-5)
    assert max(kept) >= 90 * 8 * 80 * 4
    assert max(kept) <= 1.2 * max(planned)
