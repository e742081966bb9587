"""Networks that stream: eager's result, whatever the strips, with little evaluated whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from allocations import allocated
from conv_helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import CASES, draw_weights
from network_helpers import random_network, run_network
from products import crossed
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv.files.vae import random_vae
from comfyui_patchconv.streaming import Tuning, stream, streamed
from comfyui_patchconv.streaming.record.operators import convolution

FEW_ROWS = Tuning(strip_bytes=6_000, always=True)
TUNINGS = {
    "one row": Tuning(strip_bytes=1, always=True),
    "few rows": FEW_ROWS,
    "one strip": Tuning(strip_bytes=1 << 25, always=True),
}
WHOLE: dict[str, set[str]] = {
    "hunyuan decode": {"flatten"},
    "hunyuan encode": {"flatten", "scaled_dot_product_attention"},
    "ltx decode": {"repeat", "flatten"},
    "ltx encode": {"repeat"},
    "mochi encode": {"scaled_dot_product_attention", "contiguous"},
    "cosmos decode": {"repeat", "tril", "scaled_dot_product_attention"},
    "cosmos encode": {"repeat", "tril", "scaled_dot_product_attention"},
}
"""What of these models may be evaluated whole; of the others nothing."""

all_tunings = pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)


@crossed(1, name=list(CASES), inference={"inference": True, "no grad": False})
def test_networks_of_diffusers_give_eagers_result_and_evaluate_nothing_whole(name: str, inference: bool) -> None:
    build, run, input = CASES[name]
    model = draw_weights(build())
    with torch.inference_mode(inference), torch.no_grad():
        expected = run(model, input)
        report: dict[str, int] = {}
        result = streamed(lambda x: run(model, x), report=report, tuning=FEW_ROWS)(input)
    assert type(result) is Tensor
    assert_same(result, expected, 1e-5)
    assert set(report) <= WHOLE.get(name, set())


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 500, 4_000]), st.integers(1, 3), st.integers(6, 17), st.booleans())
def test_random_networks_give_eagers_result(
    seed: int, strip_bytes: int, holds: int, height: int, inference: bool
) -> None:
    operators, channels = random_network(seed)
    x = torch.randn(2, channels, height, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    run = streamed(lambda map: run_network(operators, map, holds), tuning=Tuning(strip_bytes, always=True))
    with torch.inference_mode(inference), torch.no_grad():
        expected = run_network(operators, x.clone(), holds)
        assert_same(run(x.clone()), expected, 1e-9)


@all_tunings
class TestAliases:
    """A map that somebody still holds never shows what is written elsewhere."""

    def test_a_held_input_stays(self, tuning: Tuning) -> None:
        weight = torch.randn(3, 3, 3, 3)

        def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = F.conv2d(x, weight, padding=1)
            z = y + x
            y.mul_(2)
            return x, y, z

        x = torch.randn(1, 3, 9, 5)
        for result, expected in zip(streamed(run, tuning=tuning)(x.clone()), run(x.clone()), strict=True):
            assert_same(result, expected, 1e-6)

    def test_the_caller_s_tensor_is_not_written_to(self, tuning: Tuning) -> None:
        x = torch.randn(1, 2, 9, 5)
        before = x.clone()
        streamed(lambda map: F.group_norm(map, 2) + map, tuning=tuning)(x)
        assert torch.equal(x, before)

    def test_a_write_through_a_view_reaches_the_map(self, tuning: Tuning) -> None:
        def run(x: Tensor) -> Tensor:
            y = x * 2
            y[:, :1].add_(1)
            return F.silu(y)

        x = torch.randn(1, 2, 9, 5)
        assert_same(streamed(run, tuning=tuning)(x), run(x), 1e-6)

    def test_a_write_to_what_detach_gives_reaches_the_map(self, tuning: Tuning) -> None:
        def run(x: Tensor) -> Tensor:
            y = x * 2
            y.detach().add_(1)
            return F.silu(y)

        x = torch.randn(1, 2, 9, 5)
        assert_same(streamed(run, tuning=tuning)(x), run(x), 1e-6)


@all_tunings
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_upsampling_into_a_convolution(groups: int, bias: bool, tuning: Tuning) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=bias).requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        return conv(F.interpolate(conv(x)[:, :4], scale_factor=2.0, mode="nearest"))

    x = torch.randn(2, 4, 9, 5)
    assert_same(streamed(run, tuning=tuning)(x), run(x), 1e-6)


@all_tunings
@pytest.mark.parametrize(
    "resample",
    [
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        lambda x: F.interpolate(x, size=(4 * x.shape[-2], 3 * x.shape[-1]), mode="bicubic"),
        lambda x: F.interpolate(x[:, :, None], scale_factor=2.0, mode="trilinear").flatten(1, 2),
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        lambda x: F.avg_pool2d(x, 2),
    ],
    ids=["bilinear", "bicubic", "trilinear", "average", "average of two"],
)
def test_resampling_is_deferred(resample: Callable[[Tensor], Tensor], tuning: Tuning) -> None:
    weight, report = torch.randn(3, 3, 3, 3), dict[str, int]()

    def run(x: Tensor) -> Tensor:
        return F.silu(resample(F.conv2d(x, weight, padding=1)))

    x = torch.randn(2, 3, 11, 6)
    assert_same(streamed(run, report=report, tuning=tuning)(x), run(x), 1e-6)
    assert not report


@all_tunings
@pytest.mark.parametrize("size", [(4, 3), (2, 2), (3, 6)], ids=str)
def test_windows_side_by_side_are_deferred(size: tuple[int, int], tuning: Tuning) -> None:
    """As MageVAE takes an image apart and puts it together again; others are evaluated whole, and right."""
    report: dict[str, int] = {}

    def run(x: Tensor) -> Tensor:
        tokens = F.unfold(x * 2, size, stride=size).transpose(1, 2)
        return F.fold(F.silu(tokens).transpose(1, 2).contiguous(), x.shape[2:], size, stride=size).neg()

    x = torch.randn(2, 3, 12, 6)
    assert_same(streamed(run, report=report, tuning=tuning)(x), run(x), 1e-6)
    assert not report
    overlapping = lambda x: F.fold(F.unfold(x * 2, 3, padding=1).sin(), x.shape[2:], 3, padding=1)  # noqa: E731
    assert_same(streamed(overlapping, report=report, tuning=tuning)(x), overlapping(x), 1e-6)
    assert set(report) == {"im2col", "col2im"}


@all_tunings
@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 4, 3, padding=2, dilation=2, padding_mode="circular"),
        nn.Conv2d(3, 4, (4, 3), stride=2, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(3, 4, 4, 2, 1),
        nn.ConvTranspose2d(3, 4, 3, 3, 1, output_padding=2, dilation=2, bias=False),
        nn.ConvTranspose2d(3, 6, 1, 3, 0, output_padding=1, groups=3),
    ],
    ids=["circular", "circular, strided", "transposed", "transposed, dilated", "transposed, with gaps"],
)
def test_convolutions_of_other_kinds_are_deferred(convolution: nn.Module, tuning: Tuning) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), convolution, nn.SiLU()).requires_grad_(False)
    report: dict[str, int] = {}
    x = torch.randn(2, 3, 11, 6)
    assert_same(streamed(model.forward, report=report, tuning=tuning)(x), model(x), 1e-6)
    assert not report


@all_tunings
def test_batch_norm_is_deferred_in_evaluation_alone(tuning: Tuning) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU()).requires_grad_(False)
    x = torch.randn(2, 3, 11, 6)
    model(x)
    for training, whole in ((False, {}), (True, {"batch_norm": 1})):
        report: dict[str, int] = {}
        ours, theirs = (deepcopy(model).train(training) for _ in range(2))
        with torch.inference_mode():
            assert_same(streamed(ours, report=report, tuning=tuning)(x), theirs(x), 1e-6)
        assert report == whole
        for name, value in theirs.state_dict().items():
            assert_same(ours.state_dict()[name].double(), value.double(), 1e-6)


def block() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1)]
    return nn.Sequential(*layers).requires_grad_(False)


SMALL_STRIPS = Tuning(strip_bytes=4_000, always=True)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Errors that the next convolutions of strips raise, one each."""
    errors: list[BaseException] = []

    def conv2d(*args: Any, **kwargs: Any) -> Tensor:
        if errors:
            raise errors.pop(0)
        return F.conv2d(*args, **kwargs)

    monkeypatch.setattr(convolution, "_CONVOLVE", (F.conv1d, conv2d, F.conv3d))
    return errors


def test_a_strip_that_does_not_fit_is_halved(failing: list[BaseException]) -> None:
    model, x, done = block(), torch.randn(1, 4, 40, 9), list[int]()
    expected = model(x)
    with stream(model, tuning=SMALL_STRIPS, on_progress=lambda *_: done.append(1)):
        model(x)
        usual = len(done)
        failing += [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError()]
        assert_same(model(x), expected, 1e-6)
    assert not failing
    assert len(done) > 2 * usual  # more strips, and smaller ones


def test_what_is_begun_again_has_given_back_what_it_had(failing: list[BaseException]) -> None:
    """The result is one tensor of 6 MB: before there is room for it once more the first is freed."""
    model, x = nn.Conv2d(4, 16, 3, padding=1).requires_grad_(False), torch.randn(1, 4, 300, 320)
    run = streamed(model, tuning=Tuning(strip_bytes=1 << 20, always=True))
    with torch.no_grad():
        run(x)
        _, usual = allocated(lambda: run(x))
        failing.append(MemoryError())
        _, again = allocated(lambda: run(x))
    assert not failing
    assert again.peak < usual.peak + 3e6


def test_an_error_leaves_the_model_as_it_was(failing: list[BaseException]) -> None:
    model, x = block(), torch.randn(1, 4, 40, 9)
    expected, before = model(x), dict(model.__dict__)
    failing.append(RuntimeError("stop"))
    with pytest.raises(RuntimeError, match="stop"), stream(model, tuning=SMALL_STRIPS):
        model(x)
    assert model.__dict__ == before
    assert torch.equal(model(x), expected)


def test_threads_share_a_model() -> None:
    model = block()
    inputs = [torch.randn(1, 4, 20 + index, 9) for index in range(4)]
    expected = [model(x) for x in inputs]
    results: dict[int, Tensor] = {}
    with stream(model, tuning=SMALL_STRIPS):
        threads = [threading.Thread(target=lambda i=i: results.update({i: model(inputs[i])})) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, one in enumerate(expected):
        assert_same(results[index], one, 1e-6)


def from_the_exact(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).square().mean().sqrt())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_casts_in_strips_what_it_casts_in_eager(weights: torch.dtype) -> None:
    """Automatic1111 encodes under it: the casts are those of eager, and nothing else is cast."""
    model, x = block().to(weights), torch.randn(1, 4, 64, 48)
    exact = block().to(weights).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(x)
        with stream(model, tuning=SMALL_STRIPS):
            result = model(x)
    assert result.dtype == eager.dtype
    assert 0 < from_the_exact(result, exact) <= 1.05 * from_the_exact(eager, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_to_float64_as_eager(dtype: torch.dtype) -> None:
    model, x = block().to(dtype), torch.randn(1, 4, 64, 48).to(dtype)
    try:
        eager = model(x)
    except RuntimeError as error:
        pytest.skip(f"this torch has no {dtype} on the CPU: {error}")
    exact = block().to(dtype).double()(x.double())
    with stream(model, tuning=SMALL_STRIPS):
        ours = model(x)
    assert 0 < from_the_exact(ours, exact) <= 1.05 * from_the_exact(eager, exact)


@pytest.mark.parametrize("width", [64, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("half", ["decoder", pytest.param("encoder", marks=pytest.mark.slow)])
def test_a_vae_in_half_precision_is_as_near_to_float64_as_eager(half: str, width: int) -> None:
    """Stable Diffusion's, whose width is 128, in strips of a few rows; channels last makes eager 40 times faster.

    Six pictures: the rounding of one differs by a tenth either way.
    """
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(6, *((3, 64, 64) if half == "encoder" else (4, 8, 8)), generator=generator).bfloat16()
    input = input.contiguous(memory_format=torch.channels_last)

    def run(vae: Any, x: Tensor) -> Tensor:
        return vae.encode(x).latent_dist.mode() if half == "encoder" else vae.decode(x).sample

    with torch.inference_mode():
        vae: Any = random_vae(dtype=torch.bfloat16, width=width)
        exact = run(nn.Module.to(deepcopy(vae), torch.float64), input.double())
        vae.to(memory_format=torch.channels_last)
        eager = run(vae, input)
        with stream(getattr(vae, half), tuning=Tuning(strip_bytes=1 << 18, always=True)):
            ours = run(vae, input)
    assert 0 < from_the_exact(ours, exact) <= 1.05 * from_the_exact(eager, exact)
