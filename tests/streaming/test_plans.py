"""Whatever a budget says, the result is the same; and what a schedule expects to take is what it is told to take."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional
from unittest.mock import patch

import pytest
import torch
from allocations import allocated
from conv_helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import CASES, draw_weights, image, kl, wan
from network_helpers import random_network, run_network
from torch import Tensor, nn

from comfyui_patchconv.files.vae import random_vae
from comfyui_patchconv.memory.sizes import allocator_bytes
from comfyui_patchconv.streaming import Streamed, Tuning, call, expect, peak_activations, stream, streamed
from comfyui_patchconv.streaming.call import Call
from comfyui_patchconv.streaming.graph import steps
from comfyui_patchconv.streaming.graph.node import Node
from comfyui_patchconv.streaming.plan import choose as choosing
from comfyui_patchconv.streaming.plan.eagerly import eager_schedule
from comfyui_patchconv.streaming.plan.passes import Passes
from comfyui_patchconv.streaming.plan.schedule import Schedule

from .comparing import KEPT_ARE_ORDINARY

SMALL = Tuning(strip_bytes=20_000, allocator_bytes=0, always=True)
CPU = torch.device("cpu")
X_LARGE = torch.randn(1, 8, 128, 128, generator=torch.Generator().manual_seed(1))


def called(function: Any, *args: Any, budget: Optional[int] = None, tuning: Tuning = SMALL) -> tuple[Any, Call]:
    """What a streamed call gives, and what it took."""
    runner = Streamed(budget, tuning=tuning)
    with torch.no_grad():
        result = runner.call(function, args, {})
    assert runner.last is not None
    return result, runner.last


def schedules_of(recomputed_from: Optional[int]) -> Any:
    """In the place of `choose`: no choice, but what is recomputed wherever it is read is given."""

    def plan(
        roots: Sequence[Node], keep: Sequence[Node], tuning: Tuning, budget: Optional[int], held: int, room: Any,
        ranks: int,
    ) -> Schedule:  # fmt: skip
        schedule = Passes(roots, keep, tuning, budget, recomputed_from, held, ranks=ranks).plan()
        assert schedule is not None
        return schedule

    return patch.object(call, "choose", plan)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 500, 4_000]),
    st.one_of(st.none(), st.integers(1, 40_000)),
    st.one_of(st.none(), st.integers(1, 10_000)),
)
def test_the_result_never_depends_on_the_schedule(
    seed: int, strip_bytes: int, budget: Optional[int], recomputed_from: Optional[int]
) -> None:
    operators, channels = random_network(seed)
    x = torch.randn(2, channels, 13, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = run_network(operators, x.clone(), 2)
    tuning = Tuning(strip_bytes, allocator_bytes=0, always=True)
    with schedules_of(recomputed_from):
        result, _ = called(lambda map: run_network(operators, map, 2), x.clone(), budget=budget, tuning=tuning)
    assert_same(result, expected, 1e-9)


@pytest.mark.parametrize("budget", [None, 1, 300_000, 10**9])
@pytest.mark.parametrize("name", ["kl decode", "kl encode", "tiny decode", "hunyuan decode", "qwen encode"])
def test_an_estimate_is_what_the_call_plans(name: str, budget: Optional[int]) -> None:
    build, _, input = CASES[name]
    model: Any = draw_weights(build())
    kind = name.split()[1]
    expected = expect(
        model, lambda copy, make: getattr(copy, kind)(make(input.shape)), device=CPU, budget=budget, tuning=SMALL
    )
    runner = Streamed(budget, tuning=SMALL)
    with torch.no_grad():
        eager = getattr(model, kind)(input)
        ours = runner.call(getattr(model, kind), (input,), {})
    assert runner.last is not None
    assert runner.last.planned == expected.work
    assert runner.last.peak <= expected.peak
    if name != "qwen encode":  # which keeps frames in lists of its own, that the estimate counts beside
        assert (runner.last.peak, runner.last.offloaded) == (expected.peak, expected.offloaded)
    assert runner.last.work == runner.last.planned
    pair = [value.sample if kind == "decode" else value.latent_dist.parameters for value in (ours, eager)]
    assert_same(pair[0], pair[1], 1e-5)


def test_a_budget_moves_maps() -> None:
    model: Any = draw_weights(kl(4))
    run = lambda copy, make: copy.decode(make((1, 4, 64, 64)))  # noqa: E731
    free = expect(model, run, device=CPU, tuning=SMALL)
    tight = expect(model, run, device=CPU, tuning=SMALL, budget=free.peak * 3 // 4)
    assert free.offloaded == 0 < tight.offloaded
    assert tight.peak <= free.peak * 3 // 4


@pytest.mark.parametrize("budget", [None, 1, 400_000])
@pytest.mark.parametrize("kind", ["decode", "encode"])
def test_a_call_allocates_no_more_than_it_expects(kind: str, budget: Optional[int]) -> None:
    """Measured where torch allocates; beside it what is copied of a kernel, as a backend orders it and, behind
    upsampling, summed. Lines between strips, which count in the peak, are not allocated by torch."""
    model: Any = draw_weights(kl(4))
    runner, input = Streamed(budget, tuning=SMALL), image(*((4, 40, 40) if kind == "decode" else (3, 80, 80)))
    with torch.no_grad():
        runner.call(getattr(model, kind), (input,), {})  # what is allocated once in a process
        _, memory = allocated(lambda: runner.call(getattr(model, kind), (input,), {}))
    assert runner.last is not None
    kernel = max(parameter.nbytes for parameter in model.parameters())
    assert 0.4 * runner.last.peak < memory.peak <= 1.05 * runner.last.peak + kernel * 25 // 9


F = torch.nn.functional
NARROWING: dict[str, tuple[tuple[int, ...], Any]] = {
    "image": ((1, 64, 200, 150), lambda x: F.conv2d(x, KERNEL_OF_64, stride=4, padding=1)),
    "image, stride 1": ((1, 64, 200, 150), lambda x: F.conv2d(x, KERNEL_OF_64, padding=1)),
    "half": ((1, 64, 200, 150), lambda x: F.conv2d(x.bfloat16(), KERNEL_OF_64.bfloat16(), stride=2, padding=1)),
    "sound": ((1, 32, 40_000), lambda x: F.conv1d(x, torch.ones(2, 32, 16), stride=8, padding=4)),
    "video": ((1, 8, 9, 120, 90), lambda x: F.conv3d(x, torch.ones(1, 8, 3, 4, 4), stride=(1, 4, 4), padding=1)),
    "pool": ((1, 8, 400, 300), lambda x: F.max_pool2d(x, 9, 8, 4)),
    "stored": ((1, 8, 400, 300), lambda x: _whole_in_a_branch(F.conv2d(x, torch.ones(8, 8, 3, 3), padding=1))),
}
"""Steps that read more of an argument, or of a map that is stored, than they make."""

KERNEL_OF_64 = torch.ones(1, 64, 3, 3)


def _whole_in_a_branch(map: Tensor) -> Tensor:
    """Each row of the branch is made of a quarter of the map, which the rest reads row by row."""
    branch = F.interpolate(F.adaptive_avg_pool2d(map, (4, 4)), size=map.shape[2:])
    return map * torch.sigmoid(map.mean((2, 3), keepdim=True)) + branch


@pytest.mark.parametrize("name", NARROWING)
def test_what_a_strip_reads_and_copies_of_stored_maps_is_expected(name: str) -> None:
    shape, function = NARROWING[name]
    runner, x = Streamed(tuning=SMALL), torch.randn(shape)
    with torch.no_grad():
        expected = function(x)
        runner.call(function, (x,), {})  # what is allocated once in a process
        result, memory = allocated(lambda: runner.call(function, (x,), {}))
    assert runner.last is not None
    assert_same(result, expected, 1e-5 if result.dtype == torch.float32 else 1e-2)
    if name == "stored":  # the result grows as that is freed, in memory that is allocated at once
        assert runner.last.peak >= x.nbytes * 5 / 4
    else:
        assert memory.peak <= 1.25 * runner.last.peak
        assert memory.peak - result.nbytes <= x.nbytes / 3


def _sorted(x: Tensor) -> Tensor:
    values, places = x.sin().sort(1)
    return values.sum(1) + places.sum(1)


def _written_to_at_once(x: Tensor) -> Tensor:
    y = F.conv2d(x, KERNEL_OF_8, padding=1)
    y.as_strided((8, 10), (1, 1)).add_(1)  # memory from now on, and no deferred map
    values = y.sort(1)[0]
    y[:, 0] = values[:, 1]
    return F.conv2d(y, KERNEL_OF_8, padding=1).sin() + F.conv2d(values, KERNEL_OF_8, padding=1)


KERNEL_OF_8 = torch.ones(8, 8, 3, 3) / 8


@pytest.mark.parametrize("function", [_sorted, _written_to_at_once], ids=lambda function: function.__name__)
def test_what_is_computed_at_once_is_expected(function: Any) -> None:
    with torch.no_grad():
        expected = function(X_LARGE)
        called(function, X_LARGE, tuning=Tuning())  # what is allocated once in a process
        (result, last), memory = allocated(lambda: called(function, X_LARGE, tuning=Tuning()))
    assert_same(result, expected, 1e-5)
    assert 0.75 * last.peak < memory.peak <= 1.01 * last.peak


@pytest.mark.parametrize("stride", [1, 2])
def test_what_a_convolution_of_frames_pads_at_once_is_expected(stride: int) -> None:
    x, weight = torch.randn(1, 32, 8, 64, 64), torch.randn(64, 32, 3, 3, 3)

    def function(x: Tensor) -> Tensor:
        return F.conv3d(x * 2, weight, stride=stride, padding=1)

    def eagerly(roots: Any, keep: Any, tuning: Any, budget: Any, held: int, *_: Any) -> Schedule:
        return eager_schedule(roots, keep, held)

    with torch.no_grad(), patch.object(call, "choose", eagerly):
        called(function, x, tuning=Tuning())  # what is allocated once in a process
        (_, last), memory = allocated(lambda: called(function, x, tuning=Tuning()))
    assert memory.peak <= 1.01 * last.peak


@pytest.mark.parametrize("channels", [1, 3])
def test_a_cpu_convolves_whole_blocks_of_channels(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN has them side by side in memory of its own: of one channel, as much as of 16 with AVX-512."""
    monkeypatch.setattr(steps, "channels_together", lambda: 16)
    model, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(1, channels, 256, 256)
    of_eager = expect(model, lambda copy, make: copy(make(x.shape)), device=CPU)
    assert not of_eager.in_strips
    assert of_eager.peak >= x.nbytes + 16 * 256 * 256 * 4
    _, of_strips = called(model, x, tuning=Tuning(strip_bytes=6 * 10 * 16 * 256 * 4, allocator_bytes=0, always=True))
    assert of_strips.rows == 10
    assert of_strips.peak >= x.nbytes + 16 * 10 * 256 * 4


def test_the_largest_map_is_left_unstored_where_that_lowers_the_peak() -> None:
    model: Any = draw_weights(kl(4))
    latent = image(4, 64, 64)
    _, chosen = called(model.decode, latent)
    with schedules_of(None):
        _, stored = called(model.decode, latent)
    assert chosen.peak < 0.95 * stored.peak
    assert chosen.planned > stored.planned


@KEPT_ARE_ORDINARY
def test_frames_that_a_model_keeps_become_tensors() -> None:
    """Wan decodes frame by frame and hands its decoder a list, in which each convolution keeps frames for the next."""
    model: Any = draw_weights(wan())
    latent, kept = image(16, 3, 7, 6), []
    expected = model.decode(latent, return_dict=False)[0]
    with stream(model.decoder, tuning=SMALL):
        forward = model.decoder.forward

        def watch(*args: Any, **kwargs: Any) -> Any:
            kept[:] = kwargs["feat_cache"]
            assert not [one for one in kept if isinstance(one, Tensor) and type(one) is not Tensor]
            return forward(*args, **kwargs)

        model.decoder.forward = watch
        result = model.decode(latent, return_dict=False)[0]
    assert_same(result, expected, 1e-5)
    assert [one for one in kept if isinstance(one, Tensor)]


@pytest.mark.parametrize("budget", [2_000_000, 1_000_000, 940_000, 500_000])
def test_half_of_a_budget_takes_no_less_than_one_that_is_too_small(budget: int) -> None:
    """On a GPU, where keys and values have to be: what was placed there before them leaves them no room."""
    model, device = draw_weights(kl(4)), torch.device("cuda", 0)
    peak, half = (
        expect(
            model,
            lambda copy, make: copy.decode(make((1, 4, 64, 64))),
            device=device,
            dtype=torch.half,
            budget=one,
            tuning=SMALL,
        ).peak
        for one in (budget, budget // 2)
    )
    assert peak <= max(budget, half)


def test_small_maps_with_large_weights_are_a_pass_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder without norms over the image: its last steps want all rows at once, its first ones few."""
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU()]
    last = [nn.Conv2d(16, 256, 8, 8), *(nn.Conv2d(256, 256, 3, padding=1) for _ in range(4))]
    model, x = nn.Sequential(*first, *last).requires_grad_(False), torch.randn(1, 3, 512, 512)
    tuning = Tuning(allocator_bytes=0, always=True)
    done: list[int] = []
    with torch.no_grad(), stream(model, tuning=tuning, on_progress=lambda *_: done.append(1)):
        result = model(x)
    assert_same(result, model(x), 1e-5)
    assert len(done) > 4  # strips, and the last one of all rows
    cut, uncut = (
        expect(model, lambda copy, make: copy(make(x.shape)), device=CPU, tuning=replace(tuning, worth_a_cut=worth))
        for worth in (tuning.worth_a_cut, 0.0)
    )
    assert cut.peak < 0.8 * uncut.peak


class Residual(nn.Module):
    """Wider inside than between its kind, as the blocks of PLKSR."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(width, inside, 3, padding=1), nn.Conv2d(inside, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x))


@pytest.mark.parametrize("bounded", [False, True])
def test_line_buffers_that_weigh_much_are_halved(bounded: bool) -> None:
    width, inside, blocks = 4, 32, 20
    model, x = nn.Sequential(*(Residual(width, inside) for _ in range(blocks))), torch.randn(1, width, 128, 64)
    of_lines = blocks * 2 * (width + inside) * 64 * x.element_size()
    assert of_lines > 2 * x.nbytes
    budget, tuning = (
        int(0.75 * of_lines + x.nbytes) if bounded else None,
        replace(SMALL, strip_bytes=1, strip_share=0.01),
    )
    result, took = called(model, x, budget=budget, tuning=tuning)
    assert_same(result, model(x), 1e-5)
    assert took.offloaded == 0
    assert took.peak < 0.75 * of_lines + x.nbytes  # what lies between two passes is freed as the result is made


class FromAndToTheHost(nn.Module):
    """Takes pixels that lie on the host to its device, and writes its result into a tensor of the host's, as LTX."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, pixels: Tensor, buffer: Tensor) -> Tensor:
        y = self.convolution(pixels.to(self.convolution.weight.device))
        for channel in range(3):
            buffer[:, channel] = y[:, channel]
        return buffer


def test_what_lies_on_the_host_takes_nothing_of_the_device() -> None:
    model = FromAndToTheHost().requires_grad_(False)
    pixels, buffer = torch.randn(2, 1, 3, 64, 64)
    expected = model.convolution(pixels)
    with stream(model, tuning=SMALL):
        assert model(pixels, buffer) is buffer
    assert_same(buffer, expected, 1e-5)


def test_a_second_call_plans_nothing() -> None:
    model: Any = draw_weights(kl(4))
    runner, latent = Streamed(tuning=SMALL), image(4, 16, 16)
    with torch.no_grad():
        first = runner.call(model.decode, (latent,), {}).sample
        kept = dict(runner._schedules)
        second = runner.call(model.decode, (latent,), {}).sample
    assert kept
    assert dict(runner._schedules) == kept
    assert torch.equal(first, second)


def test_a_schedule_is_for_maps_that_lie_alike() -> None:
    """Eager copies what a norm reads where it has gaps, which is beyond this budget."""
    wide = torch.randn(1, 16, 700, 1400)
    norm = lambda x: torch.nn.functional.group_norm(x, 4)  # noqa: E731
    dense, gaps = wide[..., :700].contiguous(), wide[..., ::2]
    runner, in_strips = Streamed(60_000_000), []
    with torch.no_grad():
        for x in (dense, gaps, dense, gaps):
            assert_same(runner.call(norm, (x,), {}), norm(x), 1e-5)
            assert runner.last is not None
            in_strips.append(runner.last.in_strips)
    assert in_strips == [False, True, False, True]


def test_eager_runs_where_no_plan_takes_less_whatever_the_budget() -> None:
    """One map of 64 MiB, made of another at once: strips would only add theirs."""
    slack = allocator_bytes("cpu")
    for budget in (None, 1 << 20, 1 << 30):
        peak = expect(nn.SiLU(), lambda copy, make: copy(make((1, 64, 512, 512))), device=CPU, budget=budget).peak
        assert 64 << 20 <= peak <= (64 << 20) + slack


class TestSmallCalls:
    """One for which eager's schedule was best is not recorded again, while nothing has changed."""

    module = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1))

    @torch.no_grad()
    def recorded(self, calls: Sequence[Any], **kwargs: Any) -> list[bool]:
        runner, found = Streamed(**kwargs), []
        for x, *more in calls:
            before = runner.last
            result = runner.call(self.module, (x, *more), {})
            torch.testing.assert_close(result, self.module(x))
            found.append(runner.last is not before)
        assert runner.calls == len(calls)
        return found

    def test_a_call_that_is_alike_is_not_recorded_again(self) -> None:
        x = torch.randn(1, 4, 256, 256)
        assert self.recorded([(x,), (torch.randn_like(x),)]) == [True, False]

    def test_one_of_another_shape_or_order_is_recorded(self) -> None:
        x = torch.randn(1, 4, 256, 256)
        others = x[:, :, :128], x.contiguous(memory_format=torch.channels_last)
        assert self.recorded([(x,), *((other,) for other in others), (x,)]) == [True, True, True, False]

    def test_one_that_eager_runs_beyond_the_budget_is_recorded(self) -> None:
        x = torch.randn(1, 4, 256, 256)
        assert self.recorded([(x,), (x,)], budget=3 << 20) == [True, True]

    def test_one_that_is_always_to_be_streamed_is_recorded(self) -> None:
        x = torch.randn(1, 4, 256, 256)
        assert self.recorded([(x,), (x,)], tuning=Tuning(always=True)) == [True, True]

    def test_one_with_gradients_on_is_recorded(self) -> None:
        x, runner = torch.randn(1, 4, 256, 256), Streamed()
        for _ in range(3):
            before = runner.last
            assert not runner.call(self.module, (x,), {}).requires_grad
            assert runner.last is not before

    def test_a_module_that_is_set_to_something_else(self) -> None:
        """It may take a hundred times as much then, beyond the budget."""
        module, x = nn.Sequential(nn.Upsample(scale_factor=1), self.module), torch.randn(1, 4, 128, 128)
        runner, found = Streamed(budget=20 << 20), []
        with torch.no_grad():
            for factor in (1, 1, 8, 8):
                module[0].scale_factor = factor  # type: ignore[reportAttributeAccessIssue]
                before = runner.last
                result = runner.call(module, (x,), {})
                found.append(runner.last is not before)
                assert_same(result, module(x), 1e-5)
        assert found == [True, False, True, True]

    def test_a_function_of_nobody(self) -> None:
        x, runner = torch.randn(1, 4, 256, 256), Streamed()
        with torch.no_grad():
            for _ in range(2):
                before = runner.last
                runner.call(lambda map: self.module(map), (x,), {})
                assert runner.last is not before

    def test_one_of_another_module_is_recorded(self) -> None:
        x, runner = torch.randn(1, 4, 256, 256), Streamed()
        with torch.no_grad():
            for module in (self.module, deepcopy(self.module)):
                before = runner.last
                runner.call(module, (x,), {})
                assert runner.last is not before


@pytest.mark.parametrize("budget", [0, -1, 1.5, "2GiB", True])
def test_a_budget_that_is_no_number_of_bytes_is_refused(budget: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"budget is .* give a whole number of bytes above 0"),
        stream(kl(4), budget=budget),
    ):
        pass


def test_only_modules_and_methods_are_streamed() -> None:
    with pytest.raises(TypeError, match="cannot be streamed: give a module, or a method"), stream(3):  # type: ignore
        pass


class TestFiles:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return tmp_path

    def test_nothing_is_left_of_an_interrupted_call(self, folder: Path) -> None:
        model: Any = draw_weights(kl(4))
        steps = 0

        def stop(done: int, work: int) -> None:
            nonlocal steps
            steps += 1
            if steps == 5:
                raise KeyboardInterrupt

        with (
            pytest.raises(KeyboardInterrupt),
            torch.no_grad(),
            stream(model.decoder, budget=1, on_progress=stop, tuning=SMALL),
        ):
            model.decode(image(4, 19, 16))
        assert list(folder.iterdir()) == []
        assert "forward" not in model.decoder.__dict__

    def test_no_room_is_said_before_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model: Any = draw_weights(kl(4))
        latent, done = image(4, 19, 16), []
        needed = called(model.decode, latent, budget=1)[1].offloaded_at_once
        usage = shutil.disk_usage(tempfile.gettempdir())
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed // 4))
        decode = streamed(model.decode, budget=1, on_progress=lambda *steps: done.append(steps), tuning=SMALL)
        with torch.no_grad():
            for named in ({"z": latent}, {}):
                with pytest.raises(
                    OSError, match=r"feature maps lie in a file, and .+ has no room for it \(.+ MB are free"
                ):
                    decode(*(() if named else (latent,)), **named)
            assert done == []
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
            decode(latent)
        assert done

    def test_a_folder_that_is_gone_is_named_where_a_file_is_needed(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """And nowhere else."""
        model: Any = draw_weights(kl(4))
        latent, done = image(4, 19, 16), []
        gone = tmp_path / "gone"
        monkeypatch.setattr(tempfile, "tempdir", str(gone))
        with torch.no_grad():
            streamed(model.decode, tuning=SMALL)(latent)
            streamed(model.decode, budget=1 << 40, tuning=SMALL)(latent)
            decode = streamed(model.decode, budget=1, on_progress=lambda *steps: done.append(steps), tuning=SMALL)
            with pytest.raises(OSError, match=r"lie in a file, and .+gone is not there: have TMPDIR name a folder"):
                decode(latent)
        assert done == []

    def test_where_room_is_short_a_schedule_keeps_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model: Any = draw_weights(kl(4))
        latent, tuning = image(4, 64, 64), replace(SMALL, strip_bytes=4_000)
        budget = called(model.decode, latent, tuning=tuning)[1].peak * 11 // 20
        wide = called(model.decode, latent, budget=budget, tuning=tuning)[1]
        usage = shutil.disk_usage(tempfile.gettempdir())
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=wide.offloaded_at_once - 1))
        short = called(model.decode, latent, budget=budget, tuning=tuning)[1]
        assert wide.peak <= budget >= short.peak
        assert short.offloaded_at_once < wide.offloaded_at_once
        assert short.planned > wide.planned

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what files take is read from /proc/self/fd")
    def test_files_take_what_the_schedule_expects(self, folder: Path) -> None:
        model: Any = draw_weights(kl(4))
        latent, taken = image(4, 96, 96), []
        runner = Streamed(
            1, on_progress=lambda *_: taken.append(bytes_of_files(folder)), tuning=replace(SMALL, strip_bytes=2_000_000)
        )
        with torch.no_grad():
            runner.call(model.decode, (latent,), {})
        assert runner.last is not None
        assert 0.95 * runner.last.offloaded_at_once < max(taken) < 1.05 * runner.last.offloaded_at_once
        assert runner.last.offloaded_at_once <= runner.last.offloaded
        assert bytes_of_files(folder) == 0


def bytes_of_files(folder: Path) -> int:
    """What the open files without a name in `folder` take on the disk."""
    taken: dict[int, int] = {}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # of the listing itself, closed by now
            if os.readlink(link).startswith(f"{folder}/"):
                taken[link.stat().st_ino] = link.stat().st_blocks * 512
    return sum(taken.values())


class TestNoFolder:
    """No folder for temporary files is there."""

    @pytest.fixture(autouse=True)
    def no_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))

    @pytest.mark.parametrize("budget", [None, 1 << 40])
    def test_where_all_fits_none_is_needed(self, budget: Optional[int]) -> None:
        x = torch.randn(1, 4, 16, 16)
        model = nn.Conv2d(4, 4, 3).requires_grad_(False)
        assert streamed(model, budget=budget, tuning=SMALL)(x).shape == (1, 4, 14, 14)

    def test_an_empty_batch_needs_none(self) -> None:
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)).requires_grad_(False)
        assert streamed(model, budget=1, tuning=SMALL)(torch.empty(0, 4, 16, 16)).shape == (0, 4, 14, 14)


def test_thin_maps_come_in_smaller_strips_unless_there_is_memory_to_spare() -> None:
    """Strips that suit a CPU would be most of what an upscaler of few channels takes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1)]
    for _ in range(6):
        layers += [nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)]
    upscaler = nn.Sequential(*layers, nn.Conv2d(64, 48, 3, padding=1), nn.PixelShuffle(4))

    def counted(budget: Optional[int]) -> Any:
        return expect(upscaler, lambda model, make: model(make((1, 3, 512, 512))), device=CPU, budget=budget)

    bounded, unbounded = counted(1 << 40), counted(None)
    assert unbounded.in_strips
    assert bounded.in_strips
    assert unbounded.peak < 0.85 * bounded.peak < 0.85 * bounded.eager


def test_large_weights_between_thin_maps_do_not_keep_strips_high() -> None:
    """Each strip brings weights into the backend's order; without a budget that is no reason for strips that take more
    than all else."""

    def thin() -> list[nn.Module]:
        return [layer for _ in range(10) for layer in (nn.Conv2d(96, 96, 3, padding=1), nn.ReLU())]

    wide = [nn.Conv2d(512, 512, 3, padding=1) for _ in range(4)]
    down, up = nn.Conv2d(96, 512, 8, stride=8), nn.ConvTranspose2d(512, 96, 8, stride=8)
    first, last = nn.Conv2d(3, 96, 3, padding=1), nn.Conv2d(96, 3, 3, padding=1)
    model = nn.Sequential(first, *thin(), down, *wide, up, *thin(), last)
    expected = expect(model, lambda copy, make: copy(make((1, 3, 512, 512))), device=CPU)
    assert expected.in_strips
    assert expected.peak < 0.5 * expected.eager


def test_smaller_strips_are_tried_before_eager_is_chosen() -> None:
    """In strips that suit a CPU a small picture would take more than eager does."""
    decoder = random_vae().decoder
    expected = expect(decoder, lambda copy, make: copy(make((1, 4, 32, 32))), device=CPU)
    assert expected.in_strips
    assert expected.peak < 0.7 * expected.eager


def test_never_worse_than_eager() -> None:
    """A network that streaming cannot help runs as it is written, in eager's memory."""

    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).sort(2)[0].view(x.shape) + x.flip(2)

    model = Sorted()
    expected = expect(model, lambda copy, make: copy(make((1, 4, 64, 64)) * 2), device=CPU)
    assert expected.peak <= 1.5 * expected.eager


class TestWritesInPlace:
    """What the program writes to a map takes no memory where eager's schedule runs, and is seen where eager has it."""

    weight = torch.randn(8, 8, 3, 3, generator=torch.manual_seed(0)) / 8

    def made(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight, padding=1)

    def chain(self, x: Tensor) -> Any:
        y = self.made(x).relu_().mul_(2)
        return y.add_(x).clamp_(-1, 1).sub_(x)

    def once(self, x: Tensor) -> Any:
        y = x * 3
        return y.addcmul_(x, x)

    def read_before(self, x: Tensor) -> Any:
        y = self.made(x)
        before = y * 2
        return before, y.relu_()

    def seen_in_a_view(self, x: Tensor) -> Any:
        y = self.made(x)
        view = y.flatten(2)
        y.relu_()
        return view * 2, view

    def through_a_view(self, x: Tensor) -> Any:
        y = self.made(x)
        rest = y[:, 1:] - 1
        y[:, 1:].relu_()
        return y, rest

    def of_one_value(self, x: Tensor) -> Any:
        return torch.zeros_like(x).add_(x), x.new_ones(x.shape).mul_(x)

    def of_what_is_given_back(self, x: Tensor) -> Any:
        y = self.made(x)
        z = nn.functional.pad(y, (0, 0)).contiguous()
        return z.relu_() - y, y

    def of_an_argument(self, x: Tensor) -> Any:
        return x.contiguous().abs_() + 1

    def of_another_layout(self, x: Tensor) -> Any:
        y = self.made(x).contiguous(memory_format=torch.channels_last)
        return y.add_(x), y.mul_(x)

    def where_a_type_is_kept(self, x: Tensor) -> Any:
        return self.made(x).half().add_(x), (x * 2).copysign_(x)

    @pytest.mark.parametrize(
        "name",
        ["chain", "once", "read_before", "seen_in_a_view", "through_a_view", "of_one_value", "of_what_is_given_back",
         "of_an_argument", "of_another_layout", "where_a_type_is_kept"],
    )  # fmt: skip
    @torch.no_grad()
    def test_eagers_schedule_takes_what_eager_takes(self, name: str) -> None:
        def eagerly(roots: Any, keep: Any, tuning: Any, budget: Any, held: int, *_: Any) -> Schedule:
            return eager_schedule(roots, keep, held)

        function, x = getattr(self, name), torch.randn(1, 8, 256, 256)
        given, other = x.clone(), x.clone()
        expected, eager = allocated(lambda: function(given))
        with patch.object(call, "choose", eagerly):
            result, ours = allocated(lambda: called(function, other)[0])
        for one, wanted in zip(*(found if isinstance(found, tuple) else (found,) for found in (result, expected))):
            assert torch.equal(one, wanted)
        assert torch.equal(given, other)
        if name in ("chain", "once"):
            assert ours.peak <= eager.peak + (1 << 20)

    @torch.no_grad()
    def test_one_that_does_not_write_has_a_schedule_of_its_own(self) -> None:
        def eagerly(roots: Any, keep: Any, tuning: Any, budget: Any, held: int, *_: Any) -> Schedule:
            return eager_schedule(roots, keep, held)

        runner, peaks = Streamed(tuning=SMALL), []
        with patch.object(call, "choose", eagerly):
            for writes in (True, False, True):
                runner.call(lambda x, writes=writes: nn.functional.relu(x * 2, inplace=writes), (X_LARGE,), {})
                assert runner.last is not None
                peaks.append(runner.last.peak)
        assert peaks == [X_LARGE.nbytes, 2 * X_LARGE.nbytes, X_LARGE.nbytes]


class TestEagersPeak:
    """Eager's footprint, which plans are compared with, is what eager allocates: a copy has memory of its own, and what
    a view shows is there as long as the view is."""

    def repeated(self, x: Tensor) -> Tensor:
        return (x * 2).repeat(1, 3, 1, 1).sigmoid()

    def rolled(self, x: Tensor) -> Tensor:
        return (x * 2).roll(1, 2).sigmoid()

    def put_in_order(self, x: Tensor) -> Tensor:
        return (x * 2).transpose(2, 3).contiguous().sigmoid()

    def shuffled(self, x: Tensor) -> Tensor:
        return nn.functional.pixel_shuffle(x * 2, 2).sigmoid()

    def turned(self, x: Tensor) -> Tensor:
        return (x * 2).transpose(2, 3).sigmoid().exp()

    def a_part(self, x: Tensor) -> Tensor:
        return (x * 2)[:, :1].repeat_interleave(8, 1) + x

    def parts_of_parts(self, x: Tensor) -> Tensor:
        first, second = (x * 2).flatten(2).chunk(2, 1)
        return (first.sigmoid() * second).exp()

    def normed(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm((x * 2).transpose(2, 3), 4)

    def normed_channels_last(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(x.to(memory_format=torch.channels_last) * 2, 4)

    def normed_over_columns(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm((x * 2).transpose(2, 3), (128,))

    def turned_scores(self, x: Tensor) -> Tensor:
        return (x * 2).transpose(1, 2).softmax(-1)

    def turned_pooled(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d((x * 2).transpose(2, 3), 2)

    def pooled_with_places(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d((x * 2), 3, 1, 1)

    def turned_pooled_with_places(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d((x * 2).transpose(2, 3), 3, 1, return_indices=True)[0]

    def places(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d((x * 2), 3, 1, return_indices=True)[1]

    def pooled_to_many(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_max_pool2d((x * 2), (100, 90))

    def turned_pooled_to_many(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_max_pool2d((x * 2).transpose(2, 3), (90, 100))

    def turned_mean(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d((x * 2).transpose(2, 3), 1)

    def turned_mean_of_frames(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool3d((x * 2)[None].transpose(3, 4), (4, 50, 60))

    def without_a_batch(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d((x * 2)[0].transpose(1, 2), 2)

    def normed_sound(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm((x * 2).flatten(2).transpose(1, 2), 4)

    @pytest.mark.parametrize(
        "name",
        [
            "repeated", "rolled", "put_in_order", "shuffled", "turned", "a_part", "parts_of_parts", "normed",
            "normed_channels_last", "normed_over_columns", "turned_scores", "turned_pooled", "pooled_with_places",
            "turned_pooled_with_places", "places", "pooled_to_many", "turned_pooled_to_many", "turned_mean",
            "turned_mean_of_frames", "without_a_batch", "normed_sound",
        ],
    )  # fmt: skip
    @torch.no_grad()
    def test_it_is_what_eager_allocates(self, name: str) -> None:
        def eagerly(roots: Any, keep: Any, tuning: Any, budget: Any, held: int, *_: Any) -> Schedule:
            return eager_schedule(roots, keep, held)

        function = getattr(self, name)
        _, eager = allocated(lambda: function(X_LARGE))
        with patch.object(call, "choose", eagerly):
            _, last = called(function, X_LARGE)
        of_statistics = eager.peak // 100 if "norm" in name or "mean" in name else 0  # of each group; a divisor
        assert eager.peak - of_statistics <= last.peak <= eager.peak + (1 << 12)


class TestCopies:
    """What is counted is a copy, and the model is left as it was."""

    def test_replaced_methods_are_not_run(self) -> None:
        model, calls = nn.Conv2d(2, 2, 1), []
        model.forward = lambda x: calls.append(x) or x  # type: ignore[method-assign]
        assert peak_activations(model, lambda copy, make: copy(make((1, 2, 8, 8))), device=CPU) == 2 * 2 * 64 * 4
        assert not calls

    def test_the_copy_has_the_attributes_that_are_given(self) -> None:
        model, seen = nn.Sequential(nn.Dropout(0.5), nn.Identity()), []
        peak_activations(
            model,
            lambda copy, make: seen.extend([copy[0].p, hasattr(copy[1], "p")]),
            device=CPU,
            attributes={"p": 0.0},
        )
        assert seen == [0.0, False]
        assert model[0].p == 0.5

    def test_what_a_run_notes_and_hooks_hear_stays_in_the_copy(self) -> None:
        model, heard = nn.Sequential(nn.Conv2d(2, 2, 1)), []
        model.cache = {}  # type: ignore[assignment]
        model[0].register_forward_hook(lambda *given: heard.append(given))

        def run(copy: Any, make: Any) -> None:
            copy.cache["last"] = copy(make((1, 2, 8, 8)))

        peak_activations(model, run, device=CPU)
        assert not model.cache
        assert not heard

    def test_code_that_looks_at_values_raises(self) -> None:
        model = nn.Conv2d(2, 2, 1)
        with pytest.raises(RuntimeError, match="looks at values"):
            peak_activations(model, lambda copy, make: copy(make((1, 2, 8, 8))).sum().item(), device=CPU)


@pytest.mark.parametrize(("budget", "way"), [(None, "eager"), (130, "eager"), (119, "eager"), (118, "streamed")])
def test_a_budget_counts_what_the_allocator_keeps_of_eagers_maps(budget: Optional[int], way: str) -> None:
    """Eager is much faster, and its maps fit each of these budgets, in MiB; with 24 MiB of slack not all."""
    assert allocator_bytes("cpu") == 24 << 20
    streamed, eager = Schedule(peak=90 << 20, seconds=10.0), Schedule(peak=95 << 20, seconds=1.0)
    look: Any = dict(shape=(1, 1, 8, 8), strides=(64, 64, 8, 1), dtype=torch.float32, device=CPU, itemsize=4, dim=2)
    root = Node(None, (), (), **look)
    with (
        patch.object(choosing, "in_strips", lambda *_: streamed),
        patch.object(choosing, "eager_schedule", lambda *_: eager),
    ):
        chosen = choosing.choose([root], [], Tuning(), budget and budget << 20)
    assert chosen.seconds == {"eager": 1.0, "streamed": 10.0}[way]
    assert budget is None or chosen.peak <= budget << 20


def test_a_plan_that_recomputes_is_no_slower_than_would_have_eager_taken() -> None:
    """Its convolution costs too much to be computed twice; without that strips take a third of eager's memory."""
    model = nn.Sequential(
        nn.Upsample(scale_factor=8.0),
        nn.Conv2d(64, 64, 7, padding=3),
        nn.GroupNorm(8, 64),
        nn.SiLU(),
        nn.Conv2d(64, 3, 1),
    )
    expected = expect(model, lambda copy, make: copy(make((1, 64, 128, 128))), device=CPU)
    assert expected.peak < 0.7 * expected.eager


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_what_is_repeated_takes_what_it_has(dim: int) -> None:
    """It is a copy, whichever dimension it is made along."""
    x = image(8, 256, 256)
    _, last = called(lambda map: (map * 2.0).repeat_interleave(4, dim), x, tuning=Tuning())
    assert last.peak >= 4 * x.nbytes
