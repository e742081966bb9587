"""Convolutions of videos that are made of such of images: where, and that they are what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_helpers import assert_same, attempt
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_patchconv import convert_model
from comfyui_patchconv.conv import videos
from comfyui_patchconv.conv.videos import VARIABLE, Versions, by_images, of_images

CUDA, MPS, CPU = torch.device("cuda"), torch.device("mps"), torch.device("cpu")
HALF, SINGLE = torch.float16, torch.float32


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {"padding": 1},
    "without padding": {},
    "strides": {"stride": (2, 1, 3), "padding": (2, 0, 1)},
    "dilations": {"dilation": (2, 3, 1), "padding": (1, 2, 0)},
    "groups": {"groups": 2, "padding": (1, 1, 0)},
    "all": {"stride": (3, 2, 1), "padding": (2, 1, 0), "dilation": (2, 1, 2), "groups": 4},
    "same": {"padding": "same"},
    "one frame": {"stride": 5},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (4, 1, 2)])
@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_made_of_images_they_are_torchs(name: str, kernel: tuple[int, ...], batch: tuple[int, ...]) -> None:
    given, channels = SETTINGS[name], 8 // SETTINGS[name].get("groups", 1)
    x, weight, bias = drawn(*batch, 8, 7, 11, 9), drawn(12, channels, *kernel, seed=1), drawn(12, seed=2)
    values: Any
    for values in ((x, weight, bias), (x, weight)):
        assert_same(by_images(*values, **given), F.conv3d(*values, **given), 1e-5)
    wide: Any = [value.double() for value in (x, weight, bias)]
    assert_same(by_images(*wide, **given), F.conv3d(*wide, **given), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_made_of_images_halves_are_no_farther_from_float64(dtype: torch.dtype) -> None:
    """A frame is rounded once: not for each of the kernel's."""
    given: Any = [
        value.to(dtype) for value in (drawn(1, 16, 5, 20, 15), drawn(16, 16, 3, 3, 3, seed=1), drawn(16, seed=2))
    ]
    if attempt(nn.Conv2d(1, 1, 1, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)) is RuntimeError:
        pytest.skip(f"this PyTorch has no {dtype} convolution on the CPU")
    exact = F.conv3d(*(value.double() for value in given), padding=1)
    ours = (by_images(*given, padding=1) - exact).square().mean().sqrt()
    best = (exact.to(dtype) - exact).square().mean().sqrt()
    assert 0 < float(ours) <= 1.05 * float(best)


@pytest.mark.parametrize("channels", [3, 5])
def test_what_torch_refuses_is_refused(channels: int) -> None:
    with pytest.raises(RuntimeError, match=r"channels|greater than"):
        by_images(drawn(1, channels, 2, 4, 4), drawn(4, 4 if channels == 3 else 5, 3, 3, 3))


def test_gradients_are_torchs() -> None:
    given = [drawn(2, 4, 5, 6, 7), drawn(6, 4, 3, 3, 3, seed=1), drawn(6, seed=2)]
    found = []
    for convolve in (by_images, F.conv3d):
        leaves: Any = [value.double().requires_grad_() for value in given]
        found.append(torch.autograd.grad(convolve(*leaves, padding=1, stride=(2, 1, 1)).square().sum(), leaves))
    for ours, theirs in zip(*found):
        assert_same(ours, theirs, 1e-12)


@pytest.mark.parametrize(
    ("device", "dtype", "versions", "images"),
    [
        (CUDA, HALF, Versions((2, 8, 0), 91002), False),
        (CUDA, HALF, Versions((2, 9, 0), 91501), True),
        (CUDA, torch.bfloat16, Versions((2, 9, 1), 91002), True),
        (CUDA, HALF, Versions((2, 9, 1), 91500), False),
        (CUDA, HALF, Versions((2, 10, 0), 91002), True),
        (CUDA, HALF, Versions((2, 10, 0), 91501), False),
        (CUDA, HALF, Versions((2, 10, 0), 90701), False),
        (CUDA, SINGLE, Versions((2, 10, 0), 91002), False),
        (CUDA, HALF, Versions((2, 9, 0), None), False),  # ROCm
        (MPS, SINGLE, Versions((2, 13, 0), None), True),
        (MPS, HALF, Versions((2, 14, 0), None), False),
        (CPU, HALF, Versions((2, 9, 0), 91002), False),
        (torch.device("meta"), HALF, Versions((2, 9, 0), 91002), False),
    ],
    ids=str,
)
def test_where_they_are(device: torch.device, dtype: torch.dtype, versions: Versions, images: bool) -> None:
    assert of_images(device, dtype, versions) == images


def test_here_is_what_this_torch_is() -> None:
    here = videos._here()
    assert torch.__version__.startswith(".".join(map(str, here.torch)))
    assert here.cudnn == (torch.backends.cudnn.version() if torch.version.hip is None else None)


def test_a_choice_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "frames")
    with pytest.raises(ValueError, match=f"{VARIABLE}=frames is none of auto, images, videos"):
        of_images(CPU, SINGLE)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What is made of images: here, on a CPU, because the environment says so."""
    monkeypatch.setenv(VARIABLE, "images")
    seen: list[tuple[int, ...]] = []
    convolve = videos.by_images

    def watched(input: Tensor, *given: Any, **named: Any) -> Tensor:
        seen.append(tuple(input.shape))
        return convolve(input, *given, **named)

    monkeypatch.setattr(videos, "by_images", watched)
    return seen


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@pytest.mark.parametrize("shape", [(2, 4, 5, 40, 9), (4, 5, 40, 9)])
def test_strips_of_a_video_are(made: list[tuple[int, ...]], mode: Any, shape: tuple[int, ...]) -> None:
    module, x = nn.Conv3d(4, 6, 3, padding=1, stride=(1, 2, 1), padding_mode=mode), drawn(*shape).requires_grad_()
    expected = module(x)
    gradients = torch.autograd.grad(expected.square().sum(), [x, *module.parameters()])
    assert not made
    convert_model(module, 5, threshold=0)
    result = module(x)
    assert len(made) >= 4
    assert_same(result, expected, 1e-5)
    for ours, theirs in zip(torch.autograd.grad(result.square().sum(), [x, *module.parameters()]), gradients):
        assert_same(ours, theirs, 1e-5)
