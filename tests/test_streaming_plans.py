"""Whatever a plan says, the result is the same; and what it expects to take is what a run takes."""

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_zoo import CASES, draw_weights, image, kl, wan
from network_helpers import random_network, run_network
from torch import Tensor, nn

from comfyui_patchconv import planner
from comfyui_patchconv.streaming import Plan, choose, engine, stream, streamed
from comfyui_patchconv.streaming.buffers import FileBuffer, is_borrowed, lasting
from comfyui_patchconv.streaming.call import carry_out
from comfyui_patchconv.streaming.run import Run


@pytest.fixture(autouse=True)
def small_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps are as thrifty as large ones here: what an allocator keeps is beyond any of them."""
    monkeypatch.setattr(planner, "ALLOCATOR_BYTES", {"cpu": 0})


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 500, 4_000]),
    st.one_of(st.none(), st.integers(1, 40_000)),
    st.one_of(st.none(), st.integers(1, 10_000)),
)
def test_the_result_never_depends_on_the_plan(
    seed: int, strip_bytes: int, budget: int | None, unstored_from: int | None
) -> None:
    operators, channels = random_network(seed)
    x = torch.randn(2, channels, 13, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = planner.STRIP_BYTES["cpu"]
    planner.STRIP_BYTES["cpu"] = strip_bytes
    try:
        expected = run_network(operators, x.clone(), 2)
        run = Run(Plan(budget, unstored_from))
        result = carry_out(lambda map: run_network(operators, map, 2), (x.clone(),), {}, run)
    finally:
        planner.STRIP_BYTES["cpu"] = before
    assert_same(result, expected, 1e-9)


@pytest.mark.parametrize("budget", [None, 1, 300_000, 10**9])
@pytest.mark.parametrize("name", ["kl decode", "kl encode", "tiny decode", "hunyuan decode", "qwen encode"])
def test_a_run_takes_what_the_plan_expects(name: str, budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 20_000)
    build, call, input = CASES[name]
    model: Any = draw_weights(build())
    method = getattr(model, name.split()[1])
    plan = choose(method, (input,), {}, budget=budget)
    run = Run(plan)
    expected = call(model, input)
    with torch.no_grad():
        setattr(model, name.split()[1], lambda x, **kwargs: carry_out(method, (x,), kwargs, run))
        result = call(model, input)
    assert type(result) is Tensor
    assert_same(result, expected, 1e-5)
    figures = ("stored", "moved", "elsewhere", "work", *(() if run.report else ("peak",)))
    assert [getattr(run, name) for name in figures] == [getattr(plan, name) for name in figures]
    assert run.peak <= plan.peak  # what is evaluated whole, and no map, only a plan counts
    assert plan.elsewhere <= plan.moved
    assert plan.peak > 0


def test_only_methods_of_modules_are_planned() -> None:
    with pytest.raises(TypeError, match="cannot be planned"):
        choose(lambda x: x, (torch.ones(1, 1, 2, 2),), {})


def test_what_cannot_be_streamed_leaves_no_trace() -> None:
    """A call that turns out to write through a view runs again, plain, on the caller's lists as they were."""

    def run(x: Tensor, kept: list[Tensor]) -> Tensor:
        kept.append(x * 2)
        y = kept[0] + kept[1]
        y[:, :1].add_(1)
        return y

    x, kept = torch.randn(1, 2, 9, 5), [torch.ones(1, 2, 9, 5)]
    result = streamed(run)(x, kept)
    again = [torch.ones(1, 2, 9, 5)]
    assert torch.equal(result, run(x, again))
    assert [torch.equal(one, other) for one, other in zip(kept, again, strict=True)] == [True, True]


def test_a_budget_moves_maps_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 4_000)
    model: Any = draw_weights(kl(4))
    latent = image(4, 64, 64)
    free = choose(model.decode, (latent,), {})
    tight = choose(model.decode, (latent,), {}, budget=free.peak * 3 // 4)
    assert free.moved == 0 < tight.moved
    assert tight.peak <= free.peak * 3 // 4


def test_the_largest_map_is_left_unstored_where_that_lowers_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 20_000)
    model: Any = draw_weights(kl(4))
    latent = image(4, 64, 64)
    plan = choose(model.decode, (latent,), {})
    assert plan.unstored_from is not None
    stored = Run(Plan(), dry=False)
    carry_out(model.decode, (latent,), {}, stored)
    assert plan.peak < 0.95 * stored.peak


def test_frames_that_a_model_keeps_become_tensors() -> None:
    """Wan decodes frame by frame and hands its decoder a list, in which each convolution keeps frames for the next."""
    model: Any = draw_weights(wan())
    latent = image(16, 3, 7, 6)
    expected = model.decode(latent, return_dict=False)[0]
    kept: list[Any] = []
    with stream(model.decoder):
        streamed_forward = model.decoder.forward

        def watch(*args: Any, **kwargs: Any) -> Any:
            kept[:] = kwargs["feat_cache"]
            return streamed_forward(*args, **kwargs)

        model.decoder.forward = watch
        result = model.decode(latent, return_dict=False)[0]
    assert_same(result, expected, 1e-5)
    frames = [one for one in kept if isinstance(one, Tensor)]
    assert frames
    assert all(type(one) is Tensor for one in frames)


@pytest.mark.parametrize("budget", [0, -1, 1.5, "2GiB"])
def test_a_wrong_budget(budget: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"budget is .* give a whole number of bytes above 0"),
        stream(kl(4), budget=budget),
    ):
        pass


@pytest.mark.parametrize("budget", [2_000_000, 1_000_000, 940_000, 500_000])
def test_half_of_a_budget_takes_no_less_than_one_that_is_too_small(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where keys and values have to be: what was placed there before them leaves them no room."""
    if torch.__version__.startswith("2.1.") and not torch.cuda.is_available():
        pytest.skip("torch 2.1 has no fake tensors of a GPU that is not there")
    monkeypatch.setattr(planner, "STRIP_BYTES_ELSEWHERE", 20_000)
    model: Any = draw_weights(kl(4)).half()  # indexing fake weights in float32 asks for CUDA
    device = torch.device("cuda", 0)
    latent = torch.empty(1, 4, 64, 64, dtype=torch.half, device="meta")
    peak, half = (choose(model.decode, (latent,), {}, device=device, budget=b).peak for b in (budget, budget // 2))
    assert peak <= max(budget, half)


def test_only_modules_and_methods_are_streamed() -> None:
    with pytest.raises(TypeError, match="cannot be streamed: give a module, or a method"), stream(3):  # type: ignore
        pass


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

    def test_no_room_is_said_before_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model: Any = draw_weights(kl(4))
        latent, done = image(4, 19, 16), []
        needed = choose(model.decode, (latent,), {}, budget=1).elsewhere
        usage = shutil.disk_usage(tempfile.gettempdir())
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed // 4))
        decode = streamed(model.decode, budget=1, on_progress=lambda *steps: done.append(steps))
        for named in ({"z": latent}, {}):
            with pytest.raises(
                OSError, match=r"feature maps lie in a file, and .+ has no room for it \(.+ MB are free"
            ):
                decode(*(() if named else (latent,)), **named)
        assert done == []
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
        decode(latent)
        assert done

    def test_where_room_is_short_a_plan_keeps_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 4_000)
        model: Any = draw_weights(kl(4))
        latent = image(4, 64, 64)
        budget = choose(model.decode, (latent,), {}).peak // 2
        wide = choose(model.decode, (latent,), {}, budget=budget)
        usage = shutil.disk_usage(tempfile.gettempdir())
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=wide.elsewhere - 1))
        short = choose(model.decode, (latent,), {}, budget=budget)
        assert wide.peak <= budget >= short.peak
        assert short.elsewhere < wide.elsewhere
        assert short.unstored_from is not None

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what files take is read from /proc/self/fd")
    def test_files_take_what_the_plan_expects(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 2_000_000)
        model: Any = draw_weights(kl(4))
        latent = image(4, 96, 96)
        plan = choose(model.decode, (latent,), {}, budget=1)
        taken: list[int] = []
        run = Run(plan, on_progress=lambda *steps: taken.append(bytes_of_files(folder)))
        carry_out(model.decode, (latent,), {}, run)
        assert 0.95 * plan.elsewhere < max(taken) < 1.05 * plan.elsewhere
        assert bytes_of_files(folder) == 0

    def test_an_interrupted_run_leaves_nothing(self, folder: Path) -> None:
        model: Any = draw_weights(kl(4))
        latent = image(4, 19, 16)
        steps = 0

        def stop(done: int, work: int) -> None:
            nonlocal steps
            steps += 1
            if steps == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), stream(model.decoder, budget=1, on_progress=stop):
            model.decode(latent)
        assert list(folder.iterdir()) == []
        assert "forward" not in model.decoder.__dict__


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_memory_that_is_used_again_is_no_strip_to_keep(device: str) -> None:
    line = lasting(torch.empty(1, 4, 3, 5, device=device))
    assert line.shape == (1, 4, 3, 5)
    assert is_borrowed(line)
    if hasattr(line.untyped_storage(), "resizable"):  # torch 2.1 cannot tell, and copies all
        assert not is_borrowed(torch.empty(1, 4, 3, 5, device=device))


def test_small_maps_with_large_weights_are_a_pass_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder without norms over the image: its last steps want all rows at once, its first ones few."""
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.SiLU()]
    last = [nn.Conv2d(16, 256, 8, 8), *(nn.Conv2d(256, 256, 3, padding=1) for _ in range(4))]
    model, x = nn.Sequential(*first, *last).requires_grad_(False), torch.randn(1, 3, 512, 512)
    cut, held = choose(model, (x,), {}), []
    run: Any = Run(cut, on_progress=lambda *steps: held.append(run.held))
    result = carry_out(model.forward, (x,), {}, run)
    monkeypatch.setattr(engine, "_WORTH_A_CUT", 0)
    assert cut.peak < 0.8 * choose(model, (x,), {}).peak
    assert len(held) > 4  # strips, and the last one of all rows
    assert max(held) <= cut.stored
    assert_same(result, model(x), 1e-5)


class FromAndToTheHost(nn.Module):
    """Takes pixels that lie on the host to its device, and writes its result into a tensor of the host's, as LTX."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, pixels: Tensor, buffer: Tensor) -> Tensor:
        y = self.convolution(pixels.to(self.convolution.weight.device))
        for channel in range(3):
            buffer.narrow(1, channel, 1).copy_(y.narrow(1, channel, 1))  # indexing of a fake one asks for CUDA
        return buffer


def test_what_lies_on_the_host_takes_nothing_of_the_device() -> None:
    if torch.__version__.startswith("2.1.") and not torch.cuda.is_available():
        pytest.skip("torch 2.1 has no fake tensors of a GPU that is not there")
    model, large = FromAndToTheHost(), torch.empty(1, 3, 1 << 18, 64)
    plan = choose(model, (large, torch.empty_like(large)), {}, device=torch.device("cuda", 0))
    assert plan.blanks
    assert plan.stored == plan.moved == 0
    assert plan.peak < large.nbytes / 2
    pixels, buffer = torch.randn(2, 1, 3, 64, 64)
    expected = model.convolution(pixels)
    with stream(model):
        assert model(pixels, buffer) is buffer
    assert_same(buffer, expected, 1e-5)
