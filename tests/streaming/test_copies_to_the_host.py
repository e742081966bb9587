"""Copies to the host and back run beside the device's work: what is used has arrived, what leaves is kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import pytest
import torch
from conv_helpers import assert_same
from model_zoo import draw_weights, image, kl
from torch import Tensor

from comfyui_patchconv.streaming import Tuning, expect, stream
from comfyui_patchconv.streaming.execute import stored
from comfyui_patchconv.streaming.execute.copies import OneAfterTheOther, SideStreams
from comfyui_patchconv.streaming.execute.stored import StoredStrips
from comfyui_patchconv.streaming.execute.to_host import StripsOnHost
from comfyui_patchconv.streaming.graph.node import Node
from comfyui_patchconv.streaming.plan.schedule import STRIPS_LEAVING

SMALL = Tuning(strip_bytes=20_000, always=True)
NOTHING = float("nan")


class Late:
    """Copies of a device that makes each as late as it may: when somebody waits for it.

    Until then there is nothing where it goes; where it comes from may have changed, or be gone.
    """

    def __init__(self) -> None:
        self.started, self.done = 0, 0
        self.most_at_once = 0
        self._kept: list[Tensor] = []
        self._brought: list[weakref.ref[Tensor]] = []

    def on_device(self) -> list[Tensor]:
        """What was brought there, and is there still."""
        return [tensor for tensor in (reference() for reference in self._brought) if tensor is not None]

    def room(self, like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).fill_(NOTHING)

    def start(self, target: Tensor, source: Tensor) -> LateArrival:
        self.started += 1
        self.most_at_once = max(self.most_at_once, self.started - self.done)
        if any(source is one for one in self._kept):
            self._brought.append(weakref.ref(target))
        else:
            self._kept.append(target)
        return LateArrival(self, target.fill_(NOTHING), source)

    def await_on_device(self, arrival: Any) -> None:
        arrival.synchronize()


class LateArrival:
    def __init__(self, copies: Late, target: Tensor, source: Tensor) -> None:
        self._copies: Optional[Late] = copies
        self._ends = weakref.ref(target), weakref.ref(source)

    def synchronize(self) -> None:
        if self._copies is not None:
            target, source = (end() for end in self._ends)
            assert target is not None, "memory that a copy still writes to went"
            assert source is not None, "memory that a copy still reads went"
            target.copy_(source)
            self._copies.done += 1
            self._copies = None


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    """The copies of all strips that a schedule has are offloaded."""
    copies = Late()
    monkeypatch.setattr(stored, "strips_for", lambda device, size, dim: StripsOnHost(copies, dim))
    return copies


def map_like(values: Tensor) -> Node:
    return Node(
        None, (), (), shape=values.shape, strides=values.stride(), dtype=values.dtype, device=values.device,
        itemsize=values.itemsize, dim=2,
    )  # fmt: skip


def a_map(strips: int) -> tuple[StoredStrips, Tensor]:
    """A map of strips of two rows, and its values."""
    values = torch.randn(1, 3, 2 * strips, 4)
    found = StoredStrips(map_like(values), offloaded=True, count=lambda size: None, band=(0, 2 * strips))
    for first in range(0, 2 * strips, 2):
        found.append(values[:, :, first : first + 2].clone())
    return found, values


def test_one_strip_leaves_while_the_next_is_computed(late: Late) -> None:
    found, _ = a_map(strips=5)
    assert late.most_at_once == STRIPS_LEAVING
    assert late.started - late.done == STRIPS_LEAVING
    del found


def test_one_strip_comes_while_the_one_before_is_read(late: Late) -> None:
    found, values = a_map(strips=5)
    assert torch.equal(found.read(0, 2), values[:, :, :2])
    assert late.done == 5 + 1
    assert late.started == 5 + 2
    for first in range(2, 10, 2):
        assert torch.equal(found.read(first, first + 2), values[:, :, first : first + 2])
        assert len(late.on_device()) <= 2
    assert late.started == late.done == 5 + 5
    assert not late.on_device()


@pytest.mark.parametrize("reads", [[(0, 3), (2, 7), (6, 12)], [(3, 4), (0, 12)], [(11, 12), (0, 1), (4, 9)], [(0, 12)]])
def test_rows_of_any_strips_have_arrived(late: Late, reads: list[tuple[int, int]]) -> None:
    found, values = a_map(strips=6)
    for first, last in reads:
        assert torch.equal(found.read(first, last), values[:, :, first:last])
    assert torch.equal(found.read(0, 12), values)


def test_strips_that_were_freed_leave_the_others(late: Late) -> None:
    found, values = a_map(strips=6)
    found.read(0, 5)
    found.free(5)
    for first, last in ((4, 7), (6, 12)):
        assert torch.equal(found.read(first, last), values[:, :, first:last])


def test_a_part_of_other_memory_is_copied_before_that_changes(late: Late) -> None:
    line = torch.ones(1, 1, 5, 4)
    part = line.narrow(-2, 0, 2)
    found = StoredStrips(map_like(part), offloaded=True, count=lambda size: None, band=(0, 2))
    found.append(part)
    line.zero_()
    assert found.read(0, 2).unique().item() == 1.0


def test_a_part_that_repeats_has_memory_of_its_own() -> None:
    strip = torch.randn(2, 1, 4, 5).expand(2, 3, 4, 5)
    assert torch.equal(StripsOnHost(OneAfterTheOther()).offload(strip), strip)


def test_a_strip_on_its_way_to_the_device_that_nobody_reads_is_waited_for(late: Late) -> None:
    found, _ = a_map(strips=3)
    found.read(0, 2)
    del found
    gc.collect()
    assert late.started == late.done == 3 + 2


def test_where_the_device_has_no_room_a_strip_comes_later(late: Late, monkeypatch: pytest.MonkeyPatch) -> None:
    found, values = a_map(strips=3)
    empty_like, asked = torch.empty_like, []

    def short(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(args)
        if len(asked) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return empty_like(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_like", short)
    for first in range(0, 6, 2):
        assert torch.equal(found.read(first, first + 2), values[:, :, first : first + 2])
    assert len(asked) == 3 + 1


@pytest.mark.parametrize("share", [0, 2])
def test_a_decoder_reads_nothing_too_early(late: Late, share: int) -> None:
    """share: of its peak without a budget, that it may take; 0 to have all maps offloaded."""
    model: Any = draw_weights(kl(4))
    latent = image(4, 33, 16)
    free = expect(model, lambda copy, make: copy.decode(make(latent.shape)), device=latent.device, tuning=SMALL).peak
    with torch.no_grad():
        expected = model.decode(latent).sample
        with stream(model.decoder, budget=free // share if share else 1, tuning=SMALL):
            result = model.decode(latent).sample
    assert_same(result, expected, 1e-5)
    assert late.started >= 20
    assert late.most_at_once >= STRIPS_LEAVING


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_copies_of_other_devices_are_done_at_once(memory_format: torch.memory_format) -> None:
    strip = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    kept = StripsOnHost(OneAfterTheOther()).offload(strip)
    assert torch.equal(kept, strip)
    assert kept.stride() == strip.stride()
    assert kept.data_ptr() != strip.data_ptr()


class Stream:
    """Of a GPU that is not there: it notes what it is told to do."""

    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self.done = name, done

    def wait_stream(self, other: Stream) -> None:
        self.done.append(f"{self.name} waits for all of {other.name}")

    def wait_event(self, event: str) -> None:
        self.done.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        return f"the copy on {self.name}"


def test_each_way_has_a_stream_that_waits_for_the_work_before(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    names = iter(["out", "back"])
    work = Stream("work", done)

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        done.append(f"on {stream.name}:")
        yield
        done.append(f"{stream.name} ends")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(names), done))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    copies = SideStreams(torch.device("cuda", 0))
    here, there = torch.ones(2, 3), torch.empty(2, 3, device="meta")
    copies.start(torch.zeros(2, 3), here)
    assert done == ["out waits for all of work", "on out:", "out ends"]
    done.clear()
    copies.await_on_device(copies.start(there, here))
    assert done == ["back waits for all of work", "on back:", "back ends", "work waits for the copy on back"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_streams_of_cuda_keep_the_order() -> None:
    model: Any = draw_weights(kl(4)).cuda()
    latent = image(4, 64, 64).cuda()
    expected = model.decode(latent).sample
    for _ in range(10):
        with stream(model.decoder, budget=1, tuning=SMALL):
            result = model.decode(latent).sample
        assert_same(result, expected, 1e-4)  # cuDNN's convolutions of strips and of whole maps differ by so much
