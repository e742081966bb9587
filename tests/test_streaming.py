"""Networks that stream: plain's result, whatever the strips, with little evaluated whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from conv_helpers import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from model_zoo import CASES, draw_weights
from network_helpers import random_network, run_network
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv import planner
from comfyui_patchconv.files import random_vae
from comfyui_patchconv.streaming import Plan, Run, carry_out, stream, streamed

WHOLE: dict[str, set[str]] = {
    "wan decode": {"zeros_like", "stack"},
    "hunyuan decode": {"group_norm", "add"},
    "hunyuan encode": {"group_norm", "add"},
    "mochi decode": {"view"},
    "mochi encode": {"sin", "cos", "linear"},
    "cosmos decode": {
        "new_ones", "scaled_dot_product_attention", "slice", "cat", "repeat_interleave", "flatten",
    },
    "cosmos encode": {"avg_pool3d", "scaled_dot_product_attention", "slice", "cat", "new_ones", "flatten"},
    "cogvideox encode": {"select", "slice"},
    "dc decode": {"linear", "conv2d", "cat", "chunk", "matmul", "slice", "mean", "add", "mul"},
    "dc encode": {"linear", "conv2d", "cat", "chunk", "matmul", "slice", "mean", "add", "mul"},
    "unet": {"scaled_dot_product_attention", "reshape", "add", "layer_norm"},
}  # fmt: skip
"""What of these models may be evaluated whole, in inference mode; of the others nothing."""


@pytest.fixture(params=[1, 6_000, 1 << 25], ids=["one row", "few rows", "one strip"])
def strip_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "no grad"])
@pytest.mark.parametrize("name", CASES)
def test_models(name: str, inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    build, run, input = CASES[name]
    model = draw_weights(build())
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 6_000)
    with torch.inference_mode(inference), torch.no_grad():
        expected = run(model, input)
        report: dict[str, int] = {}
        result = streamed(lambda x: run(model, x), report=report)(input)
    assert type(result) is Tensor
    assert_same(result, expected, 1e-5)
    assert set(report) <= WHOLE.get(name, set())


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([1, 500, 4_000]), st.integers(1, 3), st.integers(6, 17), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_random_networks(seed: int, strip_bytes: int, holds: int, height: int, inference: bool, blanks: bool) -> None:
    operators, channels = random_network(seed)
    x = torch.randn(2, channels, height, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = planner.STRIP_BYTES["cpu"]
    planner.STRIP_BYTES["cpu"] = strip_bytes
    try:
        with torch.inference_mode(inference), torch.no_grad():
            expected = run_network(operators, x.clone(), holds)
            run = Run(Plan(blanks=blanks))
            result = carry_out(lambda map: run_network(operators, map, holds), (x.clone(),), {}, run)
    finally:
        planner.STRIP_BYTES["cpu"] = before
    assert_same(result, expected, 1e-9)


@pytest.mark.usefixtures("strip_bytes")
class TestAliases:
    """A map that somebody still holds never shows what is written elsewhere."""

    def test_a_held_input_stays(self) -> None:
        weight = torch.randn(3, 3, 3, 3)

        def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = F.conv2d(x, weight, padding=1)
            z = y + x
            y.mul_(2)
            return x, y, z

        x = torch.randn(1, 3, 9, 5)
        for result, expected in zip(streamed(run)(x.clone()), run(x.clone())):
            assert_same(result, expected, 1e-6)

    def test_the_caller_s_tensor_is_not_written_to(self) -> None:
        x = torch.randn(1, 2, 9, 5)
        before = x.clone()
        streamed(lambda map: F.group_norm(map, 2) + map)(x)
        assert torch.equal(x, before)

    def test_a_write_through_a_view_reaches_the_map(self) -> None:
        def run(x: Tensor) -> Tensor:
            y = x * 2
            y[:, :1].add_(1)
            return F.silu(y)

        x = torch.randn(1, 2, 9, 5)
        assert_same(streamed(run)(x), run(x), 1e-6)

    def test_detach_shares(self) -> None:
        def run(x: Tensor) -> Tensor:
            y = x * 2
            y.detach().add_(1)
            return F.silu(y)

        x = torch.randn(1, 2, 9, 5)
        assert_same(streamed(run)(x), run(x), 1e-6)


@pytest.mark.usefixtures("strip_bytes")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_upsampling_into_a_convolution(groups: int, bias: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=bias).requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        return conv(F.interpolate(conv(x)[:, :4], scale_factor=2.0, mode="nearest"))

    x = torch.randn(2, 4, 9, 5)
    assert_same(streamed(run)(x), run(x), 1e-6)


@pytest.mark.usefixtures("strip_bytes")
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
def test_resampling_is_deferred(resample: Callable[[Tensor], Tensor]) -> None:
    weight, report = torch.randn(3, 3, 3, 3), {}

    def run(x: Tensor) -> Tensor:
        return F.silu(resample(F.conv2d(x, weight, padding=1)))

    x = torch.randn(2, 3, 11, 6)
    assert_same(streamed(run, report=report)(x), run(x), 1e-6)
    assert not report


@pytest.mark.usefixtures("strip_bytes")
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
def test_convolutions_of_other_kinds_are_deferred(convolution: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), convolution, nn.SiLU()).requires_grad_(False)
    report: dict[str, int] = {}
    x = torch.randn(2, 3, 11, 6)
    assert_same(streamed(model.forward, report=report)(x), model(x), 1e-6)
    assert not report


@pytest.mark.usefixtures("strip_bytes")
def test_batch_norm_is_deferred_in_evaluation_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU()).requires_grad_(False)
    x = torch.randn(2, 3, 11, 6)
    model(x)
    for training, whole in ((False, {}), (True, {"batch_norm": 1})):
        report: dict[str, int] = {}
        copies = [deepcopy(model).train(training) for _ in range(2)]
        with torch.inference_mode():
            assert_same(streamed(copies[0], report=report)(x), copies[1](x), 1e-6)
        assert report == whole


def block() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1)]
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Errors that the next convolutions raise, one each."""
    errors: list[BaseException] = []
    plain = F.conv2d

    def conv2d(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if errors and input.device.type != "meta" and type(input) is Tensor:
            raise errors.pop(0)
        return plain(input, *args, **kwargs)

    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 4_000)
    monkeypatch.setattr("comfyui_patchconv.streaming.operators._CONVOLVE", (F.conv1d, conv2d, F.conv3d))
    return errors


def test_a_strip_that_does_not_fit_is_halved(failing: list[BaseException]) -> None:
    model, x = block(), torch.randn(1, 4, 40, 9)
    expected = model(x)
    failing += [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError()]
    with stream(model):
        assert_same(model(x), expected, 1e-6)
    assert not failing


def test_an_error_leaves_the_model_as_it_was(failing: list[BaseException]) -> None:
    model, x = block(), torch.randn(1, 4, 40, 9)
    expected = model(x)
    failing.append(RuntimeError("stop"))
    with pytest.raises(RuntimeError, match="stop"), stream(model):
        model(x)
    assert "forward" not in model.__dict__
    assert torch.equal(model(x), expected)


def test_threads_share_a_model() -> None:
    model = block()
    inputs = [torch.randn(1, 4, 20 + index, 9) for index in range(4)]
    expected = [model(x) for x in inputs]
    results: dict[int, Tensor] = {}
    with stream(model):
        threads = [threading.Thread(target=lambda i=i: results.update({i: model(inputs[i])})) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, one in enumerate(expected):
        assert_same(results[index], one, 1e-6)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast(weights: torch.dtype) -> None:
    """Automatic1111 encodes under it: the casts are those of plain, and nothing else is cast."""
    model, x = block().to(weights), torch.randn(1, 4, 64, 48)
    exact = block().to(weights).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with stream(model):
            result = model(x)
    assert result.dtype == plain.dtype
    error, plain_error = ((one.double() - exact).square().mean().sqrt() for one in (result, plain))
    assert error <= 1.05 * plain_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_to_float64_as_plain(dtype: torch.dtype) -> None:
    model, x = block().to(dtype), torch.randn(1, 4, 64, 48).to(dtype)
    try:
        model(x)
    except RuntimeError as error:
        pytest.skip(f"this torch has no {dtype} on the CPU: {error}")
    exact = block().to(dtype).double()(x.double())
    plain = (model(x).double() - exact).square().mean().sqrt()
    with stream(model):
        ours = (model(x).double() - exact).square().mean().sqrt()
    assert ours <= 1.05 * plain


@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_a_vae_in_half_precision_is_as_near_to_float64_as_plain(half: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion's, at full width, in strips of a few rows."""
    monkeypatch.setitem(planner.STRIP_BYTES, "cpu", 1 << 20)
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, *((3, 128, 128) if half == "encoder" else (4, 16, 16)), generator=generator).bfloat16()

    def run(vae: Any, x: Tensor) -> Tensor:
        return vae.encode(x).latent_dist.mode() if half == "encoder" else vae.decode(x).sample

    with torch.inference_mode():
        exact = run(nn.Module.to(random_vae(dtype=torch.bfloat16), torch.float64), input.double())
        vae = random_vae(dtype=torch.bfloat16)
        plain = (run(vae, input).double() - exact).square().mean().sqrt()
        with stream(getattr(vae, half)):
            ours = (run(vae, input).double() - exact).square().mean().sqrt()
    assert 0 < ours <= 1.05 * plain
