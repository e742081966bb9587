"""What video models do besides: frames kept for the next chunk, zeros before the first, pixels shuffled by views."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Optional

import pytest
import torch
from allocations import allocated
from conv_helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import draw_weights, image, wan
from network_helpers import Frames
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.conv import onednn, videos
from comfyui_patchconv.conv.patch import convert_model
from comfyui_patchconv.streaming import Streamed, Tuning, expect, stream, streamed
from comfyui_patchconv.streaming.call import Call
from comfyui_patchconv.streaming.plan import passes
from comfyui_patchconv.streaming.record.operators import convolution

SMALL = Tuning(strip_bytes=20_000, allocator_bytes=0, always=True)
ONE_ROW = Tuning(strip_bytes=1, allocator_bytes=0, always=True)
CPU = torch.device("cpu")


def called(function: Any, *args: Any, tuning: Tuning = SMALL, budget: Optional[int] = None) -> tuple[Any, Call]:
    """What a streamed call gives, and what it took."""
    runner = Streamed(budget, tuning=tuning)
    with torch.no_grad():
        result = runner.call(function, args, {})
    assert runner.last is not None
    return result, runner.last


class Causal(nn.Module):
    """Convolutions over time that keep their last two frames, and zeros before the first, as Wan's are."""

    def __init__(self, layers: int = 3, channels: int = 8, clone: bool = False) -> None:
        super().__init__()
        self.clone = clone
        self.layers = nn.ModuleList(nn.Conv3d(channels, channels, 3, padding=(0, 1, 1)) for _ in range(layers))

    def forward(self, x: Tensor, kept: list[Any]) -> Tensor:
        for index, layer in enumerate(self.layers):
            before = kept[index]
            if before is None:
                before = torch.zeros(*x.shape[:2], 2, *x.shape[3:], dtype=x.dtype)
            frames = torch.cat([before, x], 2)
            kept[index] = frames[:, :, -2:].clone() if self.clone else frames[:, :, -2:]
            x = F.silu(layer(frames))
        return x

    def decode(self, x: Tensor) -> Tensor:
        kept: list[Any] = [None] * len(self.layers)
        return torch.cat([self(chunk, kept) for chunk in x.split(2, 2)], 2)


def test_all_chunks_at_once() -> None:
    """Chunks in one call: the frames kept between them are never stored, nor are the zeros before the first."""
    model, x = Causal(), image(8, 6, 96, 16)
    expected = expect(model, lambda copy, make: copy.decode(make(x.shape)), device=CPU, tuning=SMALL)
    result, call = called(model.decode, x)
    with torch.no_grad():
        eager = model.decode(x)
    assert_same(result, eager, 1e-6)
    assert call.peak == expected.peak
    assert call.stored == eager.nbytes  # the result, and nothing else


@pytest.mark.parametrize("clone", [True, False], ids=["a copy", "a view"])
def test_frames_of_the_caller_are_not_copied(clone: bool) -> None:
    """Frames in a caller's list are its own: they are no part of what a call takes, but for those that it leaves there.
    Of a view of what was joined eager keeps all that was joined."""
    model, x = Causal(1, clone=clone), image(8, 2, 96, 16)
    kept = [image(8, 2, 96, 16)]
    _, call = called(model.forward, x, kept)
    assert call.stored <= x.nbytes + (x.nbytes if clone else 2 * x.nbytes)
    assert kept[0].untyped_storage().nbytes() <= (x.nbytes if clone else 2 * x.nbytes)


def test_an_error_leaves_the_callers_frames_as_eager_does() -> None:
    def run(x: Tensor, kept: list[Any]) -> Tensor:
        kept[0] = kept[0] + x
        raise KeyError("x")

    before = torch.ones(1, 2, 9, 5)
    kept = [before]
    with pytest.raises(KeyError):
        streamed(run, tuning=SMALL)(torch.ones(1, 2, 9, 5), kept)
    assert type(kept[0]) is Tensor
    assert torch.equal(kept[0], torch.full((1, 2, 9, 5), 2.0))  # as an eager call leaves it
    assert torch.equal(before, torch.ones(1, 2, 9, 5))


@pytest.mark.parametrize("late", [False, True])
def test_zeros_that_something_is_written_to(late: bool) -> None:
    """Before they are read, or after: what counts is what they were when eager would have read them."""

    def run(x: Tensor) -> Tensor:
        zeros = torch.zeros(1, 4, 64, 64, 8).squeeze(0)[None]
        if not late:
            zeros[:, :, 3] = 5.0
        y = torch.cat([zeros, x], 1)
        zeros[:, :, 4] = 7.0
        return y * 2

    x = torch.randn(1, 4, 64, 64, 8)
    assert torch.equal(streamed(run, tuning=SMALL)(x), run(x))


def test_zeros_that_no_operator_wrote_to() -> None:
    def run(x: Tensor) -> Tensor:
        zeros = torch.zeros(1, 4, 64, 64, 8)
        zeros.numpy()[:] = 3.0
        return torch.cat([zeros, x], 1) * 2

    x = torch.randn(1, 4, 64, 64, 8)
    assert torch.equal(streamed(run, tuning=SMALL)(x), run(x))


@pytest.mark.parametrize("parameter", [True, False])
def test_parts_of_weights_are_not_copied(parameter: bool) -> None:
    """Wan's first frame takes the last third of a kernel."""
    table = torch.randn(1, 3, 256, 64)
    table = nn.Parameter(table) if parameter else table
    run, x = streamed(lambda x: x * table[:, -1:], tuning=SMALL), torch.randn(1, 1, 256, 64)
    with torch.no_grad():
        run(x)  # what is allocated once in a process
        result, memory = allocated(lambda: run(x))
    assert torch.equal(result, x * table[:, -1:])
    assert memory.peak < result.nbytes + x.nbytes / 2


def upsampled(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Channels become frames, rows and columns between those that are there: Wan 2.2's shortcut."""
    t, h, w = factors
    batch, channels, frames, height, width = x.shape
    x = x.repeat_interleave(2, 1).view(batch, 2 * channels // (t * h * w), t, h, w, frames, height, width)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).contiguous()
    return x.view(batch, -1, frames * t, height * h, width * w)


def upsampled_in_turn(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """As LTX in `diffusers` has it: dimensions merged one pair after the other."""
    t, h, w = factors
    batch, channels, frames, height, width = x.shape
    x = x.reshape(batch, channels // (t * h * w), t, h, w, frames, height, width)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def averaged(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """The other way round, with means of groups of channels."""
    t, h, w = factors
    batch, channels, frames, height, width = x.shape
    x = x.view(batch, channels, frames // t, t, height // h, h, width // w, w).permute(0, 1, 3, 5, 7, 2, 4, 6)
    x = x.reshape(batch, -1, 2, frames // t, height // h, width // w)
    return x.mean(2)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([upsampled, upsampled_in_turn, averaged]),
    st.tuples(st.integers(1, 3), st.integers(2, 3), st.integers(2, 3)),
    st.tuples(*[st.integers(1, 4)] * 4),
    st.sampled_from([1, 3_000, 10**6]),
)
def test_pixels_shuffled_by_views(
    shuffle: Any, factors: tuple[int, int, int], sizes: tuple[int, int, int, int], strip_bytes: int
) -> None:
    """Row by row, between two convolutions, and never whole."""
    t, h, w = factors
    batch, frames, height, width = sizes
    channels = t * h * w * 2
    x = torch.randn(batch, channels, frames * t, height * h, width * w, dtype=torch.float64)
    before = torch.randn(channels, channels, 1, 3, 3, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        y = shuffle(F.conv3d(x, before, padding=(0, 1, 1)), factors)
        return F.conv3d(y, torch.ones(1, y.shape[1], 1, 3, 3, dtype=torch.float64), padding=(0, 1, 1))

    report: dict[str, int] = {}
    result = streamed(run, report=report, tuning=Tuning(strip_bytes, always=True))(x)
    assert_same(result, run(x), 1e-12)
    assert report == {} or height == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda merged: merged + 1,
        lambda merged: merged.sum(3),
        lambda merged: merged.contiguous().flatten(2, 3),
        lambda merged: torch.stack([merged, merged]).sum(0),
        lambda merged: merged * merged.flip(-1),
        lambda merged: merged.transpose(1, 2).flatten(0, 1),
        lambda merged: torch.cat(merged.chunk(2, -1)),
        lambda merged: torch.cat(merged.split([3, 7], -1)[::-1], -1),
        lambda merged: merged.view(torch.int64).view(torch.float64),
        lambda merged: merged.view(torch.float32).view(torch.float64),
    ],
    ids=["number", "sum", "copy", "stack", "itself", "exchanged", "halves", "parts", "integers", "bits"],
)
def test_dimensions_that_were_merged_are_what_they_look_like(use: Any) -> None:
    weight = torch.randn(8, 8, 1, 3, 3, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        y = F.conv3d(x, weight, padding=(0, 1, 1))
        y = y.reshape(1, 2, 1, 2, 2, 3, 6, 5).permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7)
        assert y.shape == (1, 2, 3, 1, 6, 2, 10)
        return use(y)

    x = torch.randn(1, 8, 3, 6, 5, dtype=torch.float64)
    assert_same(streamed(run, tuning=SMALL)(x), run(x), 1e-12)


@pytest.mark.parametrize(
    "parts", [lambda y: y.chunk(2, -1), lambda y: y.split(32, -1), lambda y: y.split([10, 54], -1)]
)
def test_parts_of_merged_tokens(parts: Any) -> None:
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return parts(F.conv2d(x, weight, padding=1).flatten(2).transpose(1, 2).reshape(1, 2, 2, 2, 2, -1))

    x = torch.randn(1, 4, 16, 16, dtype=torch.float64)
    for result, expected in zip(streamed(run, tuning=SMALL)(x), run(x), strict=True):
        assert_same(result, expected, 1e-12)


def downsampling() -> nn.Module:
    """To an eighth of the height; its first row needs 118 of the input's."""
    return nn.Sequential(*(nn.Conv2d(4, 4, 3, 2 if layer < 3 else 1, 1) for layer in range(9)))


def test_an_encoders_first_strip_is_no_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row of a small map reads many rows of a large one; they come in strips too."""
    seen: list[int] = []

    def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(x.shape[-2])
        return F.conv2d(x, *args, **kwargs)

    model, x = downsampling(), torch.randn(1, 4, 512, 128)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(convolution, "_CONVOLVE", (F.conv1d, watched, F.conv3d))
        result = streamed(model, tuning=SMALL)(x)
    assert_same(result, expected, 1e-6)
    assert max(seen) < 64


@pytest.mark.parametrize("limit", [0, 12, 20, 40])
def test_first_strips_that_do_not_fit(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for so many rows at a time: smaller steps, and an error where not even a row fits."""

    def limited(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.shape[-2] > limit:
            raise MemoryError
        return F.conv2d(x, *args, **kwargs)

    model, x = downsampling(), torch.randn(1, 4, 512, 32)
    with torch.no_grad():
        expected = model(x)
        monkeypatch.setattr(convolution, "_CONVOLVE", (F.conv1d, limited, F.conv3d))
        if limit == 0:
            with pytest.raises(MemoryError):
                streamed(model, tuning=SMALL)(x)
            return
        result = streamed(model, tuning=SMALL)(x)
    assert_same(result, expected, 1e-6)


def slow_convolutions(run: Any) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if "slow_conv3d" in event.key)


@pytest.mark.skipif(not onednn.applies(torch.ones(1)), reason="this torch has no oneDNN")
def test_strips_of_video_go_to_the_kernel_of_the_whole() -> None:
    model, x = nn.Conv3d(16, 16, 3, padding=(0, 1, 1)), torch.randn(1, 16, 4, 400, 16)
    with torch.no_grad():
        expected = model(x)
        assert slow_convolutions(lambda: model(x)) == 0
        with stream(model, tuning=SMALL):
            assert slow_convolutions(lambda: model(x)) == 0
            assert_same(model(x), expected, 1e-6)
        convert_model(model, splits=8, threshold=0)
        assert slow_convolutions(lambda: model(x)) == 0
        assert_same(model(x), expected, 1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(3, 6), st.integers(3, 9), st.integers(3, 9)),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.tuples(*[st.integers(1, 2)] * 3),
    st.tuples(*[st.integers(0, 2)] * 3),
    st.booleans(),
)
def test_conv3d_of_a_small_video_gives_torchs_result(
    sizes: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], bias: bool
) -> None:
    x, weight = torch.randn(1, *sizes), torch.randn(5, sizes[0], *kernel)
    given = (x, weight, torch.randn(5) if bias else None, stride, padding)
    assert_same(onednn.conv3d(*given), F.conv3d(*given), 1e-5)


def test_wans_chunks_at_once() -> None:
    """All of a decode in one call, in strips as small as they get."""
    model: Any = draw_weights(wan())
    latent = image(16, 4, 6, 5)
    expected = model.decode(latent, return_dict=False)[0]
    with stream(model.decode, tuning=ONE_ROW), torch.no_grad():
        result = model.decode(latent, return_dict=False)[0]
    assert_same(result, expected, 1e-5)


def test_who_watches_convolutions_is_told_of_small_ones() -> None:
    """`holes.with_holes` works so."""
    seen: list[Any] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    model, x = nn.Conv3d(2, 2, 3), torch.randn(1, 2, 4, 9, 9)
    convert_model(model, splits=2, threshold=0)
    with torch.no_grad(), Watch():
        model(x)
    assert seen.count(F.conv3d) == 2


def test_a_method_under_its_decorators_name() -> None:
    """As diffusers' `decode` is in some versions."""

    def decorated(method: Any) -> Any:
        def wrapper(self: Any, x: Tensor) -> Tensor:
            return method(self, x)

        return wrapper

    class Decorated(Causal):
        decode = decorated(Causal.decode)

    model, x = Decorated(1), image(8, 2, 9, 5)
    done: list[int] = []
    with torch.no_grad(), stream(model.decode, tuning=SMALL, on_progress=lambda *_: done.append(1)):
        result = model.decode(x)
    assert done
    done.clear()
    with torch.no_grad():
        assert_same(result, model.decode(x), 1e-6)
    assert not done


def test_frames_gathered_in_channels_by_views() -> None:
    """As LTX's encoder halves the frames."""

    def run(x: Tensor) -> Tensor:
        y = F.silu(x).unflatten(2, (2, 2)).movedim(3, 2).flatten(1, 2)
        return y.unflatten(1, (4, 4)).mean(2)

    x, report = torch.randn(1, 8, 4, 12, 10), dict[str, int]()
    assert_same(streamed(run, report=report, tuning=SMALL)(x), run(x), 1e-6)
    assert not report


class Normalised(nn.Module):
    """Chunks of four frames through convolutions and group norms, which keep their last two, as HunyuanVideo's do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(8, 8 if index < 3 else 1, 3, padding=(0, 1, 1)) for index in range(4))
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(4))

    def decode(self, x: Tensor) -> Tensor:
        kept: list[Any] = [x[:, :, :2] * 0] * 4
        chunks = []
        for chunk in x.split(4, 2):
            for index, (norm, layer) in enumerate(zip(self.norms, self.layers)):
                frames = torch.cat([kept[index], F.silu(norm(chunk))], 2)
                kept[index] = frames[:, :, -2:].clone()
                chunk = layer(frames)
            chunks.append(chunk)
        return torch.cat(chunks, 2)


def test_normalised_chunks_go_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held does not grow with their number, but for the result; nor is anything computed for a second time."""
    model: Any = draw_weights(Normalised())
    calls = [called(model.decode, image(8, 4 * count, 64, 8))[1] for count in (3, 4, 9, 10)]
    results = [image(1, 4 * count, 64, 8).nbytes for count in (3, 4, 9, 10)]
    held = [call.stored - 2 * size for call, size in zip(calls, results)]
    assert held[3] <= held[1]
    assert calls[3].planned - calls[2].planned == calls[1].planned - calls[0].planned
    x = image(8, 12, 64, 8)
    with torch.no_grad():
        assert_same(called(model.decode, x)[0], model.decode(x), 1e-5)
    for owner, step in ((passes, "stored_for_later"), (passes.Passes, "_store_part")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, lambda *_: [])
            assert called(model.decode, image(8, 40, 64, 8))[1].stored > 1.2 * calls[3].stored


def test_parts_that_are_normalised_in_two_ways() -> None:
    def run(x: Tensor) -> Tensor:
        y = F.silu(x)
        parts = [y[:, :, frame : frame + 2] for frame in (0, 2)]
        return torch.cat([F.group_norm(part, 2) + F.group_norm(part, 4) for part in parts], 2)

    x = torch.randn(1, 8, 4, 12, 10)
    assert_same(streamed(run, tuning=SMALL)(x), run(x), 1e-5)


class PadsItself(nn.Module):
    """Pads each convolution with frames of zeros that it makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv3d(8, 8, 3, padding=(0, 1, 1)) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(torch.cat([torch.zeros(1, 8, 2, *x.shape[3:]), x], 2))
        return x


def test_frames_of_zeros_are_not_kept() -> None:
    model: Any = draw_weights(PadsItself())
    x, runner = image(8, 2, 128, 16), Streamed(tuning=SMALL)
    with torch.no_grad():
        result, took = allocated(lambda: runner.call(model, (x,), {}))
        assert_same(result, model(x), 1e-5)
    assert runner.last is not None
    assert took.peak < 1.2 * runner.last.peak + x.nbytes
    assert took.peak < 8 * x.nbytes


def written_by_numpy(zeros: Tensor) -> None:
    zeros.numpy()[..., 0] = 3


def written_by_an_operator(zeros: Tensor) -> None:
    zeros[:, 1:].add_(1)


def written_through_its_data(zeros: Tensor) -> None:
    zeros.data.fill_(2)


@pytest.mark.parametrize("written", [written_by_numpy, written_by_an_operator, written_through_its_data])
@pytest.mark.parametrize("before", [False, True])
def test_zeros_that_are_written_to_are_none_any_more(written: Any, before: bool) -> None:
    weight = torch.randn(4, 4, 3, 3) / 6

    def run(x: Tensor) -> Tensor:
        zeros = torch.zeros(1, 4, 16, 12)
        if before:
            written(zeros)
        y = F.conv2d(torch.cat([zeros, x], 2), weight, padding=1)
        if not before:
            written(zeros)
        return y * torch.cat([zeros, zeros - 1], 2)

    x = image(4, 16, 12)
    if written is written_by_numpy and not before:
        pytest.skip("what NumPy writes to a tensor that is read already is not seen")
    assert_same(streamed(run, tuning=SMALL)(x), run(x), 1e-6)


# Convolutions of videos that are made of such of images


def seen_by(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    convolve = videos.by_images
    monkeypatch.setattr(videos, "by_images", lambda x, *given: seen.append(tuple(x.shape)) or convolve(x, *given))
    monkeypatch.setenv(videos.VARIABLE, "images")
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 1])
def test_strips_are_made_of_images_where_videos_are_refused(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, budget: Any
) -> None:
    model, x = Frames().requires_grad_(False).to(dtype), image(8, 6, 32, 16).to(dtype)
    exact = deepcopy(model).double()(x.double())
    expected = model(x)
    seen = seen_by(monkeypatch)
    with torch.no_grad():
        result = streamed(model, budget=budget, tuning=SMALL)(x)
    ours, theirs = ((one - exact).square().mean().sqrt() for one in (result, expected))
    assert seen
    if dtype == torch.float32:
        assert_same(result, expected, 1e-5)
    else:
        assert 0 < float(ours) <= 1.05 * float(theirs)


def test_what_is_made_of_images_takes_what_its_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_by(monkeypatch)
    model, x = Frames(), image(8, 6, 192, 128)
    for tuning in (Tuning(2_000_000, allocator_bytes=0, always=True), Tuning(1 << 40, allocator_bytes=0)):
        runner = Streamed(tuning=tuning)
        with torch.no_grad():
            _, found = allocated(lambda runner=runner: runner.call(model, (x,), {}))
        assert runner.last is not None
        assert found.peak <= 1.05 * runner.last.peak
    assert seen


def test_a_convolution_that_a_host_asks_of_cudnn_is_one_as_any_other() -> None:
    """ComfyUI calls cuDNN by its name where PyTorch would not; that operator is given a meaning on the CPU here."""

    def convolve(x: Tensor, weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, *_: bool) -> Tensor:
        return torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, [0] * 3, groups)

    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution", convolve, "CPU")
    weight, options = image(4, 3, 3, 3).expand(4, -1, -1, -1, -1) / 9, (False, False, True)

    def run(x: Tensor) -> Tensor:
        y = torch.cudnn_convolution(F.silu(x), weight, (1, 1, 1), (1, 2, 1), (1, 1, 1), 1, *options)
        return torch.cudnn_convolution(y.add_(0.5), weight, (0, 1, 1), (1, 1, 1), (1, 1, 1), 1, *options)

    try:
        report: dict[str, int] = {}
        x = image(4, 5, 60, 24)
        with torch.no_grad():
            assert_same(streamed(run, report=report, tuning=SMALL)(x), run(x), 1e-6)
        assert not report
        model = nn.Conv3d(1, 1, 1)
        assert expect(model, lambda copy, make: run(make(x.shape)), device=torch.device("cpu"), tuning=SMALL).in_strips
    finally:
        library._destroy()


class OfNoFrames(nn.Module):
    """As Cosmos pads where there is nothing to pad, and LTX adds a timestep to a chunk without frames."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(3, 4)
        before = x[:, :, :1].sin().repeat(1, 1, 0, 1, 1)
        none = (x[:, :, :0].exp() + x[:, :, :1].cos()) ** 2
        return torch.cat([before, x.sigmoid(), none.sin()], 2)


def test_maps_of_no_frames_are_deferred() -> None:
    module, x = OfNoFrames(), torch.randn(1, 128, 3, 16, 16)
    report: dict[str, int] = {}
    expect(module, lambda copy, make: copy(make(x.shape)), device=CPU, tuning=SMALL)
    with torch.no_grad():
        assert_same(streamed(module, report=report, tuning=SMALL)(x), module(x), 1e-6)
    assert "cat" not in report
